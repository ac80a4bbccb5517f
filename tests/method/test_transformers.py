"""The promises of the behaviour matrix, on a tiny diffusion transformer of every family with default places."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from conftest import randomize
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from support.transformer_families import TRANSFORMERS

import apt_diffusion as apt
from apt_diffusion.api import cores_of
from apt_diffusion.model import named_cores

pytestmark = pytest.mark.slow

SMALL = apt.APTConfig(num_prompts=4, rank=2)
# Each draws its samples one by one, so a row may differ from the row of a batch in the last digits only.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module", params=TRANSFORMERS)
def family(request):
    return TRANSFORMERS[request.param]


@pytest.fixture(scope="module")
def base(family):
    return family.make()


@pytest.fixture(scope="module")
def prediction(family, base):
    return predict(family, base)


@pytest.fixture
def model(base):
    return copy.deepcopy(base)


@torch.no_grad()
def predict(family, model):
    return family.run(model)


def gradients(family, model):
    model.zero_grad()
    result = family.run(model)
    (result * torch.randn(result.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def streams_of(family):
    return ["query", "text"] if family.text_sites else ["query"]


def test_places_and_untrained_output(family, model, prediction):
    assert apt.add_apt(model, SMALL) == family.sites
    assert torch.equal(predict(family, model), prediction)
    assert all(core.adapters["default"].gate is not None for core in cores_of(model))
    apt.remove_apt(model)
    if not family.text_sites:
        with pytest.raises(ValueError, match="stream 'text' needs its text output"):
            apt.add_apt(model, apt.APTConfig(streams=["text"]))
        return
    apt.add_apt(model, apt.APTConfig(num_prompts=4, rank=2, streams=["query", "text"]))
    found = {name for name, _ in named_cores(model)}
    assert found == {f"{name}.apt" for name in family.sites} | {f"{name}.apt_text" for name in family.text_sites}
    assert torch.equal(predict(family, model), prediction)


def test_the_hook_is_the_equation_on_what_the_bare_attention_gives(family, model):
    apt.add_apt(model, apt.APTConfig(num_prompts=4, rank=2, init="paper", streams=streams_of(family)))
    randomize(model)
    modules = dict(model.named_modules())
    seen = {}

    def record(module, args, kwargs, output):
        seen[module] = (args, kwargs, output)

    for name in family.sites:
        modules[name].register_forward_hook(record, with_kwargs=True)
    predict(family, model)
    for name in family.sites:
        module = modules[name]
        args, kwargs, corrected = seen[module]
        with torch.no_grad():
            bare = module.forward(*args, **kwargs)
        outputs = bare if isinstance(bare, tuple) else (bare,)
        corrected = corrected if isinstance(corrected, tuple) else (corrected,)
        places = [("apt", 0)] + ([("apt_text", 1)] if name in family.text_sites else [])
        assert len(outputs) == len(corrected)
        for child, place in places:
            core = getattr(module, child)
            states = core.binding.get(args, kwargs)
            expected = core.adapters["default"](outputs[place], states)
            assert not torch.equal(expected, outputs[place])
            torch.testing.assert_close(corrected[place], expected, rtol=1e-5, atol=1e-6)


def test_weight_and_scale_zero_disabled_and_removed_are_the_base_model(family, model, prediction):
    apt.add_apt(model, apt.APTConfig(num_prompts=4, rank=2, streams=streams_of(family)))
    randomize(model)
    adapted = predict(family, model)
    assert not torch.equal(adapted, prediction)
    apt.set_apt_adapters(model, "default", 0.0)
    assert torch.equal(predict(family, model), prediction)
    apt.set_apt_adapters(model, "default")
    apt.set_apt_scale(model, 0.0)
    assert torch.equal(predict(family, model), prediction)
    apt.set_apt_scale(model, 1.0)
    with apt.disable_apt(model):
        assert torch.equal(predict(family, model), prediction)
    assert torch.equal(predict(family, model), adapted)
    apt.remove_apt(model)
    assert torch.equal(predict(family, model), prediction)
    assert not any(module._forward_hooks for module in model.modules())


def test_every_parameter_learns_and_checkpointing_changes_no_gradient(family, model):
    apt.add_apt(model, apt.APTConfig(num_prompts=4, rank=2, streams=streams_of(family)))
    randomize(model)
    apt.freeze_base(model)
    model.train()
    plain = gradients(family, model)
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    assert len(plain) == 5 * (len(family.sites) + len(family.text_sites))
    if not family.can_checkpoint:
        return
    model.enable_gradient_checkpointing()
    for name, gradient in gradients(family, model).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6)


def test_a_saved_adapter_comes_back_and_is_swapped(family, base, model, tmp_path):
    config = apt.APTConfig(num_prompts=4, rank=2, streams=streams_of(family))
    apt.add_apt(model, config)
    randomize(model)
    first = predict(family, model)
    apt.save_apt_weights(model, tmp_path / "first")
    randomize(model, seed=7)
    second = predict(family, model)
    apt.save_apt_weights(model, tmp_path / "second")
    again = copy.deepcopy(base)
    assert sorted(apt.load_apt_weights(again, tmp_path / "first")) == sorted(family.sites)
    assert torch.equal(predict(family, again), first)
    apt.load_apt_weights(again, tmp_path / "second", hotswap=True)
    assert torch.equal(predict(family, again), second)


def test_mixed_batches_and_several_adapters(family, model, prediction):
    apt.add_apt(model, SMALL, "a")
    apt.add_apt(model, apt.APTConfig(num_prompts=7, rank=1), "b")
    randomize(model)
    alone = {}
    for name in "ab":
        apt.set_apt_adapters(model, name)
        alone[name] = predict(family, model)
    for core in cores_of(model):
        core.adapters_per_sample = ("b", None)
    mixed = predict(family, model)
    torch.testing.assert_close(mixed[0], alone["b"][0], **TOLERANCE)
    torch.testing.assert_close(mixed[1], prediction[1], **TOLERANCE)
    assert not torch.allclose(mixed[0], prediction[0], **TOLERANCE)


def test_weights_by_block(family, model, prediction):
    apt.add_apt(model, SMALL)
    randomize(model)
    top = sorted({name.split(".")[0] for name in family.sites})
    apt.set_apt_adapters(model, "default", dict.fromkeys(top, 0.0))
    assert torch.equal(predict(family, model), prediction)
    first = re.match(r"\w+\.\d+", family.sites[0])[0]
    apt.set_apt_adapters(model, "default", dict.fromkeys(top, 0.0) | {first: 0.5})
    weights = {name: core.weights["default"] for name, core in named_cores(model)}
    assert weights == {f"{name}.apt": 0.5 if name.startswith(f"{first}.") else 0.0 for name in family.sites}
    with pytest.raises(ValueError, match=r"Unknown blocks \['down'\]"):
        apt.set_apt_adapters(model, "default", {"down": 0.5})
    assert {name: core.weights["default"] for name, core in named_cores(model)} == weights


def test_a_compiled_model_gives_the_same_and_is_not_compiled_again_for_a_weight(family, model):
    apt.add_apt(model, SMALL)
    randomize(model)
    expected = predict(family, model)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    torch.testing.assert_close(predict(family, compiled), expected, **TOLERANCE)
    frames = counter.frame_count
    apt.set_apt_adapters(model, "default", {})
    torch.testing.assert_close(predict(family, compiled), expected, **TOLERANCE)
    assert counter.frame_count == frames


def test_offloading_casting_and_half_precision(family, base, model):
    apt.add_apt(model, SMALL)
    randomize(model)
    expected = predict(family, model)
    offloaded = copy.deepcopy(model)
    kind = "leaf_level" if family.class_name == "HunyuanDiT2DModel" else "block_level"
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(offloaded, torch.device("cpu"), offload_type=kind, **blocks)
    torch.testing.assert_close(predict(family, offloaded), expected, **TOLERANCE)
    half = copy.deepcopy(base).to(torch.bfloat16)
    apt.add_apt(half, SMALL)
    assert {p.dtype for core in cores_of(half) for p in core.parameters()} == {torch.float32}
    untrained = predict(family, copy.deepcopy(base).to(torch.bfloat16))
    assert torch.equal(predict(family, half), untrained)
    assert untrained.dtype is torch.bfloat16


def test_lora_in_the_same_model(family, model):
    add_lora(family, model)
    with_lora = predict(family, model)
    apt.add_apt(model, SMALL)
    assert torch.equal(predict(family, model), with_lora)
    randomize(model)
    both = predict(family, model)
    enable_lora(model, False)
    apt_only = predict(family, model)
    assert not torch.equal(both, apt_only)
    apt.disable_apt(model)
    enable_lora(model, True)
    assert torch.equal(predict(family, model), with_lora)


def add_lora(family, model):
    """LoRA on the first linear layer of an adapted attention, through PEFT: not every model has `add_adapter`."""
    torch.manual_seed(3)
    inside = [(name, m) for name, m in model.named_modules() if name.startswith(f"{family.sites[0]}.")]
    linear = next(name for name, module in inside if isinstance(module, torch.nn.Linear))
    config = LoraConfig(r=2, target_modules=[linear.rsplit(".", 1)[-1]], init_lora_weights=False)
    inject_adapter_in_model(config, model)


def enable_lora(model, enabled):
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(enabled)


def test_the_page_lists_what_is_tried_here():
    """`docs/transformers.md` names exactly these classes, and for each a place that the tiny model has."""
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE)
    assert {row[0] for row in rows} == {family.class_name for family in TRANSFORMERS.values()}
    for family in TRANSFORMERS.values():
        _, places, text = next(row for row in rows if row[0] == family.class_name)
        if "as Flux.1" not in places:
            listed = {place.replace("N", "#") for place in re.findall(r"`([\w.]+)`", places)}
            assert listed == {re.sub(r"\d+", "#", site, count=1) for site in family.sites}
        assert bool(family.text_sites) == ("yes" in text or "in the" in text)
