"""Python that draws the pictures of the page elsewhere."""

from typing import Any

from ..pipelines.samplers import OWN, samplers_for
from .library import download_name, slug
from .order import Order


def pipeline_name(name: str, order: Order) -> str:
    """The class that draws an order, next to the one that draws from noise: for a start picture, or for a mask."""
    if order.picture is None:
        return name
    return name.removesuffix("Pipeline") + ("InpaintPipeline" if order.mask is not None else "Img2ImgPipeline")


def call_settings(order: Order) -> dict[str, Any]:
    """The pipeline's arguments as the page and `python_code` use them."""
    settings: dict[str, Any] = {
        "prompt": order.prompt,
        "negative_prompt": order.negative_prompt or None,
        "num_inference_steps": order.steps,
        "guidance_scale": order.guidance,
        "num_images_per_prompt": order.count,
    }
    if order.picture is None or order.mask is not None:
        settings |= {"width": order.width, "height": order.height}
    if order.picture is not None:
        settings["strength"] = order.change
    return settings


def python_code(painter: Any, order: Order) -> str:
    """Python that draws the same pictures, pixel by pixel, where the adapters' files lie in the current folder."""
    place = "" if painter.device == "cpu" else f", dtype={painter.dtype}).to({painter.device!r}"
    task = "mask" if order.mask is not None else "picture" if order.picture is not None else ""
    pipeline = pipeline_name(type(painter.pipe).__name__, order)
    lines = ["import torch", f"from apt_diffusion import {pipeline}"]
    if task:
        lines.append("from PIL import Image")
    own_sampler = order.sampler in ("", OWN)
    if not own_sampler:
        kind, changes = samplers_for(painter.pipe.scheduler)[order.sampler]
        lines.append(f"from diffusers import {kind}")
    lines += ["", f"pipe = {pipeline}.from_pretrained({painter.model!r}{place})"]
    if not own_sampler:
        changed = "".join(f", {key}={value!r}" for key, value in changes.items())
        lines.append(f"pipe.scheduler = {kind}.from_config(pipe.scheduler.config{changed})")
    names = [f"{slug(adapter.name)}-{index}" for index, (adapter, _) in enumerate(order.adapters, start=1)]
    for name, (adapter, _) in zip(names, order.adapters, strict=True):
        lines.append(f"pipe.load_apt_weights({download_name(adapter.name)!r}, adapter_name={name!r})")
    if order.adapters:
        lines.append(f"pipe.set_apt_adapters({names!r}, {[order.weight(weight) for _, weight in order.adapters]!r})")
    lines += ["", f"seeds = {order.seeds}", "images = pipe("]
    call = [f"{key}={value!r}," for key, value in call_settings(order).items() if value is not None]
    if order.adapters and order.strength != 1:
        call.append(f"apt_scale={order.strength!r},")
    if task:
        call.append('image=Image.open("start.png"),')
    if task == "mask":
        call.append('mask_image=Image.open("mask.png"),')
    call.append("generator=[torch.Generator().manual_seed(seed) for seed in seeds],")
    lines += [*(f"    {line}" for line in call), ").images"]
    lines += ["for seed, image in zip(seeds, images):", '    image.save(f"seed-{seed}.png")']
    return "\n".join(lines) + "\n"
