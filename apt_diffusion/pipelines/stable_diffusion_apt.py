"""Stable Diffusion with APT adapters: text to image.

The path of this file is a `custom_pipeline=` for `DiffusionPipeline.from_pretrained`.
"""

from apt_diffusion.pipelines import StableDiffusionAPTPipeline

__all__ = ["StableDiffusionAPTPipeline"]
