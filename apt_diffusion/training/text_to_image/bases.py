"""Determines the family of a model name or folder: a Stable Diffusion, Flux, Qwen-Image or Z-Image."""

import re
from typing import Any

from diffusers import DiffusionPipeline, UNet2DConditionModel

from ...miniature import resolve_model
from .flow_transformer import FlowTransformerBase
from .flux import FluxBase
from .flux_2 import Flux2Base, Flux2KleinBase
from .qwen_image import QwenImageBase
from .stable_diffusion import StableDiffusionBase, load_config
from .stable_diffusion_3 import StableDiffusion3Base
from .stable_diffusion_xl import StableDiffusionXLBase
from .z_image import ZImageBase

# What stands before "Pipeline" in the names of text-to-image pipelines and of those that share their modules.
FAMILIES: dict[str, type[FlowTransformerBase]] = {
    "Flux": FluxBase,
    "Flux2": Flux2Base,
    "Flux2Klein": Flux2KleinBase,
    "QwenImage": QwenImageBase,
    "ZImage": ZImageBase,
}
SIBLINGS = re.compile(r"(APT)?(Img2Img|Inpaint)?Pipeline$")


def open_base(
    name_or_path: str,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    max_sequence_length: int | None = None,
) -> StableDiffusionBase:
    """The base model of this name: a transformer's by its pipeline's name, XL where its UNet takes pooled text.

    Args:
        name_or_path, revision, variant, vae: see `StableDiffusionBase`.
        max_sequence_length: tokens that a text encoder beside CLIP reads; as many as its pipeline lets it if `None`.

    Raises:
        ValueError: for a model of another family, one whose UNet takes more than these, or too many tokens.
        OSError: for a model that is not there.
    """
    path = resolve_model(name_or_path)
    pipeline = _pipeline_of(path, revision)
    name = pipeline.get("_class_name", "")
    kind: Any = StableDiffusion3Base if name.startswith("StableDiffusion3") else FAMILIES.get(SIBLINGS.sub("", name))
    if kind is not None:
        base = kind(name_or_path, revision, variant, vae)
        if max_sequence_length is not None:
            if base.longest_sequence is not None and max_sequence_length > base.longest_sequence:
                raise ValueError(
                    f"--max_sequence_length {max_sequence_length}: {base.family} reads at most "
                    f"{base.longest_sequence} tokens."
                )
            base.max_sequence_length = max_sequence_length
        return base
    if "transformer" in pipeline and "unet" not in pipeline:
        raise ValueError(
            f"{name_or_path} is a {pipeline['_class_name']}, whose denoiser is a diffusion transformer: this trainer "
            "takes Stable Diffusion 1, 2, XL, 3 and 3.5, Flux.1, Flux.2, Qwen-Image and Z-Image."
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
