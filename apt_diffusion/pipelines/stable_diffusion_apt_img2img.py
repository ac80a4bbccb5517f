"""Stable Diffusion with APT adapters: image to image.

The path of this file is a `custom_pipeline=` for `DiffusionPipeline.from_pretrained`.
"""

from apt_diffusion.pipelines import StableDiffusionAPTImg2ImgPipeline

__all__ = ["StableDiffusionAPTImg2ImgPipeline"]
