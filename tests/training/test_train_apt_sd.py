"""`train_apt_sd.py` on a tiny Stable Diffusion: what it learns, from what, with which loss.

The cases of diffusers' `test_dreambooth_lora.py` are among them, with our file names.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.training_helpers import (
    DIFFUSERS_FLAGS,
    WEIGHTS,
    assert_same_adapter,
    checkpoint_names,
    header,
    losses,
    tensors,
    train,
)

UPSTREAM = {"resolution": 64, "train_batch_size": 1, "gradient_accumulation_steps": 1}
LR5 = {"learning_rate": 5.0e-04, "scale_lr": True, "lr_scheduler": "constant", "lr_warmup_steps": 0}


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


@pytest.mark.slow
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
            said = value.name if isinstance(value, Path) else value  # no paths in what is shared
            assert used[name] in (said, [said]), name
    assert used["dropout"] == 0.1


# What is trained


@pytest.mark.slow
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


@pytest.mark.slow
def test_training_lowers_the_loss(go):
    out = go(max_train_steps=60, train_batch_size=4, learning_rate=2e-2, checkpointing_steps=100)
    first, last = np.mean(losses(out)[:10]), np.mean(losses(out)[-10:])
    assert last < first - 0.02


def test_base_weights_do_not_move(go, tiny_sd_path, monkeypatch):
    import train_apt_sd

    seen = {}
    original = train_apt_sd.make_card

    def make_card(session, base, adapted, *rest):
        unet = adapted["unet"]
        seen.update({name: value.clone() for name, value in unet.state_dict().items() if ".apt" not in name})
        assert all(p.requires_grad == (".apt" in name) for name, p in unet.named_parameters())
        return original(session, base, adapted, *rest)

    monkeypatch.setattr(train_apt_sd, "make_card", make_card)
    go(learning_rate=1.0)
    from diffusers import UNet2DConditionModel

    base = UNet2DConditionModel.from_pretrained(tiny_sd_path, subfolder="unet").state_dict()
    assert base.keys() == seen.keys() and all(torch.equal(base[key], seen[key]) for key in base)


# Loss flags


@pytest.mark.slow
def test_loss_flags_act(go):
    plain = go()
    for flags in (
        {"snr_gamma": 5.0}, {"noise_offset": 0.3}, {"loss_type": "l1"}, {"loss_type": "huber"},
        {"loss_type": "huber", "huber_c": 3.0}, {"caption_dropout_rate": 0.9},
    ):  # fmt: skip
        assert losses(go(**flags)) != losses(plain), flags


@pytest.mark.slow
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
    with pytest.raises(ValueError, match="takes class labels: give --class_labels_conditioning timesteps"):
        train(model, instance_dir, tmp_path / "without")
    out = train(model, instance_dir, tmp_path / "with", class_labels_conditioning="timesteps")
    assert len(losses(out)) == 2
