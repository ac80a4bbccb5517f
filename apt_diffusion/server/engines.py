"""Makes the engine of a server from its settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..convert.single_file import base_folder
from ..miniature import TEXT_TO_IMAGE, resolve_model
from ..serving.engine import Engine
from ..serving.store import AdapterStore
from .settings import ServerSettings


def with_defaults(settings: ServerSettings) -> ServerSettings:
    """The settings with an embedded model's own steps and guidance where none are named."""
    if settings.model not in TEXT_TO_IMAGE:
        return settings
    return replace(
        settings,
        num_inference_steps=settings.num_inference_steps or 15,
        guidance_scale=3.0 if settings.guidance_scale is None else settings.guidance_scale,
    )


def open_store(settings: ServerSettings) -> AdapterStore:
    """The folder of adapters, which is made where there is none."""
    folder = Path(settings.adapters).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return AdapterStore(folder)


def open_engine(settings: ServerSettings) -> Engine:
    """Loads the model and starts its engine.

    Raises:
        OSError: where the model cannot be found.
        ValueError: for one that draws no pictures, or a type of numbers that there is not.
    """
    from ..quiet import hide_torchvision_notices

    hide_torchvision_notices()
    import diffusers
    import torch

    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = settings.dtype or ("float16" if device.startswith("cuda") else "float32")
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"There is no dtype {name!r}: take float32, float16 or bfloat16.")
    place = resolve_model(base_folder(settings.model, settings.base_config))
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(place, dtype=dtype)
    return Engine(
        pipeline.to(device),
        open_store(settings),
        max_batch_size=settings.max_batch_size,
        max_queue=settings.max_queue,
        max_device_bytes=settings.max_device_bytes,
        max_pixels=settings.max_pixels,
    )
