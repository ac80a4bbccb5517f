"""What a run says before its first step of flags and texts that do not do what somebody may expect."""

import pytest
from support.training_helpers import train


@pytest.fixture
def said(tiny_sd_path, instance_dir, tmp_path, caplog):
    def run(**flags):
        train(tiny_sd_path, instance_dir, tmp_path / "out", **flags)
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lr_warmup_steps": 3}, "--lr_warmup_steps needs a --lr_scheduler with a warm-up"),
        ({"lr_num_cycles": 3}, "--lr_num_cycles needs --lr_scheduler cosine_with_restarts"),
        ({"lr_power": 2.0}, "--lr_power needs --lr_scheduler polynomial"),
        ({"checkpointing_steps": 7}, "--checkpointing_steps is more than the 2 steps of the run"),
        ({"hub_model_id": "me/dog"}, "--hub_model_id needs --push_to_hub"),
        ({"num_class_images": 3}, "--num_class_images needs --with_prior_preservation"),
        ({"prior_loss_weight": 0.3}, "--prior_loss_weight needs --with_prior_preservation"),
        (
            {"cache_encoder_outputs": "kept", "no-cache_latents": True, "train_text_encoder": True},
            "--cache_encoder_outputs needs --cache_latents or --cache_text_embeddings",
        ),
        (
            {"group_offload": True, "gradient_checkpointing": True},
            "--group_offload is for accelerators: on a CPU it only copies weights",
        ),
        ({"validation_steps": 1}, "--validation_steps needs --validation_prompt"),
        ({"validation_epochs": 1}, "--validation_epochs needs --validation_prompt"),
        ({"validation_prompt": "x"}, "--validation_prompt draws nothing with --num_validation_images 0"),
        (
            {"validation_prompt": "x", "num_validation_images": 1, "num_inference_steps": 1, "validation_steps": 2},
            "--validation_steps is not below the 2 steps of the run",
        ),
        (
            {"class_labels_conditioning": "timesteps"},
            "--class_labels_conditioning needs a UNet with a class embedding",
        ),
    ],
)
def test_a_flag_that_cannot_take_effect_is_named(said, flags, message):
    (warning,) = said(**flags)
    assert warning == f"Without effect in this run: {message}" + warning[warning.index(message) + len(message) :]


def test_flags_that_do_and_defaults_are_not(said):
    """The default of --lr_warmup_steps is 500, that of --checkpointing_steps too."""
    assert said(max_train_steps=2, lr_scheduler="constant") == []


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant_with_warmup"])
def test_a_warm_up_longer_than_the_run_is_said(said, scheduler):
    (warning,) = said(lr_scheduler=scheduler)
    assert "warm-up of 500 steps is as long as the run of 2 steps or longer" in warning
    assert "Lower --lr_warmup_steps" in warning


def test_a_warm_up_within_the_run_is_not(said):
    assert said(lr_scheduler="linear", lr_warmup_steps=1) == []


def test_captions_that_are_cut_are_named_before_models_load(tiny_sd_path, instance_dir, tmp_path, caplog, no_models):
    import shutil

    pictures = shutil.copytree(instance_dir, tmp_path / "pictures")
    (pictures / "picture-1.txt").write_text("a very long caption " * 5 + "in the style of sks")
    (pictures / "picture-2.txt").write_text("short")
    with pytest.raises(AssertionError, match="a model was loaded"):
        train(tiny_sd_path, pictures, tmp_path / "out")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("1 of 7 texts are longer than the 77 tokens that the model reads")
    assert "picture-1.png loses 'ption in the style of sks'" in warning
    assert warning.count("loses") == 1 and "picture-2" not in warning


def test_a_shorter_maximum_cuts_more(tiny_sd_path, instance_dir, tmp_path, caplog, no_models):
    with pytest.raises(AssertionError, match="a model was loaded"):
        train(tiny_sd_path, instance_dir, tmp_path / "out", tokenizer_max_length=8)
    assert "picture-0.png loses 'yph'" in caplog.text
