"""Stable Diffusion XL with APT adapters: text to image."""

from diffusers import StableDiffusionXLPipeline

from .mixin import APTLoaderMixin


class StableDiffusionXLAPTPipeline(APTLoaderMixin, StableDiffusionXLPipeline):
    """[`diffusers.StableDiffusionXLPipeline`] with APT adapters; see [`APTLoaderMixin`]."""
