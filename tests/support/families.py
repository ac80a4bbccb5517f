"""The architectures that APT promises the same of: how a tiny one is made and run, and how two are compared."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from conftest import make_meter, make_text_encoder, make_unet, meter_inputs

import apt_diffusion as apt


@dataclass
class Family:
    make: Callable[[], torch.nn.Module]
    run: Callable[[torch.nn.Module], torch.Tensor]
    sites: list[str]
    default_init: str
    heads: tuple[str, ...]  # modules or parameters that the output depends on, to be saved with an adapter


def unet_output(model):
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    sample = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    context = torch.randn(2, 5, 32, generator=generator).to(dtype)
    return model(sample, torch.tensor([3, 700]), encoder_hidden_states=context).sample


def text_output(model):
    tokens = torch.tensor([[512, 3, 9, 27, 513, 513], [512, 5, 6, 7, 8, 513]])
    return model(input_ids=tokens).last_hidden_state


def clip_output(model):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 16, 16, generator=generator).to(next(model.parameters()).dtype)
    tokens = torch.tensor([[512, 3, 9, 27, 513, 513], [512, 5, 6, 7, 8, 513]])
    return model(input_ids=tokens, pixel_values=pixels).logits_per_image


def vilt_output(model):
    torch.manual_seed(0)  # ViLT draws its image patches at random
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[2, 3, 9, 27], [5, 6, 7, 8]])
    return model(input_ids=tokens, pixel_values=pixels.to(next(model.parameters()).dtype)).pooler_output


def make_clip(vision_width: int = 32):
    from transformers import CLIPConfig, CLIPModel

    text = make_text_encoder().config.to_dict()
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def make_vilt():
    from transformers import ViltConfig, ViltModel

    config = ViltConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    return ViltModel(config)


def meter_output(model):
    batch = meter_inputs()
    pixels = batch.pop("pixel_values").to(next(model.parameters()).dtype)
    return model(pixel_values=pixels, **batch).pooler_output


FAMILIES = {
    "unet": Family(
        make_unet,
        unet_output,
        [
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2",
            "up_blocks.0.attentions.0.transformer_blocks.0.attn2",
            "up_blocks.0.attentions.1.transformer_blocks.0.attn2",
            "mid_block.attentions.0.transformer_blocks.0.attn2",
        ],
        "identity",
        ("conv_out",),
    ),
    "text_encoder": Family(
        make_text_encoder,
        text_output,
        [f"encoder.layers.{i}.self_attn" for i in range(3)],
        "identity",
        ("final_layer_norm",),
    ),
    "clip": Family(
        make_clip,
        clip_output,
        [
            *[f"text_model.encoder.layers.{i}.self_attn" for i in range(3)],
            *[f"vision_model.encoder.layers.{i}.self_attn" for i in range(2)],
        ],
        "paper",
        ("visual_projection", "logit_scale"),
    ),
    "meter": Family(
        make_meter,
        meter_output,
        [
            f"cross_modal_{tower}_layers.{i}.{kind}"
            for tower in ("text", "image")
            for i in range(2)
            for kind in ("attention", "crossattention")
        ],
        "paper",
        ("cross_modal_text_pooler", "cross_modal_image_pooler"),
    ),
    "vilt": Family(make_vilt, vilt_output, [f"encoder.layer.{i}.attention" for i in range(2)], "paper", ("pooler",)),
}
SMALL = apt.APTConfig(num_prompts=6, rank=2)


@torch.no_grad()
def output(family, model):
    return family.run(model)


def snapshot(model):
    hooks = [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs))
        for name, m in model.named_modules()
    ]
    attributes = {name: sorted(set(vars(m)) - {"_is_hf_initialized"}) for name, m in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return hooks, attributes, state


def same(before, after):
    return (
        before[:2] == after[:2]
        and before[2].keys() == after[2].keys()
        and all(torch.equal(value, after[2][key]) for key, value in before[2].items())
    )
