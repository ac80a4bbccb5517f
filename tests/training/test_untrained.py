"""Adapters on layers that nobody reads are found after one backward pass, in models of other people."""

import torch
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from apt_diffusion import APTConfig, add_apt, freeze_base
from apt_diffusion.training.methods import trained_parameters
from apt_diffusion.training.optimizer import without_gradient

VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def unread_layers(model, loss):
    """Names of the adapted modules, and those among them whose adapter gets no gradient."""
    names = add_apt(model, APTConfig(num_prompts=3, rank=2, target_modules=["self_attn"]))
    freeze_base(model)
    loss(model).backward()
    silent = {name.split(".apt.")[0] for name in without_gradient(trained_parameters(model))}
    return set(names), silent


def test_the_last_vision_layer_of_llava():
    """The language model reads the layer before it."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_id=39, vision_feature_layer=-2
    )
    model = LlavaForConditionalGeneration(config)

    def loss(model):
        ids = torch.tensor([[1, 39, 39, 39, 39, 5, 6]])
        return model(input_ids=ids, pixel_values=torch.randn(1, 3, 16, 16), labels=ids).loss

    names, silent = unread_layers(model, loss)
    assert len(names) == 5 and len(silent) == 1
    assert all(name.endswith("vision_tower.encoder.layers.2.self_attn") for name in silent)


def test_the_towers_of_clipseg():
    """transformers runs them without gradients: only the decoder's layers learn."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 10, "eos_token_id": 39,
    }  # fmt: skip
    config = CLIPSegConfig(
        text_config=text, vision_config=VISION, projection_dim=16, extract_layers=[0, 1], reduce_dim=8,
        decoder_num_attention_heads=2, decoder_intermediate_size=16,
    )  # fmt: skip
    model = CLIPSegForImageSegmentation(config)

    def loss(model):
        ids = torch.tensor([[1, 5, 39]])
        return model(input_ids=ids, pixel_values=torch.randn(1, 3, 16, 16)).logits.square().mean()

    names, silent = unread_layers(model, loss)
    assert silent == {name for name in names if name.startswith("clip.")}
    assert {name for name in names - silent if name.startswith("decoder.")} and len(silent) == 5
