"""Flags of `train_apt_sd.py`, and what is refused before a model is loaded."""

import json

import pytest
from support.training_helpers import (
    DIFFUSERS_FLAGS,
    command,
    train,
)


def parsed(args):
    from apt_diffusion.training.text_to_image.arguments import parse_args

    return parse_args(args)


def test_every_flag_of_diffusers_is_here_with_its_default():
    from apt_diffusion.training.text_to_image.arguments import build_parser

    assert len(DIFFUSERS_FLAGS) == 59
    actions = {option.lstrip("-"): action for action in build_parser()._actions for option in action.option_strings}
    for name, default in DIFFUSERS_FLAGS.items():
        assert actions[name].default == default, name
    assert {name for name in DIFFUSERS_FLAGS if actions[name].required} == {"pretrained_model_name_or_path"}
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
            "--streams are for the denoiser",
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
