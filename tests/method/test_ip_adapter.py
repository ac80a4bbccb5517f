"""APT beside an IP-Adapter, which replaces every cross-attention processor and adds image states to the text."""

import numpy as np
import pytest
import torch
from conftest import draw, randomize

import apt_diffusion as apt

IMAGE_WIDTH = 12
CONFIG = apt.APTConfig(num_prompts=6, rank=2, query_source="attn_output", streams=["query", "context"])


def ip_adapter_weights(unet) -> dict[str, dict[str, torch.Tensor]]:
    """A random one in the layout of the published files: one key and value map per cross-attention, odd numbers."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.5

    width = unet.config.cross_attention_dim
    names = [name for name in unet.attn_processors if ".attn2." in name]
    maps = {}
    for index, name in enumerate(names):
        inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for kind in ("k", "v"):
            maps[f"{2 * index + 1}.to_{kind}_ip.weight"] = random(inner, width)
    projection = {"proj.weight": random(4 * width, IMAGE_WIDTH), "proj.bias": random(4 * width)}
    return {
        "image_proj": projection | {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)},
        "ip_adapter": maps,
    }


@pytest.mark.parametrize("order", ["ip_first", "apt_first"])
def test_ip_adapter_and_apt_add_up(pipe, order):
    image = torch.randn(2, 1, IMAGE_WIDTH, generator=torch.Generator().manual_seed(1))

    def pictures(**kwargs):
        return draw(pipe, ip_adapter_image_embeds=[image], **kwargs)

    def load_ip_adapter():
        pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)], low_cpu_mem_usage=False)
        pipe.set_ip_adapter_scale(0.7)

    def load_apt():
        apt.add_apt(pipe, CONFIG)
        randomize(pipe)

    base = draw(pipe)
    for step in (load_ip_adapter, load_apt) if order == "ip_first" else (load_apt, load_ip_adapter):
        step()
    both = pictures()
    with pipe.disable_apt():
        image_only = pictures()
    assert np.array_equal(pictures(apt_scale=0.0), image_only)
    assert np.abs(both - image_only).max() > 1e-2 and np.abs(image_only - base).max() > 1e-2

    pipe.set_ip_adapter_scale(0.0)
    without_image = pictures()
    pipe.unload_ip_adapter()
    apt_only = draw(pipe)
    assert np.allclose(without_image, apt_only, atol=1e-4) and np.abs(apt_only - both).max() > 1e-2
    pipe.unload_apt_weights()
    assert np.allclose(draw(pipe), base, atol=1e-5)
