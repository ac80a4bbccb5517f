"""Stable Diffusion with APT adapters: inpainting."""

from diffusers import StableDiffusionInpaintPipeline

from .mixin import APTLoaderMixin


class StableDiffusionAPTInpaintPipeline(APTLoaderMixin, StableDiffusionInpaintPipeline):
    """[`diffusers.StableDiffusionInpaintPipeline`] with APT adapters; see [`APTLoaderMixin`]."""
