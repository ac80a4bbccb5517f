"""Community pipeline: pass the path of this file as `custom_pipeline=` to `DiffusionPipeline.from_pretrained`."""

from apt_diffusion.pipelines import StableDiffusionXLAPTPipeline

__all__ = ["StableDiffusionXLAPTPipeline"]
