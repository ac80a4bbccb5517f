"""Denoisers of the shapes that people train, with random weights, and embedded ones; what each is asked in a step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _models import filled, sd15_unet
from torch import nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A frozen denoiser, and what makes its inputs.

    Args:
        make: the model, for a device.
        inputs: its keyword arguments; the first are the latents.
        deeper: a regex of the attentions in its deeper half.
        pixels: the size of a picture.
        embedded: the name of the embedded model that it is from, whose autoencoder and text encoder go with it.
    """

    make: Callable[[str], nn.Module]
    inputs: Callable[[], Inputs]
    deeper: str
    pixels: int
    embedded: str | None = None


def sdxl_unet(device: str) -> nn.Module:
    """SDXL's UNet with fewer transformer blocks."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 1, 2),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
    return filled(model, device)


def sd3_transformer(device: str) -> nn.Module:
    """SD 3.5 medium's transformer with four blocks, without its second attention."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        model = SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=4, attention_head_dim=64,
            num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
            pooled_projection_dim=2048, pos_embed_max_size=384, qk_norm="rms_norm",
        )  # fmt: skip
    return filled(model, device)


def embedded_unet(name: str, device: str) -> nn.Module:
    """An embedded model's UNet."""
    from apt_diffusion import StableDiffusionAPTPipeline

    return StableDiffusionAPTPipeline.from_pretrained(name).unet.requires_grad_(False).to(device)


def emoji_inputs() -> Inputs:
    """Four pictures of the thing and four of its class, as in a step of the demo."""
    return {
        "sample": torch.randn(8, 8, 16, 16),
        "timestep": torch.full((8,), 500),
        "encoder_hidden_states": torch.randn(8, 32, 192),
    }


def unet_inputs(latent: int, width: int, pooled: int = 0, tokens: int = 77) -> Inputs:
    """One noisy picture and its text."""
    inputs: Inputs = {
        "sample": torch.randn(1, 4, latent, latent),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, tokens, width),
    }
    if pooled:
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(1, pooled), "time_ids": torch.ones(1, 6)}
    return inputs


def sd3_inputs(latent: int) -> Inputs:
    """The same for SD3."""
    return {
        "hidden_states": torch.randn(1, 16, latent, latent),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 154, 4096),
        "pooled_projections": torch.randn(1, 2048),
    }


def moved(value: Any, device: str, dtype: torch.dtype) -> Any:
    """Inputs on the device, numbers other than the time in the model's precision."""
    if isinstance(value, dict):
        return {
            key: item.to(device) if key == "timestep" else moved(item, device, dtype) for key, item in value.items()
        }
    return value.to(device, dtype)


_UP, _LATER = r"up_blocks\..*\.attn2", r"transformer_blocks\.[23]\.attn"
EMOJI = Shape(partial(embedded_unet, "miniature-emoji"), emoji_inputs, _UP, 64, "miniature-emoji")
MINIATURE = Shape(partial(embedded_unet, "miniature"), partial(unet_inputs, 16, 128, tokens=32), _UP, 64, "miniature")
SD15_256 = Shape(sd15_unet, partial(unet_inputs, 32, 768), _UP, 256)
REAL = {
    "SD 1.5, 256 x 256": SD15_256,
    "SD 1.5, 512 x 512": Shape(sd15_unet, partial(unet_inputs, 64, 768), _UP, 512),
    "SDXL, fewer blocks, 512 x 512": Shape(sdxl_unet, partial(unet_inputs, 64, 2048, 1280), _UP, 512),
    "SD3, 4 blocks, 512 x 512": Shape(sd3_transformer, partial(sd3_inputs, 64), _LATER, 512),
}
