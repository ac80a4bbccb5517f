"""The models of the cost tables are those that diffusers builds: whole configurations, without memory for weights."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from apt_diffusion import APTConfig
from apt_diffusion.architectures import resolve_config
from apt_diffusion.cost_models import MODELS, compare
from apt_diffusion.places import places_of


def empty(*shape: int) -> Tensor:
    return torch.empty(shape)


@dataclass
class Built:
    """A model by its configuration, and how it is called at 1024 x 1024 (SD 1.5: 512 x 512)."""

    make: Callable[[], nn.Module]
    arguments: Callable[[], dict]
    parameters: float  # of the whole model, in billions


def make(name: str, **config) -> nn.Module:
    import diffusers

    return getattr(diffusers, name)(**config)


def make_sd3(layers: int, dual: int) -> nn.Module:
    heads = {"num_attention_heads": layers, "attention_head_dim": 64, "caption_projection_dim": 64 * layers}
    layout = {"num_layers": layers, "dual_attention_layers": tuple(range(dual)), "pos_embed_max_size": 192}
    return make("SD3Transformer2DModel", **heads, **layout, qk_norm="rms_norm", out_channels=16)


def sd3() -> dict:
    text = {"encoder_hidden_states": empty(1, 333, 4096), "pooled_projections": empty(1, 2048)}
    return {"hidden_states": empty(1, 16, 128, 128), **text, "timestep": empty(1)}


def flux() -> dict:
    text = {"encoder_hidden_states": empty(1, 512, 4096), "pooled_projections": empty(1, 768)}
    ids = {"img_ids": empty(4096, 3), "txt_ids": empty(512, 3)}
    return {"hidden_states": empty(1, 4096, 64), **text, **ids, "timestep": empty(1), "guidance": empty(1)}


def flux2() -> dict:
    ids = {"img_ids": empty(4096, 4), "txt_ids": empty(512, 4), "encoder_hidden_states": empty(1, 512, 15360)}
    return {"hidden_states": empty(1, 4096, 128), **ids, "timestep": empty(1), "guidance": empty(1)}


def qwen() -> dict:
    text = {"encoder_hidden_states": empty(1, 512, 3584), "encoder_hidden_states_mask": torch.ones(1, 512)}
    return {"hidden_states": empty(1, 4096, 64), **text, "timestep": empty(1), "img_shapes": [(1, 64, 64)]}


def z_image() -> dict:
    return {"x": [empty(16, 1, 128, 128)], "t": empty(1), "cap_feats": [empty(128, 2560)]}


def unet(size: int, width: int, **added: Tensor) -> dict:
    sample = {"sample": empty(1, 4, size, size), "timestep": empty(1), "encoder_hidden_states": empty(1, 77, width)}
    return sample | ({"added_cond_kwargs": added} if added else {})


SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "block_out_channels": (320, 640, 1280), "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
    "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
BUILT = {
    "Stable Diffusion 1.5": Built(lambda: make("UNet2DConditionModel", **SD15), lambda: unet(64, 768), 0.86),
    "Stable Diffusion XL": Built(
        lambda: make("UNet2DConditionModel", **SDXL),
        lambda: unet(128, 2048, text_embeds=empty(1, 1280), time_ids=empty(1, 6)),
        2.57,
    ),
    "Stable Diffusion 3.5 medium": Built(lambda: make_sd3(24, 13), sd3, 2.24),
    "Stable Diffusion 3.5 large": Built(lambda: make_sd3(38, 0), sd3, 8.06),
    "Flux.1-dev": Built(lambda: make("FluxTransformer2DModel", guidance_embeds=True), flux, 11.9),
    "Flux.2-dev": Built(lambda: make("Flux2Transformer2DModel"), flux2, 32.2),
    "Qwen-Image": Built(lambda: make("QwenImageTransformer2DModel"), qwen, 20.4),
    "Z-Image": Built(lambda: make("ZImageTransformer2DModel"), z_image, 6.15),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_widths_modules_and_tokens_are_those_of_the_real_configuration(name):
    """At the default places of the model's row."""
    built, found = BUILT[name], Counter()

    def count(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        image = output[0] if isinstance(output, tuple) else output
        found[image.shape[-1], image.shape[-2]] += 1

    with torch.device("meta"), torch.no_grad():
        model = built.make().eval()
        for place in places_of(model, resolve_config(model, APTConfig())):
            place.module.register_forward_hook(count)
        model(**built.arguments())
    parameters = sum(p.numel() for p in model.parameters()) / 1e9
    assert f"{parameters:.3g}" == f"{built.parameters:.3g}"
    groups = MODELS[name].groups(MODELS[name].tokens)
    assert found == {(width, tokens): modules for width, modules, tokens in groups}


@pytest.mark.parametrize(
    ("name", "millions", "gigas"),
    [
        ("Stable Diffusion 3.5 medium", 7.67, 60.5), ("Stable Diffusion 3.5 large", 19.2, 152),
        ("Flux.1-dev", 36.4, 311), ("Flux.2-dev", 71.6, 625), ("Qwen-Image", 38.3, 302), ("Z-Image", 24.0, 195),
    ],
)  # fmt: skip
def test_apt_on_diffusion_transformers(name, millions, gigas):
    """200 prompts of rank 4, as measured with attached adapters."""
    costs = compare(name, 200, 4, 4096)["APT"]
    assert f"{costs.parameters / 1e6:.3g}" == f"{millions:.3g}" and f"{costs.macs / 1e9:.3g}" == f"{gigas:.3g}"


def test_lora_stands_next_to_it_and_what_is_out_of_range_is_refused():
    assert compare("Qwen-Image", 200, 4, 4096)["LoRA (merged)"] == (60 * 4 * 3072 * 4, 0)
    with pytest.raises(ValueError, match="Choose one of ViLT"):
        compare("SD 9", 200, 4, 4096)
