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
