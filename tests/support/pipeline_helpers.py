"""Tiny pipelines of every kind that APT works in, and what they draw."""

import numpy as np
import torch
from conftest import make_unet

import apt_diffusion as apt
from apt_diffusion.api import hidden_apt
from apt_diffusion.pipelines.mixin import APTLoaderMixin

SMALL = apt.APTConfig(num_prompts=6, rank=2, query_source="attn_output", streams=["query", "context"])
PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
MASK = torch.ones(1, 1, 16, 16)
MASK[..., :8] = 0

SIZE = {"height": 16, "width": 16}
INPUTS = {
    "StableDiffusionAPTPipeline": SIZE,
    "StableDiffusionAPTImg2ImgPipeline": {"image": PICTURE, "strength": 1.0},
    "StableDiffusionAPTInpaintPipeline": {
        "image": PICTURE, "mask_image": MASK, "strength": 1.0, "latents": NOISE, **SIZE,
    },
    "StableDiffusionXLAPTPipeline": SIZE,
}  # fmt: skip
CONTROLNETS = {  # the mixin on a pipeline of diffusers, and a pipeline of diffusers as it is
    "ControlNet": "StableDiffusionControlNetPipeline",
    "XL ControlNet": "StableDiffusionXLControlNetPipeline",
    "stock ControlNet": "StableDiffusionControlNetPipeline",
}
KINDS = (*INPUTS, *CONTROLNETS)


def make_pipe(kind, sd_path, sdxl_path):
    """One of `KINDS`, quiet."""
    import diffusers

    stock = getattr(diffusers, CONTROLNETS.get(kind, ""), None)
    xl = "XL" in kind
    name = kind if stock is None else "StableDiffusionXLAPTPipeline" if xl else "StableDiffusionAPTPipeline"
    pipeline = getattr(apt, name).from_pretrained(sdxl_path if xl else sd_path)
    pipeline.set_progress_bar_config(disable=True)
    if stock is None:
        return pipeline
    cls = stock if kind.startswith("stock") else type("Controlled", (APTLoaderMixin, stock), {})
    return convert(cls, pipeline, controlnet=make_controlnet(pipeline.unet))


def make_controlnet(unet=None):
    """Its published form starts at zero; this one acts."""
    from diffusers import ControlNetModel

    torch.manual_seed(4)
    unet = make_unet() if unet is None else unet
    with hidden_apt(unet):
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 32))
    for module in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(module.weight, std=0.1)
    return controlnet


def draw(pipeline, prompt="a sks glyph", inputs=None, **kwargs):
    """Pictures, with noise that is the same for every image of a batch."""
    inputs = INPUTS.get(type(pipeline).__name__, {"image": PICTURE}) if inputs is None else inputs
    count = len(kwargs.get("apt_adapter_names", [0])) * kwargs.get("num_images_per_prompt", 1)
    if "latents" in inputs:
        inputs = inputs | {"latents": inputs["latents"].repeat(count, 1, 1, 1).to(pipeline.vae.dtype)}
    generators = [torch.Generator().manual_seed(0) for _ in range(count)]
    return pipeline(
        prompt,
        num_inference_steps=2,
        generator=generators if count > 1 else generators[0],
        output_type="np",
        **inputs,
        **kwargs,
    ).images


def differ(first, second):
    return np.abs(first - second).max() > 1e-3


def convert(cls, pipeline, **components):
    other = cls.from_pipe(pipeline, **components)
    other.set_progress_bar_config(disable=True)
    return other
