"""Stable Diffusion with APT adapters: text to image.

Also a community pipeline: pass this file's path as `custom_pipeline=` to `DiffusionPipeline.from_pretrained`.
"""

from diffusers import StableDiffusionPipeline

from apt_diffusion.loaders import APTLoaderMixin


class StableDiffusionAPTPipeline(APTLoaderMixin, StableDiffusionPipeline):
    """[`diffusers.StableDiffusionPipeline`] with APT adapters; see [`APTLoaderMixin`]."""
