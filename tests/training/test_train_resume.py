"""Resuming is exact: a run that was interrupted ends with the adapter, bit for bit, of one that was not."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from PIL import Image
from support.training_helpers import WEIGHTS, assert_same_adapter, checkpoint_names, losses, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five pictures, not all square, two with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, size in enumerate([(40, 80), (80, 40), (32, 32), (50, 50), (64, 33)]):
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)).save(
            folder / f"{index}.png"
        )
    (folder / "1.txt").write_text("a sks glyph on grass")
    (folder / "3.txt").write_text("a small sks glyph")
    return folder


@pytest.fixture
def go(tiny_sd_path, pictures, tmp_path):
    def run(out, **flags):
        return train(tiny_sd_path, pictures, tmp_path / out, **({"random_flip": True} | flags))

    return run


SCENES = {
    "within an epoch": {"train_batch_size": 1},
    "across an epoch's end": {"train_batch_size": 2, "steps": (3, 6)},
    "in the middle of a batch that ends an epoch": {"train_batch_size": 4},
    "with accumulation": {"train_batch_size": 1, "gradient_accumulation_steps": 3},
    "with the text encoder, dropout and all randomness": {
        "train_text_encoder": True, "text_encoder_lr": 1e-3, "lora_dropout": 0.3, "noise_offset": 0.1, "snr_gamma": 5,
    },
    "without caches": {"no-cache_latents": True, "no-cache_text_embeddings": True},
    "with class pictures": {
        "with_prior_preservation": True, "class_prompt": "a glyph", "num_class_images": 3, "num_inference_steps": 1,
    },
    "with bfloat16": {"mixed_precision": "bf16"},
    "with dropped captions, held-out pictures and Huber's loss": {
        "caption_dropout_rate": 0.5, "validation_split": 0.2, "validation_steps": 1, "loss_type": "huber",
    },
}  # fmt: skip


@pytest.mark.parametrize("scene", SCENES)
def test_two_steps_and_two_resumed_are_four_straight(go, tmp_path, scene):
    """D1: diffusers replays the epoch from its start."""
    flags = dict(SCENES[scene])
    half, whole = flags.pop("steps", (2, 4))
    if flags.get("with_prior_preservation"):
        flags["class_data_dir"] = tmp_path / "class"
    straight = go("straight", max_train_steps=whole, **flags)
    parts = go("parts", max_train_steps=half, **flags)
    go("parts", max_train_steps=whole, resume_from_checkpoint="latest", **flags)
    assert_same_adapter(straight, parts)
    assert losses(straight) == losses(parts) and len(losses(parts)) == whole
    assert checkpoint_names(parts) == {f"checkpoint-{half}", f"checkpoint-{whole}"}


def test_a_schedule_goes_on_where_it_was(go):
    flags = {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "max_train_steps": 6, "checkpointing_steps": 3}
    straight = go("straight", **flags)
    shutil.copytree(straight / "checkpoint-3", straight.parent / "parts" / "checkpoint-3")
    parts = go("parts", resume_from_checkpoint="checkpoint-3", **flags)
    assert_same_adapter(straight, parts)


def test_the_number_of_loader_workers_may_change(go):
    straight = go("straight", max_train_steps=4)
    parts = go("parts", max_train_steps=2, dataloader_num_workers=2)
    go("parts", max_train_steps=4, resume_from_checkpoint="latest", dataloader_num_workers=1)
    assert_same_adapter(straight, parts)


def test_a_run_without_a_seed_resumes_exactly_too(go, caplog):
    straight = go("straight", max_train_steps=4, checkpointing_steps=2, seed=None)
    shutil.copytree(straight / "checkpoint-2", straight.parent / "parts" / "checkpoint-2")
    parts = go("parts", max_train_steps=4, seed=99, resume_from_checkpoint="latest")
    assert_same_adapter(straight, parts)
    assert "--seed 99 is ignored" in caplog.text


def test_a_path_elsewhere_is_resumed_with_its_log(go):
    """D6: diffusers takes only the last part of the path and looks for it in --output_dir."""
    straight = go("straight", max_train_steps=4, checkpointing_steps=2)
    elsewhere = go("elsewhere", max_train_steps=4, resume_from_checkpoint=straight / "checkpoint-2")
    assert_same_adapter(straight, elsewhere)
    assert losses(elsewhere) == losses(straight)
    assert checkpoint_names(elsewhere) == {"checkpoint-4"}


def test_a_missing_checkpoint_lists_those_present_and_foreign_names_are_no_matter(go):
    """D5 and D6."""
    out = go("out", max_train_steps=2)
    (out / "checkpoint-final").mkdir()
    with pytest.raises(ValueError, match=r"no checkpoint 'checkpoint-999'.*Present: checkpoint-2\."):
        go("out", max_train_steps=4, resume_from_checkpoint="checkpoint-999")
    go("out", max_train_steps=4, resume_from_checkpoint="latest")
    assert checkpoint_names(out) == {"checkpoint-2", "checkpoint-4", "checkpoint-final"}


@pytest.mark.parametrize("name", ["training_state.json", "optimizer.safetensors", WEIGHTS])
def test_a_damaged_checkpoint_is_named_before_a_model_is_loaded(go, name, monkeypatch):
    out = go("out", max_train_steps=2, checkpointing_steps=1)
    file = out / "checkpoint-2" / name
    content = file.read_bytes()

    def fail(*args, **kwargs):
        raise AssertionError("a model is loaded before the checkpoint was checked")

    monkeypatch.setattr("diffusers.UNet2DConditionModel.from_pretrained", fail)
    monkeypatch.setattr("transformers.CLIPTextModel.from_pretrained", fail)
    for damaged in (content[: len(content) // 2], b"", b"[]"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"checkpoint-2 is damaged \({name}.*resume.*checkpoint-1"):
            go("out", max_train_steps=4, resume_from_checkpoint="latest")


def test_latest_without_any_checkpoint_is_a_new_run(go):
    assert_same_adapter(go("new", resume_from_checkpoint="latest"), go("plain"))


def test_resuming_a_finished_run_finishes_it_again(go):
    """D2: diffusers fails on an unbound variable after saving, with a validation prompt."""
    flags = {"validation_prompt": "a sks glyph", "num_validation_images": 1, "num_inference_steps": 1}
    out = go("out", max_train_steps=3, **flags)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".safetensors"}
    (out / "pytorch_apt_weights.safetensors").unlink()
    shutil.rmtree(out / "samples")
    go("out", max_train_steps=3, resume_from_checkpoint="latest", **flags)
    assert [path.name for path in (out / "samples").iterdir()] == ["step-000003.png"]
    assert_same_adapter(out, out / "checkpoint-3")
    assert losses(out) == losses(out) and len(losses(out)) == 3 and list(before) == ["pytorch_apt_weights.safetensors"]


def test_other_adapter_settings_are_refused_and_other_training_settings_reported(go, caplog):
    go("out", max_train_steps=2)
    with pytest.raises(ValueError, match=r"other settings of the unet: num_prompts 4 there, 5 here"):
        go("out", max_train_steps=4, resume_from_checkpoint="latest", num_prompts=5)
    with pytest.raises(ValueError, match=r"adapter for \['unet'\], this run trains \['text_encoder', 'unet'\]"):
        go("out", max_train_steps=4, resume_from_checkpoint="latest", train_text_encoder=True)
    out = go("out", max_train_steps=4, resume_from_checkpoint="latest", learning_rate=0.5)
    assert "learning_rate 0.01 -> 0.5" in caplog.text
    rates = [json.loads(line)["lr"] for line in (out / "losses.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0.01, 0.01, 0.5, 0.5])


def test_settings_that_were_given_or_left_out_are_reported(go, caplog):
    go("out", max_train_steps=2, snr_gamma=5.0, text_encoder_lr=1e-3, train_text_encoder=True)
    caplog.clear()
    go("out", max_train_steps=3, noise_offset=0.1, aspect_ratio_buckets="32,32", train_text_encoder=True,
       resume_from_checkpoint="latest")  # fmt: skip
    (said,) = [record.getMessage() for record in caplog.records if "Settings that differ" in record.getMessage()]
    for change in (
        "snr_gamma 5.0 -> None", "text_encoder_lr 0.001 -> None", "noise_offset 0.0 -> 0.1",
        "aspect_ratio_buckets None -> '32,32'", "max_train_steps 2 -> 3",
    ):  # fmt: skip
        assert change in said
    assert said.count("->") == 5
    caplog.clear()
    go("epochs", max_train_steps=None, num_train_epochs=1, train_batch_size=4)
    go("epochs", max_train_steps=None, num_train_epochs=1, train_batch_size=4, resume_from_checkpoint="latest")
    assert "Settings that differ" not in caplog.text


@pytest.mark.parametrize("stopped", ["by a signal", "by a kill between checkpoint and evaluation"])
def test_an_evaluation_that_a_stop_has_prevented_is_made_up_for(go, monkeypatch, stopped):
    import train_apt_sd

    flags = {
        "max_train_steps": 4, "validation_split": 0.4, "validation_steps": 2, "checkpointing_steps": 2,
        "keep_best": True, "learning_rate": 1.0, "sample_prompts": None, "validation_prompt": "a sks glyph",
        "num_validation_images": 1, "num_inference_steps": 1,
    }  # fmt: skip
    straight = go("straight", **flags)
    name = "training_loss" if stopped == "by a signal" else "measure"
    original, calls = getattr(train_apt_sd, name), []

    def stop(*args):
        calls.append(1)
        if name == "measure":
            raise KeyError("killed")
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_apt_sd, name, stop)
        with pytest.raises((SystemExit, KeyError)):
            go("parts", **flags)
    parts = go("parts", resume_from_checkpoint="latest", **flags)
    for file in ("metrics.jsonl", "samples/step-000002.png", "best/pytorch_apt_weights.safetensors"):
        assert (parts / file).is_file()
    assert (parts / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert (parts / "samples/step-000002.png").read_bytes() == (straight / "samples/step-000002.png").read_bytes()
    assert_same_adapter(straight / "best", parts / "best")
    measured = []
    with monkeypatch.context() as patch:  # once it is made, it is not made again
        patch.setattr(train_apt_sd, "measure", lambda session, *args: measured.append(session.steps_done) or {})
        go("parts", resume_from_checkpoint="checkpoint-2", **flags)
    assert measured == [4]


def test_a_new_run_in_a_used_folder_has_nothing_of_the_old_one(go, caplog):
    samples = {"validation_prompt": "a sks glyph", "num_validation_images": 1, "num_inference_steps": 1}
    go("out", max_train_steps=2, validation_steps=1, validation_split=0.4, keep_best=True, **samples)
    out = go("out", max_train_steps=1, checkpointing_steps=1, checkpoints_total_limit=1, **samples)
    assert [path.name for path in (out / "samples").iterdir()] == ["step-000001.png"]
    assert not (out / "metrics.jsonl").exists() and not (out / "best").exists()
    assert "has checkpoints of an earlier run, up to step 2" in caplog.text
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_run_takes_away_only_what_a_trainer_wrote(go, tmp_path, pictures):
    out = tmp_path / "out"
    shutil.copytree(pictures, out / "best")
    (out / "metrics.jsonl").write_bytes(b"\xff\xfe not of a run")
    (out / "samples").mkdir()
    (out / "samples" / "step-by-step.png").write_bytes(b"mine")
    go("out", instance_data_dir=out / "best", max_train_steps=1)
    assert {path.name for path in (out / "best").iterdir()} == {path.name for path in pictures.iterdir()}
    assert (out / "metrics.jsonl").read_bytes() == b"\xff\xfe not of a run"
    assert (out / "samples" / "step-by-step.png").is_file()


def test_a_run_that_goes_on_from_elsewhere_has_nothing_of_the_one_that_was_there(go):
    flags = {"validation_prompt": "a sks glyph", "num_validation_images": 1, "num_inference_steps": 1}
    first = go("first", max_train_steps=2, **flags)
    go(
        "other",
        max_train_steps=4,
        validation_split=0.4,
        validation_steps=1,
        keep_best=True,
        learning_rate=0.3,
        **flags,
    )
    other = go("other", max_train_steps=3, resume_from_checkpoint=first / "checkpoint-2", **flags)
    assert not (other / "best").exists() and not (other / "metrics.jsonl").exists()
    assert "step-000004.png" not in {path.name for path in (other / "samples").iterdir()}


def test_what_is_not_finite_is_not_saved(go, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite after step 1, so it is not saved"):
        go("out", learning_rate=1e38, max_train_steps=1)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_fewer_steps_than_the_checkpoint_has_and_folders_that_cannot_be_made_are_told(go, tmp_path, caplog):
    go("out", max_train_steps=2)
    go("out", max_train_steps=1, resume_from_checkpoint="latest")
    assert "The checkpoint has 2 steps, more than the 1 of --max_train_steps: nothing is trained" in caplog.text
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--output_dir .*file/x cannot be made"):
        go("file/x")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_and_leaves(go, number, code, monkeypatch):
    import train_apt_sd

    flags = {"max_train_steps": 5, "gradient_accumulation_steps": 2}
    straight = go("straight", **flags)
    original, calls = train_apt_sd.training_loss, []

    def loss(*args):
        calls.append(1)
        if len(calls) == 5:  # the first half of the third step
            os.kill(os.getpid(), number)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_apt_sd, "training_loss", loss)
        with pytest.raises(SystemExit) as leave:
            go("parts", **flags)
    parts = straight.parent / "parts"
    assert leave.value.code == code and len(calls) == 6
    assert sorted(path.name for path in parts.iterdir()) == [
        "checkpoint-3", "config.local.toml", "config.toml", "losses.jsonl",
    ]  # fmt: skip
    go("parts", resume_from_checkpoint="latest", **flags)
    assert_same_adapter(straight, parts)
    assert losses(straight) == losses(parts)


def test_a_signal_in_the_last_step_does_not_spoil_the_end(go, monkeypatch):
    import train_apt_sd

    original = train_apt_sd.training_loss

    def loss(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(train_apt_sd, "training_loss", loss)
    out = go("out", max_train_steps=1)
    assert (out / "README.md").is_file()
