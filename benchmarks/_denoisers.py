"""Denoisers of the shapes that people train, with random weights, and embedded ones; what each is asked in a step."""

import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _models import filled, sd15_unet
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A frozen denoiser, and what makes its inputs.

    Args:
        make: the model, for a device.
        inputs: its keyword arguments; the first are the latents.
        deeper: a regex of the attentions in its deeper half.
        pixels: the size of a picture.
        encodes_text: whether diffusers' trainer encodes its text in every step, and not once before the first.
        embedded: the name of the embedded model that it is from, whose autoencoder and text encoder go with it.
    """

    make: Callable[[str], nn.Module]
    inputs: Callable[[], Inputs]
    deeper: str
    pixels: int
    encodes_text: bool = True
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
EMOJI = Shape(partial(embedded_unet, "miniature-emoji"), emoji_inputs, _UP, 64, embedded="miniature-emoji")
MINIATURE = Shape(
    partial(embedded_unet, "miniature"), partial(unet_inputs, 16, 128, tokens=32), _UP, 64, embedded="miniature"
)
SD15_256 = Shape(sd15_unet, partial(unet_inputs, 32, 768), _UP, 256)
REAL = {
    "SD 1.5, 256 x 256": SD15_256,
    "SD 1.5, 512 x 512": Shape(sd15_unet, partial(unet_inputs, 64, 768), _UP, 512),
    "SDXL, fewer blocks, 512 x 512": Shape(sdxl_unet, partial(unet_inputs, 64, 2048, 1280), _UP, 512, False),
    "SD3, 4 blocks, 512 x 512": Shape(sd3_transformer, partial(sd3_inputs, 64), _LATER, 512, False),
}
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


def groups_of(shapes: dict[str, Shape], only: str) -> Iterator[tuple[str, Shape, torch.dtype]]:
    """Each shape in each precision, with a name for its figures, if that begins with `only`.

    A group's models are freed before the next: modules are in cycles with their hooks.
    """
    for (name, shape), (label, dtype) in itertools.product(shapes.items(), PRECISIONS.items()):
        group = f"{name}, {label}"
        if group.startswith(only):
            gc.collect()
            yield group, shape, dtype


def predict(model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The denoiser's output in float32, under autocast in half precision."""
    first = next(iter(inputs.values()))
    with torch.autocast(first.device.type, dtype, enabled=dtype != torch.float32):
        return model(**inputs, return_dict=False)[0].float()


def trained_in_float32(model: nn.Module) -> list[nn.Parameter]:
    """What is trained, which stays in float32 next to a base in half precision."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters
