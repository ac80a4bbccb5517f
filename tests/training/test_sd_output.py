"""What a run of `train_apt_sd.py` leaves: samples, card, log, header, checkpoints, and what goes to the hub."""

import hashlib
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from support.training_helpers import (
    WEIGHTS,
    assert_same_adapter,
    header,
    losses,
)

import apt_diffusion as apt
from apt_diffusion.training.text_to_image.bases import open_base

# What a run leaves


def test_samples_are_on_disk_and_are_what_the_pipeline_draws(go, tiny_sd_path):
    """D7: diffusers throws them away without a tracker. Samples in training equal inference with the same seed."""
    out = go(
        validation_prompt="a sks glyph at night", validation_steps=2, max_train_steps=5, num_validation_images=2,
        num_inference_steps=3, seed=11,
    )  # fmt: skip
    assert sorted(path.name for path in (out / "samples").iterdir()) == [
        "step-000002.png", "step-000004.png", "step-000005.png",
    ]  # fmt: skip
    pipe = apt.StableDiffusionAPTPipeline.from_pretrained(tiny_sd_path).load_apt_weights(out)
    generator = torch.Generator().manual_seed(12)
    image = pipe(
        "a sks glyph at night", height=32, width=32, num_inference_steps=3, guidance_scale=7.5, generator=generator
    ).images[0]
    with Image.open(out / "samples" / "step-000005.png") as grid:
        enlarged = np.asarray(image.resize((192, 192), 0)).astype(int)
        pixels = np.asarray(grid.convert("RGB")).astype(int)
    top = pixels.shape[0] - 8 - 20 - 192
    second = pixels[top : top + 192, 8 + 192 + 8 : 8 + 192 + 8 + 192]
    assert np.abs(second - enlarged).max() <= 1


def test_validation_happens_after_the_epochs_that_diffusers_names(go):
    out = go(
        validation_prompt="x", validation_epochs=2, max_train_steps=12, num_validation_images=1, num_inference_steps=1
    )
    steps = sorted(int(path.stem.split("-")[1]) for path in (out / "samples").iterdir())
    assert steps == [3, 9, 12]  # 3 steps an epoch: after the first, the third, and at the end


@pytest.mark.slow
def test_validation_does_not_disturb_training(go):
    plain = go(max_train_steps=4, lora_dropout=0.3)
    watched = go(
        max_train_steps=4, lora_dropout=0.3, validation_prompt="x", validation_steps=1, num_validation_images=1,
        num_inference_steps=1,
    )  # fmt: skip
    assert_same_adapter(plain, watched)


def test_validation_images_start_the_samples(go, instance_dir):
    pictures = sorted(map(str, instance_dir.iterdir()))[:2]
    out = go(validation_images=pictures, num_validation_images=1, num_inference_steps=4)
    with Image.open(out / "samples" / "step-000002.png") as grid:
        assert grid.width == 2 * (192 + 8) + 8


def test_a_single_step_from_a_picture_is_refused_before_training(go, instance_dir, no_models):
    """It draws none: the run ended in an error once it had trained."""
    picture = str(next(instance_dir.iterdir()))
    with pytest.raises(ValueError, match=r"--validation_images.*--num_inference_steps of at least 2"):
        go(validation_images=[picture], num_validation_images=1, num_inference_steps=1)


def test_the_card_log_and_header_explain_the_adapter(go, tiny_sd_path):
    """D8: diffusers writes neither card nor settings unless it pushes to the hub."""
    from huggingface_hub import ModelCard

    out = go(num_validation_images=1, num_inference_steps=1, rank=2)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "checkpoint-2", "config.local.toml", "config.toml", "loss.png", "losses.jsonl", WEIGHTS,
        "samples",
    ]  # fmt: skip
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict()["instance_prompt"] == "a sks glyph" and card.data.license is None
    for words in (tiny_sd_path.name, "samples/step-000002.png", "loss.png", "| rank | `2` |", "| seed | `0` |"):
        assert words in card.text, words
    rows = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(row["lr"] == pytest.approx(1e-2) for row in rows)
    for folder, step in ((out, 2), (out / "checkpoint-2", 2)):
        known = header(folder)
        assert known["base_model"] == tiny_sd_path.name and known["instance_prompt"] == "a sks glyph"
        assert "--rank 2" in known["command_line"] and json.loads(known["versions"])["torch"] == torch.__version__
        settings = json.loads(known["training"])
        assert (settings["step"], settings["rank"], settings["learning_rate"]) == (step, 2, 1e-2)


def test_the_card_is_read_by_the_hub(go, instance_dir, tmp_path):
    from huggingface_hub import ModelCard

    prompt = 'a sks: "glyph"'
    out = go(num_validation_images=1, num_inference_steps=1, license="openrail", validation_prompt=prompt)
    data = ModelCard.load(out / "README.md").data.to_dict()
    assert data == {
        "library_name": "apt-diffusion", "license": "openrail", "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "stable-diffusion", "apt", "approximated-prompt-tuning"],
        "instance_prompt": "a sks glyph", "widget": [{"text": prompt, "output": {"url": "samples/step-000002.png"}}],
    }  # fmt: skip
    assert (out / "samples" / "step-000002.png").is_file() and "<Gallery />" in (out / "README.md").read_text()
    config = tmp_path / "data.toml"
    folder = f"[[folders]]\ninstance_data_dir = '{instance_dir}'\n"
    config.write_text(
        f"{folder}instance_prompt = 'a [trigger] glyph'\ntrigger_word = 'zwx'\n{folder}instance_prompt = 'a qpl dog'\n"
    )
    out = go(instance_data_dir=None, instance_prompt=None, dataset_config=config)
    card = ModelCard.load(out / "README.md")
    assert card.data.instance_prompt == "a zwx glyph" and "license" not in card.data.to_dict()
    assert "- Trigger prompts: `a zwx glyph`, `a qpl dog`" in card.text


def test_a_licence_is_named_as_the_hub_names_it(go, capsys, no_models):
    with pytest.raises(SystemExit):
        go(license="Apache License 2.0")
    assert "short name of a licence, such as apache-2.0" in capsys.readouterr().err


def test_the_header_follows_modelspec(go):
    out = go(resolution=32, license="mit")
    said = {key: value for key, value in header(out).items() if key.startswith("modelspec.")}
    content = (out / WEIGHTS).read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert said == {
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion/apt",
        "modelspec.implementation": "apt-diffusion", "modelspec.implementation_version": apt.__version__,
        "modelspec.title": out.name, "modelspec.resolution": "32x32", "modelspec.trigger_phrase": "a sks glyph",
        "modelspec.license": "mit", "modelspec.prediction_type": "epsilon",
        "modelspec.hash_sha256": f"0x{hashlib.sha256(tensors).hexdigest()}",
    }  # fmt: skip


def architecture(folder) -> tuple[str, str | None]:
    """What the header would say of a base."""
    base = open_base(str(folder), None, None, None, 77)
    return base.architecture(), base.scheduler().config.get("prediction_type")


def test_families_are_named_as_modelspec_names_them(altered, tiny_sdxl_path, tiny_transformer_path):
    assert architecture(altered("unet", cross_attention_dim=768)) == ("stable-diffusion-v1", "epsilon")
    second = altered("unet", cross_attention_dim=1024)
    assert architecture(second) == ("stable-diffusion-v2-512", "epsilon")
    velocity = altered("scheduler", source=second, prediction_type="v_prediction")
    assert architecture(velocity) == ("stable-diffusion-v2-768-v", "v_prediction")
    assert architecture(tiny_sdxl_path) == ("stable-diffusion-xl-v1-base", "epsilon")
    assert architecture(tiny_transformer_path("sd3-tiny")) == ("stable-diffusion-3", None)


def test_a_checkpoint_loads_like_a_finished_adapter(go, pipe):
    out = go(max_train_steps=3, checkpointing_steps=2)
    for folder in (out / "checkpoint-2", out):
        pipe.load_apt_weights(folder, adapter_name=folder.name)
    assert pipe.get_list_apt_adapters() == {"unet": ["checkpoint-2", out.name]}


def test_without_a_seed_a_run_draws_one(go):
    first, second = go(seed=None), go(seed=None)
    assert losses(first) != losses(second)
    seeds = [json.loads((out / "checkpoint-2" / "training_state.json").read_text())["seed"] for out in (first, second)]
    assert seeds[0] != seeds[1]
    assert_same_adapter(first, go(seed=seeds[0]))


# Hub


def test_push_to_hub_passes_the_token_and_keeps_it_secret(go, monkeypatch):
    """D9: diffusers does not pass --hub_token to the upload."""
    import huggingface_hub

    calls = {}

    def create_repo(repo_id, **options):
        calls["create"] = options
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: calls.update(upload=options))
    out = go(push_to_hub=True, hub_token="hf_secret", hub_model_id="glyph")
    assert calls["create"]["token"] == "hf_secret" and calls["upload"]["token"] == "hf_secret"
    assert calls["upload"]["repo_id"] == "me/glyph" and calls["upload"]["folder_path"] == str(out)
    assert 'load_apt_weights("me/glyph")' in (out / "README.md").read_text().replace("'", '"')
    for path in out.rglob("*"):
        if path.is_file():
            assert b"hf_secret" not in path.read_bytes(), path


def test_hub_errors_come_before_training(go, monkeypatch, no_models):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise PermissionError("401 Unauthorized")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    with pytest.raises(ValueError, match=r"--push_to_hub.*nothing was started.*401"):
        go(push_to_hub=True)


def test_trackers_that_are_not_installed_are_skipped(go):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(losses(go(report_to="tensorboard"))) == 2
