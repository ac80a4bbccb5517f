"""Stable Diffusion 1.5's shapes with random weights, and copies of a model that share them."""

import copy
from typing import Any

import torch
from torch import nn


def filled(model: nn.Module, device: str) -> nn.Module:
    """A model made on the meta device, on `device` with small random weights; its norms are the identity."""
    model = model.to_empty(device=device).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.uniform_(-0.02, 0.02)
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
        elif name.endswith("token_type_ids"):
            buffer.zero_()
    return model


def sd15_unet(device: str = "cpu") -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    return filled(model, device)


def sd15_text_encoder(device: str = "cpu") -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        model = CLIPTextModel(config)
    return filled(model, device)


def sd15_vae(device: str = "cpu", latent_channels: int = 4) -> nn.Module:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=latent_channels,
            sample_size=512,
        )
    return filled(model, device)


def vilt_b32(device: str = "cpu") -> nn.Module:
    from transformers import ViltConfig, ViltModel

    with torch.device("meta"):
        model = ViltModel(ViltConfig(image_size=384))
    return filled(model, device)


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares every weight of `model`, to attach something else to."""
    return copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})


def randomized(model: nn.Module, part: str) -> nn.Module:
    """Gives every parameter whose name contains `part` a small random value: a trained adapter is not zero."""
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.data.uniform_(-0.01, 0.01)
    return model


def with_lora(model: nn.Module, rank: int = 4, adapter_name: str = "default", **settings: Any) -> nn.Module:
    """PEFT's LoRA where diffusers' DreamBooth script puts it, in `model` itself."""
    from peft import inject_adapter_in_model

    return inject_adapter_in_model(lora_config(rank, **settings), model, adapter_name)


def lora_config(rank: int = 4, **settings: Any) -> Any:
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets, **settings)
