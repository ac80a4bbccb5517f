"""`train_apt_sd.py` on a tiny Stable Diffusion: what it writes, learns, caches, and refuses.

The cases of diffusers' `test_dreambooth_lora.py` are among them, with our file names.
"""

import json
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from support.training_helpers import (
    WEIGHTS,
    assert_same_adapter,
    checkpoint_names,
    command,
    header,
    losses,
    tensors,
    train,
)

import apt_diffusion as apt

UPSTREAM = {"resolution": 64, "train_batch_size": 1, "gradient_accumulation_steps": 1}
LR5 = {"learning_rate": 5.0e-04, "scale_lr": True, "lr_scheduler": "constant", "lr_warmup_steps": 0}


@pytest.fixture
def go(tiny_sd_path, instance_dir, tmp_path):
    """Trains into a new folder, or that named by `out=`."""
    count = iter(range(100))

    def run(out=None, **flags):
        pictures = flags.pop("instance_data_dir", instance_dir)
        return train(tiny_sd_path, pictures, tmp_path / (out or f"out-{next(count)}"), **flags)

    return run


def parsed(args):
    from apt_diffusion.training.text_to_image.arguments import parse_args

    return parse_args(args)


# Flags


# With diffusers' defaults, but for the learning rate, which follows our own sweep, and the resolution.
DIFFUSERS_FLAGS = {
    "pretrained_model_name_or_path": None, "revision": None, "variant": None, "tokenizer_name": None,
    "instance_data_dir": None, "class_data_dir": None, "instance_prompt": None, "class_prompt": None,
    "validation_prompt": None, "num_validation_images": 4, "validation_epochs": 50, "with_prior_preservation": False,
    "prior_loss_weight": 1.0, "num_class_images": 100, "output_dir": "lora-dreambooth-model", "seed": None,
    "center_crop": False, "train_text_encoder": False, "train_batch_size": 4, "sample_batch_size": 4,
    "num_train_epochs": 1, "max_train_steps": None, "checkpointing_steps": 500, "checkpoints_total_limit": None,
    "resume_from_checkpoint": None, "gradient_accumulation_steps": 1, "gradient_checkpointing": False,
    "learning_rate": 1.5e-3, "scale_lr": False, "lr_scheduler": "constant", "lr_warmup_steps": 500, "lr_num_cycles": 1,
    "lr_power": 1.0, "dataloader_num_workers": 0, "use_8bit_adam": False, "adam_beta1": 0.9, "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "push_to_hub": False, "hub_token": None,
    "hub_model_id": None, "logging_dir": "logs", "allow_tf32": False, "report_to": "tensorboard",
    "mixed_precision": None, "prior_generation_precision": None, "local_rank": -1,
    "enable_xformers_memory_efficient_attention": False, "pre_compute_text_embeddings": False,
    "tokenizer_max_length": None, "text_encoder_use_attention_mask": False, "validation_images": None,
    "class_labels_conditioning": None, "rank": 4, "image_interpolation_mode": "lanczos", "lora_dropout": 0.0,
    "resolution": None,  # the model's own size, which is diffusers' 512 for Stable Diffusion 1.5
}  # fmt: skip


def test_every_flag_of_diffusers_is_here_with_its_default():
    from apt_diffusion.training.text_to_image.arguments import build_parser

    assert len(DIFFUSERS_FLAGS) == 59
    actions = {option.lstrip("-"): action for action in build_parser()._actions for option in action.option_strings}
    for name, default in DIFFUSERS_FLAGS.items():
        assert actions[name].default == default, name
    assert {name for name in DIFFUSERS_FLAGS if actions[name].required} == {
        "pretrained_model_name_or_path", "instance_data_dir", "instance_prompt",
    }  # fmt: skip
    assert actions["lora_dropout"].dest == "dropout"


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as leave:
        parsed(["--help"])
    assert leave.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "The model's own, at most 512" in printed.replace("Default: the", "The")
    from apt_diffusion.training.text_to_image.arguments import build_parser

    assert all(action.help for action in build_parser()._actions)
    assert "default: None" not in printed and "(default: 4)" in printed and "examples:" in printed


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"with_prior_preservation": True}, ValueError, "--with_prior_preservation needs --class_data_dir"),
        (
            {"with_prior_preservation": True, "class_data_dir": "x"},
            ValueError,
            "--with_prior_preservation needs --class_prompt",
        ),
        (
            {"train_text_encoder": True, "pre_compute_text_embeddings": True},
            ValueError,
            "--pre_compute_text_embeddings contradicts --train_text_encoder",
        ),
        ({"train_text_encoder": True, "cache_text_embeddings": True}, ValueError, "--cache_text_embeddings"),
        ({"report_to": "wandb", "hub_token": "hf_x"}, ValueError, "shown among the run's settings"),
        ({"enable_xformers_memory_efficient_attention": True}, ValueError, "needs xformers"),
        ({"use_8bit_adam": True}, ImportError, "needs bitsandbytes"),
        ({"report_to": "wandb"}, ImportError, "--report_to wandb needs it"),
        ({"report_to": "comet_ml"}, ImportError, "--report_to comet_ml needs it"),
        ({"no_train_unet": True}, ValueError, "nothing to train"),
        ({"text_encoder_lr": 1e-3}, ValueError, "--text_encoder_lr needs --train_text_encoder"),
        (
            {"no_train_unet": True, "train_text_encoder": True, "streams": ["context"]},
            ValueError,
            "--streams are for the UNet",
        ),
        ({"seed": -1}, ValueError, "--seed"),
        ({"validation_images": ["nowhere.png"]}, ValueError, "nowhere.png"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_read(flags, error, message, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(error) as caught:
        parsed(command("m", "d", "o", **flags))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        {"rank": 0},
        {"train_batch_size": 0},
        {"init": "zeros"},
        {"checkpoints_total_limit": 0},
        {"streams": ["value"]},
        {"dropout": 1.5},
        {"learning_rate": "nan"},
        {"learning_rate": -1.0},
        {"learning_rate": "inf"},
        {"text_encoder_lr": -1.0},
        {"lr_warmup_steps": -1},
        {"lr_num_cycles": 0},
        {"snr_gamma": 0.0},
        {"noise_offset": -0.1},
        {"prior_loss_weight": "nan"},
        {"adam_beta1": 1.0},
        {"adam_beta2": -0.1},
        {"adam_epsilon": 0.0},
        {"adam_weight_decay": -1.0},
        {"max_grad_norm": 0.0},
        {"dataloader_num_workers": -1},
        {"num_validation_images": -1},
        {"guidance_scale": "nan"},
    ],
)
def test_impossible_values_are_usage_errors(flags, capsys):
    with pytest.raises(SystemExit) as leave:
        parsed(command("m", "d", "o", **flags))
    assert leave.value.code == 2 and next(iter(flags)) in capsys.readouterr().err


def test_class_flags_without_prior_preservation_are_warned_of():
    with pytest.warns(UserWarning, match="--class_prompt has no effect without"):
        parsed(command("m", "d", "o", class_prompt="a glyph"))


def test_target_modules_are_suffixes_or_one_expression():
    from apt_diffusion.training.text_to_image.arguments import apt_config

    def targets(*values):
        return apt_config(parsed(command("m", "d", "o", target_modules=list(values)))).target_modules

    assert targets("attn1", "attn2") == ("attn1", "attn2")
    assert targets("attn2") == ("attn2",)
    assert targets(r"mid_block.*attn2") == r"mid_block.*attn2"


# Refused before a model is loaded


def test_unusable_pictures_are_refused_before_a_model_is_loaded(go, tmp_path, no_models):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no pictures in .*empty"):
        go(instance_data_dir=tmp_path / "empty")
    (tmp_path / "empty" / "broken.png").write_text("x")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        go(instance_data_dir=tmp_path / "empty")


def test_other_mistakes_are_found_before_a_model_is_loaded(go, tmp_path, no_models, instance_dir):
    with pytest.raises(ValueError, match="multiple of 4"):
        go(resolution=33)
    with pytest.raises(ValueError, match=r"checkpoint-999.*Present: none"):
        go(resume_from_checkpoint="checkpoint-999")
    with pytest.raises(OSError, match="nowhere"):
        train(tmp_path / "nowhere", instance_dir, tmp_path / "out")
    (tmp_path / "start.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"start\.png cannot be read"):
        go(validation_images=tmp_path / "start.png", num_validation_images=4)


def test_adapter_and_prompt_flags_are_checked_before_class_pictures_are_drawn(go, tmp_path, no_models):
    prior = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a glyph"}
    with pytest.raises(ValueError, match=r"attn7.*matches no module"):
        go(target_modules=["attn7"], **prior)
    with pytest.raises(ValueError, match="--tokenizer_max_length 78: this text encoder reads at most 77"):
        go(tokenizer_max_length=78, **prior)
    with pytest.raises(ValueError, match="reads no encoder states"):
        go(target_modules=["attn1"], streams=["context"], **prior)
    with pytest.raises(OSError, match="nowhere"):
        go(tokenizer_name=tmp_path / "nowhere", **prior)
    assert not (tmp_path / "class").exists()


def test_a_unet_for_inpainting_is_refused(go, tiny_sd_path, instance_dir, tmp_path, no_models):
    for part in ("unet", "vae"):
        (tmp_path / "model" / part).mkdir(parents=True)
        config = json.loads((tiny_sd_path / part / "config.json").read_text())
        config["in_channels"] = 9 if part == "unet" else 3
        (tmp_path / "model" / part / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="9 input and 4 output channels"):
        train(tmp_path / "model", instance_dir, tmp_path / "out")


# The cases of diffusers' tests


def test_dreambooth_apt(go):
    out = go(instance_prompt="photo", **UPSTREAM, **LR5)
    state = tensors(out)
    assert all(re.search(r"^unet\..*\.(apt|apt_context)\.", key) for key in state)
    assert checkpoint_names(out) == {"checkpoint-2"}
    assert_same_adapter(out, out / "checkpoint-2")


def test_dreambooth_apt_with_text_encoder(go):
    out = go(instance_prompt="photo", train_text_encoder=True, **UPSTREAM, **LR5)
    starts = {key.split(".")[0] for key in tensors(out)}
    assert starts == {"unet", "text_encoder"}


def test_dreambooth_apt_checkpoints_total_limit(go):
    out = go(max_train_steps=6, checkpoints_total_limit=2, checkpointing_steps=2)
    assert checkpoint_names(out) == {"checkpoint-4", "checkpoint-6"}


def test_dreambooth_apt_total_limit_removes_multiple_checkpoints(go):
    out = go(out="a", max_train_steps=4, checkpointing_steps=2)
    assert checkpoint_names(out) == {"checkpoint-2", "checkpoint-4"}
    go(
        out="a", max_train_steps=8, checkpointing_steps=2, resume_from_checkpoint="checkpoint-4",
        checkpoints_total_limit=2,
    )  # fmt: skip
    assert checkpoint_names(out) == {"checkpoint-6", "checkpoint-8"}


def test_the_last_step_has_a_checkpoint_whatever_the_interval(go):
    """D12. Diffusers would keep {4, 6} here; ours keeps the last step too, so that the run can be prolonged."""
    out = go(max_train_steps=7, checkpointing_steps=2, checkpoints_total_limit=2)
    assert checkpoint_names(out) == {"checkpoint-6", "checkpoint-7"}


def test_dreambooth_apt_with_flags_made_for_other_models(go):
    """Diffusers tests these on DeepFloyd IF; D4: the attention mask without pre-computed embeddings."""
    flags = {"tokenizer_max_length": 77, "text_encoder_use_attention_mask": True}
    kept = go(pre_compute_text_embeddings=True, **flags)
    anew = go(**{"no-cache_text_embeddings": True}, **flags)
    assert_same_adapter(kept, anew, tolerance=1e-5)
    plain = go()
    assert any(not torch.equal(tensors(plain)[key], value) for key, value in tensors(kept).items())
    trained = go(train_text_encoder=True, **flags)
    assert {key.split(".")[0] for key in tensors(trained)} == {"unet", "text_encoder"}


def test_a_command_line_for_diffusers_script_runs(tiny_sd_path, instance_dir, tmp_path):
    """All of its flags at once, but for those that contradict these, or need other packages, files or the hub."""
    import train_apt_sd
    from accelerate.state import AcceleratorState, GradientState

    flags = {
        "pretrained_model_name_or_path": tiny_sd_path, "tokenizer_name": tiny_sd_path / "tokenizer",
        "revision": "main",
        "instance_data_dir": instance_dir, "instance_prompt": "a sks glyph", "class_data_dir": tmp_path / "class",
        "class_prompt": "a glyph", "with_prior_preservation": True, "prior_loss_weight": 0.5, "num_class_images": 2,
        "sample_batch_size": 2, "prior_generation_precision": "fp32", "validation_prompt": "a sks glyph at night",
        "num_validation_images": 1, "validation_epochs": 1, "validation_images": sorted(instance_dir.iterdir())[0],
        "output_dir": tmp_path / "out", "seed": 3, "resolution": 16, "center_crop": True, "train_batch_size": 1,
        "num_train_epochs": 1, "max_train_steps": 2, "checkpointing_steps": 1, "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest", "gradient_accumulation_steps": 1, "gradient_checkpointing": True,
        "learning_rate": 1e-4, "scale_lr": True, "lr_scheduler": "polynomial", "lr_warmup_steps": 1,
        "lr_num_cycles": 1, "lr_power": 1.0, "dataloader_num_workers": 0, "adam_beta1": 0.9, "adam_beta2": 0.999,
        "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "logging_dir": "logs",
        "allow_tf32": True, "report_to": "tensorboard", "mixed_precision": "no", "local_rank": -1,
        "pre_compute_text_embeddings": True, "tokenizer_max_length": 20, "text_encoder_use_attention_mask": True,
        "class_labels_conditioning": "timesteps", "rank": 4, "image_interpolation_mode": "bicubic",
        "lora_dropout": 0.1,
    }  # fmt: skip
    others = {"use_8bit_adam", "enable_xformers_memory_efficient_attention", "variant", "train_text_encoder",
              "push_to_hub", "hub_token", "hub_model_id"}  # fmt: skip
    assert set(flags) | others == set(DIFFUSERS_FLAGS)
    words = [word for k, v in flags.items() for word in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    train_apt_sd.main(words)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= {WEIGHTS, "README.md", "samples", "loss.png", "checkpoint-2"}
    assert len(losses(out)) == 2 and checkpoint_names(out) == {"checkpoint-2"}
    used = json.loads(header(out)["training"])
    for name, value in flags.items():
        if name != "lora_dropout":  # whose name here is `dropout`
            assert used[name] in (value, str(value), [str(value)]), name
    assert used["dropout"] == 0.1


# What is trained


def test_parts_train_together_or_alone(go):
    assert {key.split(".")[0] for key in tensors(go(train_text_encoder=True, no_train_unet=True))} == {"text_encoder"}
    out = go(train_text_encoder=True, text_encoder_lr=0.0, out="te-frozen")
    moved = tensors(out)
    assert all(value == 0 for key, value in moved.items() if key.startswith("text_encoder") and key.endswith("gate"))
    assert any(value != 0 for key, value in moved.items() if key.startswith("unet") and key.endswith("gate"))


def test_the_text_encoder_has_its_own_learning_rate(go):
    """D10: one rate for both in diffusers. Adam's first step is as long as the rate, in every gate."""
    out = go(train_text_encoder=True, learning_rate=1e-3, text_encoder_lr=1e-5, max_train_steps=1, adam_weight_decay=0)
    gates = {key: abs(value.item()) for key, value in tensors(out).items() if key.endswith("gate")}
    for key, size in gates.items():
        assert size == pytest.approx(1e-3 if key.startswith("unet") else 1e-5, rel=0.3), key
    row = json.loads((out / "losses.jsonl").read_text().splitlines()[0])
    assert (row["lr"], row["text_encoder_lr"]) == (pytest.approx(1e-3), pytest.approx(1e-5))


def test_scale_lr_multiplies_by_batch_and_accumulation(go):
    out = go(learning_rate=1e-4, scale_lr=True, train_batch_size=2, gradient_accumulation_steps=3, max_train_steps=1)
    assert json.loads((out / "losses.jsonl").read_text())["lr"] == pytest.approx(6e-4)


def test_adapter_flags_reach_the_adapter(go):
    out = go(
        num_prompts=3, rank=2, init="paper", query_source="attn_output", streams=["query", "context"],
        target_modules=["attn2"], lora_dropout=0.25,
    )  # fmt: skip
    config = json.loads(header(out)["apt_config"])["unet"]
    assert (config["num_prompts"], config["rank"], config["init"], config["dropout"]) == (3, 2, "paper", 0.25)
    assert config["query_source"] == "attn_output" and config["streams"] == ["query", "context"]
    state = tensors(out)
    assert not any(key.endswith("gate") for key in state) and any(".apt_context." in key for key in state)
    assert {tuple(value.shape) for key, value in state.items() if key.endswith("apt.prompts")} == {(3, 64)}


def test_training_lowers_the_loss(go):
    out = go(max_train_steps=60, train_batch_size=4, learning_rate=2e-2, checkpointing_steps=100)
    first, last = np.mean(losses(out)[:10]), np.mean(losses(out)[-10:])
    assert last < first - 0.02


def test_base_weights_do_not_move(go, tiny_sd_path, monkeypatch):
    import train_apt_sd

    seen = {}
    original = train_apt_sd.make_card

    def make_card(session, learner, *rest):
        unet = learner.adapted["unet"]
        seen.update({name: value.clone() for name, value in unet.state_dict().items() if ".apt" not in name})
        assert all(p.requires_grad == (".apt" in name) for name, p in unet.named_parameters())
        return original(session, learner, *rest)

    monkeypatch.setattr(train_apt_sd, "make_card", make_card)
    go(learning_rate=1.0)
    from diffusers import UNet2DConditionModel

    base = UNet2DConditionModel.from_pretrained(tiny_sd_path, subfolder="unet").state_dict()
    assert base.keys() == seen.keys() and all(torch.equal(base[key], seen[key]) for key in base)


# Data flags


def test_captions_change_the_training(go, instance_dir, tmp_path):
    captioned = tmp_path / "captioned"
    captioned.mkdir()
    for path in instance_dir.iterdir():
        (captioned / path.name).write_bytes(path.read_bytes())
        (captioned / path.name).with_suffix(".txt").write_text("a sks glyph")
    same = go(instance_data_dir=captioned)
    assert_same_adapter(same, go())
    (captioned / "picture-0.txt").write_text("a sks glyph on grass")
    other = go(instance_data_dir=captioned, max_train_steps=3)
    with pytest.raises(AssertionError):
        assert_same_adapter(other, go(max_train_steps=3))


def test_foreign_files_beside_the_pictures_do_no_harm(go, instance_dir, tmp_path):
    """D3: these crash diffusers' script in the middle of a run."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in instance_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "readme.txt").write_text("x")
    (folder / ".ipynb_checkpoints").mkdir()
    assert_same_adapter(go(instance_data_dir=folder), go())


@pytest.fixture
def wide_pictures(tmp_path):
    folder = tmp_path / "wide"
    folder.mkdir()
    for index, size in enumerate([(40, 80), (80, 40), (33, 32)]):
        pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((size[1], size[0])).save(folder / f"{index}.png")
    return folder


def test_cached_latents_and_embeddings_are_those_of_every_step(go, wide_pictures):
    flags = {"instance_data_dir": wide_pictures, "random_flip": True, "max_train_steps": 6}
    cached = go(**flags)
    anew = go(**{"no-cache_latents": True, "no-cache_text_embeddings": True}, **flags)
    assert_same_adapter(cached, anew, tolerance=2e-4)
    assert np.allclose(losses(cached), losses(anew), atol=1e-4)


def test_frozen_parts_are_let_go_after_caching(go, monkeypatch):
    import gc
    import weakref

    import train_apt_sd

    from apt_diffusion.training.text_to_image.stable_diffusion import StableDiffusionBase

    alive = {}

    def watch(part):
        original = getattr(StableDiffusionBase, part)

        def load(self, *args):
            model = original(self, *args)
            alive[part] = weakref.ref(model)
            return model

        monkeypatch.setattr(StableDiffusionBase, part, load)

    watch("vae")
    watch("text_encoder")
    original = train_apt_sd.training_loss

    def loss(*args):
        gc.collect()
        assert alive["vae"]() is None and alive["text_encoder"]() is None
        return original(*args)

    monkeypatch.setattr(train_apt_sd, "training_loss", loss)
    go()


def test_cropping_flags_change_what_is_seen(go, wide_pictures):
    flags = {"instance_data_dir": wide_pictures, "max_train_steps": 4}
    plain = losses(go(**flags))
    assert losses(go(center_crop=True, **flags)) != plain
    assert losses(go(random_flip=True, **flags)) != plain
    assert losses(go(image_interpolation_mode="nearest", **flags)) != plain


def test_epochs_and_repeats_set_the_number_of_steps(go):
    assert len(losses(go(max_train_steps=None, num_train_epochs=2, train_batch_size=2))) == 6  # ceil(5 / 2) twice
    assert len(losses(go(max_train_steps=None, repeats=2, train_batch_size=2, gradient_accumulation_steps=2))) == 3


def test_the_resolution_follows_the_model(go, tiny_sd_path):
    from apt_diffusion.training.text_to_image.stable_diffusion import StableDiffusionBase

    out = go()
    assert json.loads(header(out)["training"])["resolution"] == 32
    base = StableDiffusionBase(str(tiny_sd_path))
    base.native_resolution = 768
    assert base.check_resolution(None) == 512 and base.check_resolution(768) == 768


# Loss flags


def test_loss_flags_act(go):
    plain = go()
    for flags in (
        {"snr_gamma": 5.0}, {"noise_offset": 0.3}, {"loss_type": "l1"}, {"loss_type": "huber"},
        {"loss_type": "huber", "huber_c": 3.0}, {"caption_dropout_rate": 0.9},
    ):  # fmt: skip
        assert losses(go(**flags)) != losses(plain), flags


def test_accumulation_equals_a_larger_batch(go):
    large = go(train_batch_size=4, max_train_steps=3)
    accumulated = go(train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=3)
    assert_same_adapter(large, accumulated, tolerance=1e-5)
    assert np.allclose(losses(large), losses(accumulated), atol=1e-6)


def test_gradient_checkpointing_changes_memory_only(go):
    plain = go(train_text_encoder=True)
    assert_same_adapter(plain, go(train_text_encoder=True, gradient_checkpointing=True), tolerance=1e-6)


def test_bf16_trains_float32_adapters_beside_half_precision_weights(go):
    out = go(mixed_precision="bf16", train_text_encoder=True, num_validation_images=1, num_inference_steps=2)
    assert all(value.dtype == torch.float32 for value in tensors(out).values())
    assert np.allclose(losses(out), losses(go(train_text_encoder=True)), rtol=0.03)


def test_velocity_prediction(go, tiny_sd_path, instance_dir, tmp_path):
    import shutil

    model = shutil.copytree(tiny_sd_path, tmp_path / "v-model")
    file = model / "scheduler" / "scheduler_config.json"
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    out = train(model, instance_dir, tmp_path / "v", num_validation_images=1, num_inference_steps=2)
    assert losses(out) != losses(go())


def test_class_labels_conditioning(go, tiny_sd_path, instance_dir, tmp_path):
    import shutil

    from diffusers import UNet2DConditionModel

    model = shutil.copytree(tiny_sd_path, tmp_path / "labelled")
    config = json.loads((model / "unet" / "config.json").read_text())
    unet = UNet2DConditionModel.from_config(config | {"class_embed_type": "timestep"})
    unet.save_pretrained(model / "unet")
    with pytest.raises(ValueError, match="class_labels should be provided"):
        train(model, instance_dir, tmp_path / "without")
    out = train(model, instance_dir, tmp_path / "with", class_labels_conditioning="timesteps")
    assert len(losses(out)) == 2


# Prior preservation


def test_missing_class_pictures_are_drawn_and_kept(go, tmp_path):
    folder = tmp_path / "class"
    flags = {
        "with_prior_preservation": True, "class_data_dir": folder, "class_prompt": "a glyph", "num_class_images": 3,
        "num_inference_steps": 2, "sample_batch_size": 2,
    }  # fmt: skip
    first = go(**flags)
    drawn = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(name.split("-")[0] for name in drawn) == ["0", "1", "2"]
    assert_same_adapter(first, go(**flags))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == drawn
    lost = sorted(drawn)[2]
    (folder / lost).unlink()
    go(**flags)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == drawn  # picture i depends on the seed and i
    weighted = go(prior_loss_weight=0.0, **flags)
    plain = go(**(flags | {"with_prior_preservation": False, "class_data_dir": None, "class_prompt": None}))
    assert np.allclose(losses(weighted), losses(plain), atol=1e-5)
    assert not np.allclose(losses(weighted), losses(first), atol=1e-2)


def test_foreign_files_among_class_pictures_are_named_once(go, tmp_path, caplog):
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (32, 32), "blue").save(folder / "0.png")
    (folder / "Thumbs.db").write_bytes(b"x")
    go(with_prior_preservation=True, class_data_dir=folder, class_prompt="a glyph", num_class_images=1)
    assert caplog.text.count("Thumbs.db") == 1


def test_class_pictures_may_have_captions(go, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    for index in range(2):
        Image.new("RGB", (32, 32), "blue").save(folder / f"{index}.png")
    flags = {"with_prior_preservation": True, "class_data_dir": folder, "class_prompt": "a glyph"}
    plain = go(num_class_images=2, **flags)
    (folder / "0.txt").write_text("a blue square")
    assert losses(go(num_class_images=2, **flags)) != losses(plain)
    assert json.loads((plain / "checkpoint-2" / "training_state.json").read_text())["position"] == 4


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


def test_the_card_log_and_header_explain_the_adapter(go, tiny_sd_path):
    """D8: diffusers writes neither card nor settings unless it pushes to the hub."""
    from huggingface_hub import ModelCard

    out = go(num_validation_images=1, num_inference_steps=1, rank=2)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "checkpoint-2", "loss.png", "losses.jsonl", WEIGHTS, "samples",
    ]  # fmt: skip
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict()["instance_prompt"] == "a sks glyph" and card.data.license is None
    for words in (str(tiny_sd_path), "samples/step-000002.png", "loss.png", "| rank | `2` |", "| seed | `0` |"):
        assert words in card.text, words
    rows = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(row["lr"] == pytest.approx(1e-2) for row in rows)
    for folder, step in ((out, 2), (out / "checkpoint-2", 2)):
        known = header(folder)
        assert known["base_model"] == str(tiny_sd_path) and known["instance_prompt"] == "a sks glyph"
        assert "--rank 2" in known["command_line"] and json.loads(known["versions"])["torch"] == torch.__version__
        settings = json.loads(known["training"])
        assert (settings["step"], settings["rank"], settings["learning_rate"]) == (step, 2, 1e-2)


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
