"""Weights per block against diffusers' own expansion of them for LoRA."""

import pytest
import torch
from conftest import make_unet
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from support.pipeline_helpers import SMALL

import apt_diffusion as apt
from apt_diffusion.model import named_cores

PARTIAL = apt.APTConfig(num_prompts=3, rank=2, target_modules=[r"up_blocks.0.attentions.1.transformer_blocks.0.attn2"])


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return make_unet()


@pytest.mark.parametrize("config", [SMALL, PARTIAL])
@pytest.mark.parametrize(
    "weights",
    [
        0.3,
        {},
        {"mid": 0.2},
        {"mid": [0.2]},
        {"down": 0.0, "up": 0.5},
        {"up": [0.1, 0.9]},
        {"up": [0.4]},
        {"up": {"block_0": 0.3}},
        {"up": {"block_0": [0.6, 0.7]}, "mid": 2.0},
        {"up": {"block_0": [0.6]}, "down": {"block_1": [0.5]}},
        {"down": {"block_1": -0.5}, "up": {}},
    ],
)
def test_weights_are_those_of_diffusers(unet, config, weights):
    apt.add_apt(unet, config, "a")
    apt.add_apt(unet, config, "b")
    apt.set_apt_adapters(unet, ["a", "b"], [weights, 0.25])
    (expanded,) = _maybe_expand_lora_scales(unet, [weights])
    for name, core in named_cores(unet):
        expected = expanded
        if isinstance(expanded, dict):
            (expected,) = [weight for place, weight in expanded.items() if f"{place}." in name]
        assert core.weights == {"a": expected, "b": 0.25}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"up": [0.1, 0.2, 0.3]}, "up block 0 has 2 transformers, but 3 weights"),
        ({"mid": [0.1, 0.2]}, "mid block None has 1 transformers, but 2"),
        ({"side": 1.0}, "Unknown UNet parts"),
        ({"up": {"block_1": 1.0}}, "there are \\['block_0'\\]"),
        ({"down": {"block_1": "x"}}, "finite number"),
    ],
)
def test_wrong_weights_change_nothing(unet, weights, message):
    apt.add_apt(unet, SMALL, "a")
    apt.set_apt_adapters(unet, "a", 0.5)
    with pytest.raises(ValueError, match=message):
        apt.set_apt_adapters(unet, "a", weights)
    assert {core.weights["a"] for _, core in named_cores(unet)} == {0.5}
