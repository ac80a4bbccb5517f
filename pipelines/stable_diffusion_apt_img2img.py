"""Stable Diffusion with APT adapters: image to image.

Also a community pipeline: pass this file's path as `custom_pipeline=` to `DiffusionPipeline.from_pretrained`.
"""

from diffusers import StableDiffusionImg2ImgPipeline

from apt_diffusion.loaders import APTLoaderMixin


class StableDiffusionAPTImg2ImgPipeline(APTLoaderMixin, StableDiffusionImg2ImgPipeline):
    """[`diffusers.StableDiffusionImg2ImgPipeline`] with APT adapters; see [`APTLoaderMixin`]."""
