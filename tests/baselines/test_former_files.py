"""Files that version 0.1 wrote with `save_method`: they load through both doors, and are written in today's form.

`golden/` was made by that version: three prompts of rank 2 (a bottleneck of 5), parameters drawn at random, on the
tiny models of these tests; ViLT's with `trained=("pooler",)`.
"""

from pathlib import Path

import pytest
import torch
from conftest import make_meter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.families import make_clip, make_vilt, same, snapshot

from apt_diffusion import APTConfig, load_apt_weights, save_apt_weights
from apt_diffusion.baselines import MethodConfig, load_method, method_of, remove_method, save_method

GOLDEN = Path(__file__).parent / "golden"
MODELS = {"vilt": make_vilt, "clip": make_clip, "meter": lambda: make_meter(use_classifier_token=True)}
PARTS = ("weight", "bias")
HEADER = "apt_diffusion_method"


def make(kind):
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def golden(method, kind):
    return GOLDEN / f"method_{method}_{kind}.safetensors"


def header(file):
    with safe_open(file, framework="pt") as content:
        return content.metadata()


def values(model):
    """Parameters without the prefix of a CLIP tower, which not every version of transformers has."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("load", [load_apt_weights, load_method])
@pytest.mark.parametrize("kind", MODELS)
def test_apt_loads_through_both_doors(kind, load, tmp_path):
    file, model = golden("apt", kind), make(kind)
    stored, base = load_file(file), values(model)
    load(model, file)
    found = values(model)
    assert stored.keys() <= found.keys() and all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in base.items() if name not in stored)
    assert {name for name in stored if ".apt." not in name} == {
        "vilt": {"pooler.dense.weight", "pooler.dense.bias"},
        "clip": set(),
        "meter": {
            "classifier_token", "token_type_embeddings.weight",
            *(f"cross_modal_{stack}_pooler.dense.{part}" for stack in ("text", "image") for part in PARTS),
        },
    }[kind]  # fmt: skip
    for save in (save_apt_weights, save_method):
        again = save(model, tmp_path / save.__name__)
        assert again.name == "pytorch_apt_weights.safetensors" and HEADER not in header(again)
        assert set(load_file(again)) == {name.replace(".adapters.default", "") for name in stored}
        for other in (load_apt_weights, load_method):
            fresh = make(kind)
            other(fresh, again)
            assert values(fresh).keys() == found.keys()
            assert all(torch.equal(tensor, found[name]) for name, tensor in values(fresh).items())


def test_load_method_gives_apts_config():
    model = make("vilt")
    config = load_method(model, golden("apt", "vilt"))
    assert isinstance(config, APTConfig) and method_of(model) == "apt"
    assert (config.num_prompts, config.rank, config.init, config.query_source) == (3, 2, "paper", "hidden_states")
    assert config.modules_to_save == ("pooler.dense.bias", "pooler.dense.weight")


def test_the_names_of_a_dict_are_read_as_well():
    tensors, model = load_file(golden("apt", "vilt")), make("vilt")
    load_apt_weights(model, tensors, config=APTConfig(num_prompts=3, rank=2, modules_to_save=("pooler",)))
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("method", "kind", "expected"),
    [
        ("lora", "vilt", MethodConfig("lora", rank=2, trained=["pooler"])),
        ("adapter", "clip", MethodConfig("adapter", bottleneck=5)),
    ],
)
def test_other_methods_stay_readable(method, kind, expected, tmp_path):
    model, file = make(kind), golden(method, kind)
    before = snapshot(model)
    assert load_method(model, file) == expected
    found, stored = values(model), load_file(file)
    assert stored.keys() <= found.keys() and all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    again = load_file(save_method(model, tmp_path))
    assert again.keys() == stored.keys() and all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    remove_method(model)
    with pytest.raises(ValueError, match=rf"holds the method '{method}', not APT: load it with .*load_method"):
        load_apt_weights(model, file)
    assert before[0] == snapshot(model)[0] and method_of(model) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "header that cannot be used"),
        ("[]", "names no method"),
        ('{"method": "apt", "num_prompts": "many"}', "num_prompts must be a positive integer"),
        ('{"method": "apt", "num_prompts": 1000000000000, "rank": 2}', "prompts has shape"),
        ('{"method": "apt", "num_prompts": 7, "rank": 2}', "prompts has shape"),
    ],
)
@pytest.mark.parametrize("load", [load_apt_weights, load_method])
def test_a_damaged_header_of_apt_is_refused(load, text, message, tmp_path):
    model, file = make("vilt"), tmp_path / "damaged.safetensors"
    save_file(load_file(golden("apt", "vilt")), file, {HEADER: text})
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load(model, file)
    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"method": "adapter", "bottleneck": 1000000000000, "trained": null}', "none of its tensors has such a dim"),
        ('{"method": "adapter", "bottleneck": true, "trained": null}', "bottleneck must be positive"),
        ('{"method": "adapter", "bottleneck": 5, "trained": "pooler"}', "trained must be a list"),
        ('{"method": "lora", "rank": 5, "trained": null}', "does not fit CLIPModel"),
        ('{"method": "adapter", "bottleneck": 32, "trained": null}', "does not fit CLIPModel"),
    ],
)
def test_a_damaged_header_of_another_method_costs_nothing(text, message, tmp_path):
    """Nothing of the claimed size is made, and the model stays as it was."""
    model, file = make("clip"), tmp_path / "damaged.safetensors"
    save_file(load_file(golden("adapter", "clip")), file, {HEADER: text})
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_method(model, file)
    assert same(before, snapshot(model)) and method_of(model) is None


def test_values_that_are_not_finite_are_refused(tmp_path):
    tensors = load_file(golden("adapter", "clip"))
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors", header(golden("adapter", "clip")))
    model = make("clip")
    before = snapshot(model)
    with pytest.raises(ValueError, match="not finite"):
        load_method(model, tmp_path / "nan.safetensors")
    assert same(before, snapshot(model))
