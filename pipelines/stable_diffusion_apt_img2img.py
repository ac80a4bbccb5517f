"""Community pipeline: pass the path of this file as `custom_pipeline=` to `DiffusionPipeline.from_pretrained`."""

from apt_diffusion.pipelines.stable_diffusion_apt_img2img import StableDiffusionAPTImg2ImgPipeline

__all__ = ["StableDiffusionAPTImg2ImgPipeline"]
