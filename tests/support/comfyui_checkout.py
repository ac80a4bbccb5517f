"""A real ComfyUI checkout in this process, on the CPU: what the scripts beside this file begin with.

python SCRIPT COMFYUI_PATH FOLDER
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
COMFYUI, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
sys.argv = sys.argv[:1]
sys.path[:0] = [str(COMFYUI), str(ROOT / "integrations")]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)
import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True


def report(name: str, ours: torch.Tensor, reference: torch.Tensor, base: torch.Tensor) -> None:
    """The largest difference from diffusers' picture, and the adapter's effect."""
    print(json.dumps({
        "name": name, "difference": (ours - reference).abs().max().item(),
        "effect": (reference - base).abs().max().item(),
    }))  # fmt: skip
