"""Stable Diffusion with APT adapters: image to image."""

from diffusers import StableDiffusionImg2ImgPipeline

from .mixin import APTLoaderMixin


class StableDiffusionAPTImg2ImgPipeline(APTLoaderMixin, StableDiffusionImg2ImgPipeline):
    """[`diffusers.StableDiffusionImg2ImgPipeline`] with APT adapters; see [`APTLoaderMixin`]."""
