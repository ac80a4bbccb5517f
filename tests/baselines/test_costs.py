"""Closed forms against published figures, and against what torch counts on real models."""

import subprocess
import sys

import pytest
import torch
from support.families import FAMILIES
from support.method_helpers import config_of

import apt_diffusion as apt
from apt_diffusion.api import cores_of
from apt_diffusion.baselines import add_method
from apt_diffusion.baselines.modules import Bottleneck
from apt_diffusion.costs import METER, VILT, count_costs, measure_macs, published_tables


def test_the_figures_of_the_paper():
    assert count_costs("apt", **VILT) == (1_916_940, 903_168_000)
    assert count_costs("deep_prompt", **VILT) == (1_843_200, 5_135_155_200)
    assert count_costs("apt", **METER) == (3_833_880, 2_304_000_000)


def test_published_cells_are_reproduced_or_explained():
    unexplained = []
    for row in published_tables():
        for value, published, unit in zip((row.parameters, row.macs), row.published, (1e6, 1e9), strict=True):
            digits = len(published.partition(".")[2])
            same = value is not None and f"{value / unit:.{digits}f}" == published
            if not same and not row.note:
                unexplained.append(row)
    assert not unexplained


def test_tokens_may_differ_between_modules():
    sizes = {"hidden_size": 16, "num_modules": 2, "num_prompts": 5, "rank": 3}
    for method in ("apt", "adapter", "scaled_pa", "deep_prompt"):
        even = count_costs(method, num_tokens=10, **sizes)
        assert even == count_costs(method, num_tokens=[7, 13], **sizes)
    with pytest.raises(ValueError, match="3 numbers for 2 modules"):
        count_costs("apt", num_tokens=[1, 2, 3], **sizes)
    with pytest.raises(ValueError, match=r"Unknown method 'ia3'.*scaled_pa"):
        count_costs("ia3", num_tokens=1, **sizes)


@pytest.mark.parametrize("family", FAMILIES)
def test_apt_costs_what_torch_counts(family):
    """Each attention module sees its own number of tokens, all samples of the batch together, and its own width."""
    family = FAMILIES[family]
    torch.manual_seed(0)
    model = family.make().eval()
    base = measure_macs(lambda: family.run(model))
    apt.add_apt(model, apt.APTConfig(num_prompts=7, rank=3, init="paper"))
    measured = measure_macs(lambda: family.run(model)) - base
    places: list[tuple[int, int]] = []
    for core in cores_of(model):
        core.register_forward_pre_hook(lambda core, args: places.append((args[0].shape[:2].numel(), args[0].shape[2])))
    family.run(model)
    expected = [
        count_costs("apt", hidden_size=width, num_tokens=tokens, num_modules=1, num_prompts=7, rank=3)
        for tokens, width in places
    ]
    assert measured == sum(costs.macs for costs in expected) > 0
    parameters = sum(p.numel() for core in cores_of(model) for p in core.parameters())
    assert parameters == sum(costs.parameters for costs in expected)


def test_unmerged_lora_costs_what_torch_counts():
    from peft import LoraConfig, inject_adapter_in_model

    family = FAMILIES["text_encoder"]
    model = family.make().eval()
    base = measure_macs(lambda: family.run(model))
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["q_proj", "v_proj"]), model)
    measured = measure_macs(lambda: family.run(model)) - base
    tokens = family.run(model).shape[:2].numel()
    costs = count_costs("lora", hidden_size=32, num_tokens=tokens, num_modules=3, rank=3, merged=False)
    assert measured == costs.macs
    assert sum(p.numel() for name, p in model.named_parameters() if "lora_" in name) == costs.parameters


@pytest.mark.parametrize("method", ["adapter", "scaled_pa"])
@pytest.mark.parametrize("family", ["vilt", "meter", "clip"])
def test_bottlenecks_cost_what_torch_counts(family, method):
    """torch counts matrix products; the closed form of the parallel adapter has 5dN for its norm besides."""
    family = FAMILIES[family]
    model = family.make().eval()
    base = measure_macs(lambda: family.run(model))
    add_method(model, config_of(method))
    measured = measure_macs(lambda: family.run(model)) - base
    tokens: list[int] = []
    for module in model.modules():
        if isinstance(module, Bottleneck):
            module.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[:2].numel()))
    family.run(model)
    sizes = {"hidden_size": 32, "num_tokens": tokens, "num_modules": len(tokens), "bottleneck": 7}
    norms = 5 * 32 * sum(tokens) if method == "scaled_pa" else 0
    assert measured == count_costs(method, **sizes).macs - norms > 0


def vilt_encoder_macs(method):
    """What `method` adds to two ViLT layers over 10 tokens of width 32."""
    from transformers import ViltConfig, ViltModel

    config = ViltConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=9
    )
    model, states = ViltModel(config).eval(), torch.randn(1, 10, 32)
    base = measure_macs(lambda: model.encoder(states))
    add_method(model, config_of(method))
    return measure_macs(lambda: model.encoder(states)) - base


def test_prompts_of_vilt_cost_what_torch_counts():
    sizes = {"hidden_size": 32, "num_tokens": 10, "num_modules": 2}
    assert vilt_encoder_macs("shallow_prompt") == count_costs("shallow_prompt", num_prompts=5, **sizes).macs
    # Here deep prompts ask, too, and their answers are dropped behind the output map: the released code drops the
    # questions before. The results are the same; the closed form counts the released way.
    dropped = 2 * (5 * 32**2 + 2 * 32 * 5 * (10 + 5))
    assert vilt_encoder_macs("deep_prompt") == count_costs("deep_prompt", num_prompts=5, **sizes).macs + dropped


def test_deep_prompts_of_meter_are_keys_and_values_only():
    family = FAMILIES["meter"]
    model = family.make().eval()
    base = measure_macs(lambda: family.run(model))
    add_method(model, config_of("deep_prompt"))
    measured = measure_macs(lambda: family.run(model)) - base
    tokens = [5, 5, 5, 5]  # T and I of the tiny model, in two layers of two stacks; two samples
    assert measured == 2 * sum(2 * 5 * 32**2 + 2 * 5 * 32 * n for n in tokens)


def test_the_module_prints_both_tables():
    done = subprocess.run([sys.executable, "-m", "apt_diffusion.costs"], capture_output=True, text=True, check=True)
    assert "1,916,940" in done.stdout and "13.0526" in done.stdout and done.stdout.count("\n") == 14
