"""A method from outside: one call, and everything that compares methods knows it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import make_meter
from support.families import make_clip, make_vilt, same, snapshot
from torch import nn

import apt_diffusion
from apt_diffusion import APTConfig
from apt_diffusion.baselines import (
    CHILD,
    Costs,
    Method,
    MethodConfig,
    Setting,
    add_child,
    add_method,
    freeze_for_method,
    get_method,
    load_method,
    method_names,
    method_of,
    method_parameters,
    remove_method,
    save_method,
    unregister_method,
)
from apt_diffusion.costs import count_costs
from apt_diffusion.studio import costs as studio_costs
from apt_diffusion.training.methods import add_method_flags, method_config, settle_method_flags

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import methods as benchmark


class Shift(nn.Module):
    """A learnable vector that joins an output."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.full((width,), start))

    def after(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + self.vector


class Shifts(Method):
    """A vector behind every linear map."""

    label = "shifts"
    settings = (
        Setting("start", 0.5, "Where vectors start."),
        Setting("every", 1, "Of so many maps one."),
    )

    def attach(self, model: nn.Module, start: float, every: int) -> list[str]:
        linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)][::every]
        for _, linear in linears:
            shift = Shift(linear.out_features, start)
            add_child(linear, shift)
            linear.register_forward_hook(shift.after)
        return [name for name, _ in linears]

    def costs(self, hidden_size: int, tokens: Sequence[int], every: int = 1) -> Costs:
        return Costs(hidden_size * len(tokens) // every, 0)


@pytest.fixture
def shifts():
    apt_diffusion.register_method("shifts", Shifts())
    yield
    unregister_method("shifts")


def test_the_present_methods_in_the_order_of_the_tables():
    assert method_names() == (
        "classifier_only", "shallow_prompt", "deep_prompt", "lora", "adapter", "scaled_pa", "apt", "full",
    )  # fmt: skip


def test_it_attaches_trains_saves_loads_and_leaves(shifts, tmp_path):
    """On a model of no known family, too."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    x, before = torch.randn(4, 3), snapshot(model)
    base = model(x)
    assert add_method(model, MethodConfig("shifts", every=1)) == ["0", "1"] and method_of(model) == "shifts"
    expected = model[1].weight @ (model[0].weight @ x.T + model[0].bias[:, None] + 0.5) + model[1].bias[:, None] + 0.5
    torch.testing.assert_close(model(x), expected.T)
    assert freeze_for_method(model) == (5, 25)
    assert [name for name, _ in method_parameters(model)] == [f"0.{CHILD}.vector", f"1.{CHILD}.vector"]
    for _, parameter in method_parameters(model):
        parameter.data.normal_()
    adapted, file = model(x), save_method(model, tmp_path)
    remove_method(model)
    model.requires_grad_(True)
    assert same(before, snapshot(model)) and torch.equal(model(x), base)
    assert load_method(model, tmp_path) == MethodConfig("shifts", start=0.5, every=1)
    assert torch.equal(model(x), adapted) and file.parent == tmp_path


def test_flags_costs_benchmark_and_studio_know_it(shifts):
    parser = argparse.ArgumentParser()
    add_method_flags(parser.add_argument)
    args = parser.parse_args(["--method", "shifts", "--every", "2"])
    settle_method_flags(args)
    assert method_config(args) == MethodConfig("shifts", start=0.5, every=2)
    assert "Where vectors start. Of shifts. (default: 0.5)" in " ".join(parser.format_help().split())
    assert count_costs("shifts", hidden_size=8, num_tokens=3, num_modules=4, every=2) == (16, 0)
    assert studio_costs.compare("ViLT-B/32", 200, 4, 241)["Shifts"] == (768 * 12, 0)
    assert benchmark.parse_args(["--methods", "shifts"]).methods == ["shifts"]


def test_a_shared_flag_names_its_methods_and_idle_ones_are_reported(caplog):
    parser = argparse.ArgumentParser()
    add_method_flags(parser.add_argument)
    text = " ".join(parser.format_help().split())
    assert "Of shallow_prompt, deep_prompt, apt. (default: 200)" in text and "Of adapter, scaled_pa. (default" in text
    args = parser.parse_args(["--method", "lora", "--rank", "3", "--bottleneck", "5"])
    settle_method_flags(args)
    assert method_config(args) == MethodConfig("lora", rank=3)
    assert "--bottleneck: without effect, because --method lora has no such setting" in caplog.text
    args = parser.parse_args(["--init", "identity", "--num_prompts", "7"])
    settle_method_flags(args)
    assert method_config(args) == APTConfig(num_prompts=7, rank=4, init="identity")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "0"], "rank must be positive"),
        (["--rank", "many"], "invalid literal"),
        (["--init", "zero"], "init must be one of"),
        (["--method", "ia3"], "invalid choice: 'ia3'"),
    ],
)
def test_values_that_a_setting_cannot_have_are_refused(flags, message, capsys):
    parser = argparse.ArgumentParser()
    add_method_flags(parser.add_argument)
    with pytest.raises(SystemExit):
        parser.parse_args(flags)
    assert message in capsys.readouterr().err


def test_what_cannot_be_registered(shifts):
    class Wide(Method):
        settings = (Setting("rank", 0.5, "Not whole."),)

        def attach(self, model, rank):
            return []

    with pytest.raises(ValueError, match="There is a method 'lora' already"):
        apt_diffusion.register_method("lora", Shifts())
    with pytest.raises(ValueError, match="small letters"):
        apt_diffusion.register_method("My method", Shifts())
    with pytest.raises(TypeError, match="instance of a subclass of Method"):
        apt_diffusion.register_method("shift_class", Shifts)
    with pytest.raises(ValueError, match="setting rank of 'wide' has the type float, that of 'lora' int"):
        apt_diffusion.register_method("wide", Wide())
    assert "wide" not in method_names()
    apt_diffusion.register_method("shifts", Shifts(), exist_ok=True)
    with pytest.raises(ValueError, match="no closed form of what 'full' costs"):
        count_costs("full", hidden_size=1, num_tokens=1, num_modules=1)
    with pytest.raises(ValueError, match="'lora' costs does not depend on alpha"):
        count_costs("lora", hidden_size=1, num_tokens=1, num_modules=1, alpha=2)


def test_configs_are_checked():
    assert MethodConfig("adapter").to_dict() == {"method": "adapter", "trained": None, "bottleneck": 96}
    assert MethodConfig("lora", trained=["a"]) == MethodConfig("lora", rank=4, trained=("a",))
    with pytest.raises(ValueError, match="'apt' has a door of its own: give its APTConfig"):
        MethodConfig("apt", num_prompts=3)
    with pytest.raises(ValueError, match="'adapter' has no setting rank; its settings: bottleneck"):
        MethodConfig("adapter", rank=3)
    with pytest.raises(ValueError, match="'full' has no setting rank; its settings: none"):
        MethodConfig("full", rank=3)
    with pytest.raises(ValueError, match="trained must be a list"):
        MethodConfig("full", trained="pooler")
    assert get_method("apt").config(rank=2) == APTConfig(rank=2)


def test_an_error_while_attaching_leaves_the_model_as_it_was(shifts):
    class Broken(Shifts):
        def attach(self, model, start, every):
            super().attach(model, start, every)
            raise RuntimeError("too late")

    apt_diffusion.register_method("shifts", Broken(), exist_ok=True)
    model = make_vilt()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="too late"):
        add_method(model, MethodConfig("shifts"))
    assert same(before, snapshot(model)) and method_of(model) is None


def test_lora_leaves_an_adapter_of_pefts_alone():
    from peft import LoraConfig, inject_adapter_in_model

    model = make_clip()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    names = set(model.state_dict())
    with pytest.raises(ValueError, match="has an adapter of PEFT's already"):
        add_method(model, MethodConfig("lora"))
    assert set(model.state_dict()) == names


def test_apt_trains_the_heads_that_every_method_trains():
    """Not METER's frozen encoder, whose table of token types has the name of one that is trained."""
    trained = []
    for config in (MethodConfig("classifier_only"), APTConfig(num_prompts=3)):
        model = make_meter(use_classifier_token=True)
        add_method(model, config)
        freeze_for_method(model)
        own = {name for name, _ in method_parameters(model)}
        trained.append({name for name, p in model.named_parameters() if p.requires_grad} - own)
    assert trained[0] == trained[1] and "token_type_embeddings.weight" in trained[0]
    assert not any("text_model" in name for name in trained[0])


def test_an_apt_config_that_names_heads_keeps_them():
    model = make_vilt()
    add_method(model, APTConfig(num_prompts=3, modules_to_save=("layernorm",)))
    freeze_for_method(model)
    heads = {name for name, p in model.named_parameters() if p.requires_grad and ".apt." not in name}
    assert heads == {"layernorm.weight", "layernorm.bias"}
