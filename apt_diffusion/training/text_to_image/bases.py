"""Determines whether a model name or folder is a Stable Diffusion or a Stable Diffusion XL."""

from typing import Any

from diffusers import DiffusionPipeline, UNet2DConditionModel

from ...miniature import resolve_model
from .stable_diffusion import StableDiffusionBase, load_config
from .stable_diffusion_3 import StableDiffusion3Base
from .stable_diffusion_xl import StableDiffusionXLBase


def open_base(
    name_or_path: str,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    max_sequence_length: int = StableDiffusion3Base.max_sequence_length,
) -> StableDiffusionBase:
    """The base model of this name: Stable Diffusion 3 by its pipeline's name, XL where its UNet takes pooled text.

    Args:
        name_or_path, revision, variant, vae: see `StableDiffusionBase`.
        max_sequence_length: tokens that T5 reads, where there is one.

    Raises:
        ValueError: for a model of another family, or one whose UNet takes more than these.
        OSError: for a model that is not there.
    """
    path = resolve_model(name_or_path)
    pipeline = _pipeline_of(path, revision)
    if pipeline.get("_class_name", "").startswith("StableDiffusion3"):
        base = StableDiffusion3Base(name_or_path, revision, variant, vae)
        base.max_sequence_length = max_sequence_length
        return base
    if "transformer" in pipeline and "unet" not in pipeline:
        raise ValueError(
            f"{name_or_path} is a {pipeline['_class_name']}, whose denoiser is a diffusion transformer: this trainer "
            "takes Stable Diffusion 1, 2, XL, 3 and 3.5."
        )
    unet = load_config(UNet2DConditionModel, path, subfolder="unet", revision=revision)
    added = unet.get("addition_embed_type")
    if added not in (None, "text_time") or unet.get("encoder_hid_dim_type") is not None:
        raise ValueError(
            f"{name_or_path} has a UNet with further inputs (addition_embed_type {added!r}, encoder_hid_dim_type "
            f"{unet.get('encoder_hid_dim_type')!r}): this trainer takes Stable Diffusion 1, 2 and XL."
        )
    kind = StableDiffusionXLBase if added == "text_time" else StableDiffusionBase
    return kind(name_or_path, revision, variant, vae)


def _pipeline_of(path: str, revision: str | None) -> dict[str, Any]:
    """`model_index.json`, empty where there is none."""
    try:
        return DiffusionPipeline.load_config(path, revision=revision)
    except OSError:  # a part that is missing is named later
        return {}
