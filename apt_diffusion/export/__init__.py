"""Exports a denoiser with APT for other runtimes: ONNX, or a program of `torch.export`; see docs/export.md.

`export_denoiser` writes a folder, `ExportedModel` runs it in place of the denoiser of a pipeline, and `write_inputs`
gives a graph whose adapter is an input further adapters. The command is `apt-diffusion export`.
"""

from .inputs import adapter_inputs, base_inputs, write_inputs
from .manifest import Manifest
from .running import ExportedModel
from .writing import check_libraries, export_denoiser

__all__ = [
    "ExportedModel",
    "Manifest",
    "adapter_inputs",
    "base_inputs",
    "check_libraries",
    "export_denoiser",
    "write_inputs",
]
