"""Running the trainer inside the test process: importing torch and diffusers anew for each run would cost seconds."""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors import safe_open
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[2] / "train" / "train_apt_sd.py"
sys.path.insert(0, str(SCRIPT.parent))

WEIGHTS = "pytorch_apt_weights.safetensors"

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


def command(model, pictures, output, **flags):
    """A command line: small adapters, no samples and a seed unless `flags` say otherwise; `True` is a bare flag."""
    defaults = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": pictures,
        "instance_prompt": "a sks glyph",
        "output_dir": output,
        "num_prompts": 4,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "num_validation_images": 0,
        "seed": 0,
        "learning_rate": 1e-2,
        "report_to": "none",
    }
    words = []
    for name, value in (defaults | flags).items():
        if value is None or value is False:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}"] + ([] if value is True else [str(v) for v in values])
    return words


def train(model, pictures, output, **flags) -> Path:
    """Runs `main` of the trainer; see `command`."""
    import train_apt_sd

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    train_apt_sd.main(command(model, pictures, output, **flags))
    return Path(output)


def tensors(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / WEIGHTS)


def header(folder) -> dict[str, str]:
    with safe_open(Path(folder) / WEIGHTS, "pt") as file:
        return file.metadata()


def assert_same_adapter(first, second, tolerance: float | None = None) -> None:
    """Bit for bit, or up to `tolerance`."""
    a, b = tensors(first), tensors(second)
    assert a.keys() == b.keys()
    for key in a:
        if tolerance is None:
            assert torch.equal(a[key], b[key]), f"{key} differs by {(a[key] - b[key]).abs().max():.2e}"
        else:
            assert torch.allclose(a[key], b[key], rtol=0, atol=tolerance), (key, (a[key] - b[key]).abs().max())


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(folder) / "losses.jsonl").read_text().splitlines()]


def checkpoint_names(folder) -> set[str]:
    """As diffusers' tests look for them: whatever has "checkpoint" in its name."""
    return {path.name for path in Path(folder).iterdir() if "checkpoint" in path.name}
