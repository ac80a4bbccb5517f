#!/usr/bin/env python
"""Seconds from the trainer's command to the end of its first step, beside the imports that no trainer can do without.

    python benchmarks/startup.py

The command trains the embedded model for one step, in a fresh process each time. Beside it stands a process that only
imports PyTorch, transformers' CLIP and diffusers' UNet, autoencoder and pipeline. Both take turns; the first round,
which fills the caches of the disk, does not count.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTS = (
    "import diffusers.training_utils; from transformers import CLIPTextModel, CLIPTokenizer; "
    "from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel"
)


def seconds(command: list[str]) -> float:
    """Wall-clock time of a process."""
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - begun


def training(folder: str) -> list[str]:
    """The trainer's command for one step."""
    flags = {
        "pretrained_model_name_or_path": "miniature",
        "instance_data_dir": "examples/subject",
        "instance_prompt": "a sks glyph",
        "output_dir": folder,
        "max_train_steps": "1",
        "num_validation_images": "0",
        "report_to": "none",
    }
    return [sys.executable, "train/train_apt_sd.py", *(f"--{name}={value}" for name, value in flags.items())]


def main() -> None:
    """Prints medians of both and of their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="that count (default: %(default)s)")
    rounds = parser.parse_args().rounds
    rows = []
    for _ in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            rows.append((seconds(training(f"{folder}/out")), seconds([sys.executable, "-c", IMPORTS])))
    rows = rows[1:]
    whole, imports = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(a / b for a, b in rows)
    print(f"command with one step {whole:.1f} s, imports alone {imports:.1f} s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
