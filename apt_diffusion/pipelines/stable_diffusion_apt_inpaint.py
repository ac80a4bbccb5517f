"""Stable Diffusion with APT adapters: inpainting.

The path of this file is a `custom_pipeline=` for `DiffusionPipeline.from_pretrained`.
"""

from apt_diffusion.pipelines import StableDiffusionAPTInpaintPipeline

__all__ = ["StableDiffusionAPTInpaintPipeline"]
