"""Which kind of base model a name stands for."""

from diffusers import UNet2DConditionModel

from ...miniature import resolve_model
from .stable_diffusion import StableDiffusionBase
from .stable_diffusion_xl import StableDiffusionXLBase


def open_base(
    name_or_path: str, revision: str | None = None, variant: str | None = None, vae: str | None = None
) -> StableDiffusionBase:
    """The base model of this name; it is an SDXL where its UNet asks for pooled text and sizes."""
    unet = UNet2DConditionModel.load_config(resolve_model(name_or_path), subfolder="unet", revision=revision)
    kind = StableDiffusionXLBase if unet.get("addition_embed_type") == "text_time" else StableDiffusionBase
    return kind(name_or_path, revision, variant, vae)
