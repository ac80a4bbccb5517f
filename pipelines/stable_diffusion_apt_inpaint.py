"""Stable Diffusion with APT adapters: inpainting.

Also a community pipeline: pass this file's path as `custom_pipeline=` to `DiffusionPipeline.from_pretrained`.
"""

from diffusers import StableDiffusionInpaintPipeline

from apt_diffusion.loaders import APTLoaderMixin


class StableDiffusionAPTInpaintPipeline(APTLoaderMixin, StableDiffusionInpaintPipeline):
    """[`diffusers.StableDiffusionInpaintPipeline`] with APT adapters; see [`APTLoaderMixin`]."""
