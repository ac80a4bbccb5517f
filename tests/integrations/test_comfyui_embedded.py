"""The ComfyUI node that gives the embedded model: its settings against diffusers, and real pictures."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def embedded(monkeypatch):
    """The node's module, imported without ComfyUI."""
    monkeypatch.syspath_prepend(str(ROOT / "integrations"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "comfyui"]:
        monkeypatch.delitem(sys.modules, name)
    from comfyui import embedded

    assert "comfy" not in sys.modules
    return embedded


def test_the_unet_is_described_as_diffusers_builds_it(embedded):
    from diffusers import UNet2DConditionModel

    folder = embedded.folder_of("miniature-emoji")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    config = embedded.to_unet_config(embedded.read_config(folder, "unet"))
    blocks = [block.resnets[0].out_channels for block in unet.down_blocks]
    first = config["model_channels"]
    for products in ([mult * first for mult in config["channel_mult"]], [first * m for m in config["channel_mult"]]):
        assert products == blocks and {type(product) for product in products} == {int}

    def attentions(block):
        return [1] * len(block.attentions) if hasattr(block, "attentions") else [0] * len(block.resnets)

    assert config["transformer_depth"] == [depth for block in unet.down_blocks for depth in attentions(block)]
    taken = list(reversed(config["transformer_depth_output"]))  # ComfyUI pops from the end
    assert taken == [depth for block in unet.up_blocks for depth in attentions(block)]
    assert config["in_channels"] == unet.conv_in.in_channels and config["out_channels"] == unet.conv_out.out_channels


def test_the_decoder_is_counted_from_its_own_levels(embedded, monkeypatch):
    def convert(state):
        return {re.sub(r"up_blocks\.(\d)", lambda match: f"up.{3 - int(match[1])}", key): state[key] for key in state}

    module = types.ModuleType("comfy.diffusers_convert")
    module.convert_vae_state_dict = convert
    monkeypatch.setitem(sys.modules, "comfy", types.ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.diffusers_convert", module)
    weights = [torch.full((1,), float(level)) for level in range(3)]
    state = {f"decoder.up_blocks.{level}.weight": weight for level, weight in enumerate(weights)}
    config = {"block_out_channels": [8, 16, 24], "mid_block_add_attention": False}
    converted = embedded.to_vae_state(state, config)
    assert [converted[f"decoder.up.{level}.weight"] for level in (2, 1, 0)] == weights
    added = {key: value for key, value in converted.items() if ".mid.attn_1." in key}
    assert len(added) == 20 and not any(value.any() for value in added.values())
    assert embedded.to_vae_state(state, config | {"mid_block_add_attention": True}).keys() == converted.keys() - added


def test_an_unknown_model_is_one_sentence(embedded):
    [choices] = embedded.LoadEmbeddedModel.INPUT_TYPES()["required"]["model_name"]
    assert choices == ["miniature-emoji"]
    with pytest.raises(ValueError, match="no embedded model 'sd15' for ComfyUI: use miniature-emoji"):
        embedded.LoadEmbeddedModel().load("sd15")


@pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH names no checkout of ComfyUI")
def test_a_real_graph_draws_the_picture_of_diffusers_with_an_embedded_model(tmp_path):
    script = ROOT / "tests" / "support" / "comfyui_embedded.py"
    command = [sys.executable, str(script), os.environ["COMFYUI_PATH"], str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    rows = {row["name"]: row for row in lines}
    assert len(rows) == 4, done.stderr[-2000:]
    # ComfyUI begins with a trace of signal where diffusers has none.
    assert rows["the bare model"]["difference"] < 5e-3
    close = rows["the bare model from ComfyUI's first step"]["difference"]
    assert close < 1e-4 and rows["an encoded picture"]["difference"] < 1e-4
    adapted = rows["with an adapter"]
    assert adapted["effect"] > 0.1 and adapted["difference"] <= 2 * close + 1e-4 * adapted["effect"], rows
