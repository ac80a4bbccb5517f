"""Stable Diffusion with APT adapters: text to image."""

from diffusers import StableDiffusionPipeline

from .mixin import APTLoaderMixin


class StableDiffusionAPTPipeline(APTLoaderMixin, StableDiffusionPipeline):
    """[`diffusers.StableDiffusionPipeline`] with APT adapters; see [`APTLoaderMixin`]."""
