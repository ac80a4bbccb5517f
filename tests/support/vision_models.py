"""Tiny models with random weights of what vision-language people use, each with how it is run and where APT goes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURE = {**LAYERS, "image_size": 16, "patch_size": 8, "initializer_range": 0.02}
TEXT = {**LAYERS, "vocab_size": 100, "max_position_embeddings": 40, "pad_token_id": 1}
TOKENS = torch.tensor([[2, 3, 9, 27, 4], [5, 6, 7, 8, 4]])
IMAGE_TOKEN = 99


def pixels(model: nn.Module, size: int = 16) -> Tensor:
    """Two pictures in the model's precision."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, size, size, generator=generator).to(next(model.parameters()).dtype)


def both(model: nn.Module) -> Tensor:
    """What a two-tower model gives for two texts and two pictures: `(4, d)`."""
    output = model(input_ids=TOKENS, pixel_values=pixels(model))
    return torch.cat([output.text_embeds, output.image_embeds])


def last_hidden_state(model: nn.Module) -> Tensor:
    return model(pixel_values=pixels(model)).last_hidden_state


@dataclass
class VisionModel:
    """One architecture.

    Args:
        make: a tiny model.
        run: its output for two samples, `(2 or 4, ...)`.
        sites: default places.
        per_sample: whether the rows of `run` may have adapters of their own.
    """

    make: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensor]
    sites: list[str]
    per_sample: bool = True


def make_siglip() -> nn.Module:
    from transformers import SiglipConfig, SiglipModel

    return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=PICTURE))


def make_siglip2() -> nn.Module:
    from transformers import Siglip2Config, Siglip2Model

    vision = {**LAYERS, "patch_size": 8, "num_patches": 16}
    return Siglip2Model(Siglip2Config(text_config=TEXT, vision_config=vision))


def run_siglip2(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 6, 192, generator=generator).to(next(model.parameters()).dtype)
    shapes, mask = torch.tensor([[2, 3], [2, 2]]), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    output = model(input_ids=TOKENS, pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes)
    return torch.cat([output.text_embeds, output.image_embeds])


def make_chinese_clip() -> nn.Module:
    from transformers import ChineseCLIPConfig, ChineseCLIPModel

    return ChineseCLIPModel(ChineseCLIPConfig(text_config=TEXT, vision_config=PICTURE, projection_dim=16))


def make_altclip() -> nn.Module:
    from transformers import AltCLIPConfig, AltCLIPModel

    text = {**TEXT, "project_dim": 32}
    return AltCLIPModel(AltCLIPConfig(text_config=text, vision_config=PICTURE, projection_dim=16))


def blip_config():
    from transformers import BlipConfig

    text = {**TEXT, "encoder_hidden_size": 32, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 4}
    return BlipConfig(text_config=text, vision_config=PICTURE, projection_dim=16, image_text_hidden_size=16)


def make_blip() -> nn.Module:
    from transformers import BlipModel

    return BlipModel(blip_config())


def make_blip_matching() -> nn.Module:
    from transformers import BlipForImageTextRetrieval

    return BlipForImageTextRetrieval(blip_config())


def make_blip2() -> nn.Module:
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    language = {
        "model_type": "opt", "vocab_size": 100, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 64,
    }  # fmt: skip
    config = Blip2Config(
        vision_config=PICTURE,
        qformer_config={**TEXT, "encoder_hidden_size": 32},
        text_config=language,
        num_query_tokens=3,
        image_token_index=IMAGE_TOKEN,
    )
    model = Blip2ForConditionalGeneration(config)
    model.query_tokens.data.normal_()  # zero in new models
    return model


def with_image_tokens(count: int) -> Tensor:
    """The two texts, each behind its picture's tokens."""
    return torch.cat([torch.full((2, count), IMAGE_TOKEN), TOKENS], 1)


def make_vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**PICTURE))


def make_dinov2(registers: bool = False) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    settings = {name: value for name, value in PICTURE.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
    if registers:
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**settings, num_register_tokens=2))
    return Dinov2Model(Dinov2Config(**settings))


def make_llava(feature_layer: int | list[int] = -2, next_version: bool = False) -> nn.Module:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    vision = CLIPVisionConfig(**{**PICTURE, "num_hidden_layers": 3})
    language = LlamaConfig(**{**TEXT, "num_hidden_layers": 1}, num_key_value_heads=4)
    settings = {
        "vision_config": vision, "text_config": language, "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": feature_layer,
    }  # fmt: skip
    if next_version:
        config = LlavaNextConfig(**settings, image_grid_pinpoints=[[16, 32]])
        return LlavaNextForConditionalGeneration(config)
    return LlavaForConditionalGeneration(LlavaConfig(**settings))


def run_llava(model: nn.Module) -> Tensor:
    return model(input_ids=with_image_tokens(4), pixel_values=pixels(model)).logits


def run_llava_next(model: nn.Module) -> Tensor:
    """Two pictures of 16 x 32: the whole and its two halves each."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(2, 3, 3, 16, 16, generator=generator).to(next(model.parameters()).dtype)
    sizes = torch.tensor([[16, 32], [16, 32]])
    features = model.get_image_features(pixel_values=pictures, image_sizes=sizes).pooler_output
    return torch.stack(list(features))


def make_qwen2_vl() -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "mlp_ratio": 2}
    language = {
        **TEXT, "num_hidden_layers": 1, "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=vision, text_config=language))


def make_qwen2_5_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 8,
        "window_size": 32, "fullatt_block_indexes": [1],
    }  # fmt: skip
    language = {
        **TEXT, "num_hidden_layers": 1, "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=language))


def run_qwen(model: nn.Module) -> Tensor:
    """The vision tower over two pictures of different sizes, whose patches stand in one row."""
    grid = torch.tensor([[1, 4, 4], [1, 2, 4]])
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(24, 3 * 2 * 8 * 8, generator=generator).to(next(model.parameters()).dtype)
    output = model.model.visual(patches, grid_thw=grid)
    return output if isinstance(output, Tensor) else output.pooler_output


def places(pattern: str, layers: int = 2) -> list[str]:
    return [pattern.format(index) for index in range(layers)]


TEXT_TOWER, VISION_TOWER = "text_model.encoder.layers.{}.self_attn", "vision_model.encoder.layers.{}.self_attn"
VISION_MODELS = {
    "siglip": VisionModel(make_siglip, both, places(TEXT_TOWER) + places(VISION_TOWER)),
    "siglip2": VisionModel(make_siglip2, run_siglip2, places(TEXT_TOWER) + places(VISION_TOWER)),
    "chinese_clip": VisionModel(
        make_chinese_clip, both, places("text_model.encoder.layer.{}.attention.self") + places(VISION_TOWER)
    ),
    "altclip": VisionModel(
        make_altclip, both, places("text_model.roberta.encoder.layers.{}.attention.self") + places(VISION_TOWER)
    ),
    "blip": VisionModel(make_blip, both, places("text_model.encoder.layer.{}.attention.self") + places(VISION_TOWER)),
    "blip_matching": VisionModel(
        make_blip_matching,
        lambda model: model(input_ids=TOKENS, pixel_values=pixels(model)).itm_score,
        places(VISION_TOWER)
        + [
            f"text_encoder.encoder.layer.{i}.{kind}.self" for i in range(2) for kind in ("attention", "crossattention")
        ],
    ),
    "blip2": VisionModel(
        make_blip2,
        lambda model: model(input_ids=with_image_tokens(3), pixel_values=pixels(model)).logits,
        [
            *places(VISION_TOWER),
            "qformer.encoder.layer.0.attention.attention",
            "qformer.encoder.layer.0.crossattention.attention",
            "qformer.encoder.layer.1.attention.attention",
        ],
    ),
    "vit": VisionModel(make_vit, last_hidden_state, places("layers.{}.attention")),
    "dinov2": VisionModel(make_dinov2, last_hidden_state, places("encoder.layer.{}.attention")),
    "dinov2_registers": VisionModel(
        lambda: make_dinov2(registers=True), last_hidden_state, places("encoder.layer.{}.attention")
    ),
    "llava": VisionModel(make_llava, run_llava, places("model.vision_tower.encoder.layers.{}.self_attn")),
    "llava_next": VisionModel(
        lambda: make_llava(next_version=True),
        run_llava_next,
        places("model.vision_tower.encoder.layers.{}.self_attn"),
        per_sample=False,  # a picture is a batch of parts
    ),
    "qwen2_vl": VisionModel(make_qwen2_vl, run_qwen, places("model.visual.blocks.{}.attn"), per_sample=False),
    "qwen2_5_vl": VisionModel(make_qwen2_5_vl, run_qwen, places("model.visual.blocks.{}.attn"), per_sample=False),
}
