"""Stable Diffusion XL with APT adapters: text to image.

Also a community pipeline: pass this file's path as `custom_pipeline=` to `DiffusionPipeline.from_pretrained`.
"""

from diffusers import StableDiffusionXLPipeline

from apt_diffusion.loaders import APTLoaderMixin


class StableDiffusionXLAPTPipeline(APTLoaderMixin, StableDiffusionXLPipeline):
    """[`diffusers.StableDiffusionXLPipeline`] with APT adapters; see [`APTLoaderMixin`]."""
