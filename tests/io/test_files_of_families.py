"""The behaviour matrix of files: what every architecture promises of saving, loading and heads."""

import copy
import dataclasses

import pytest
import torch
from conftest import randomize
from safetensors.torch import save_file
from support.families import FAMILIES, SMALL, output, same, snapshot

import apt_diffusion as apt
from apt_diffusion.api import cores_of
from apt_diffusion.heads import head_tensors
from apt_diffusion.io.files import read_adapter_file


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def model(family):
    torch.manual_seed(0)
    return family.make().eval()


def with_heads(family):
    return dataclasses.replace(SMALL, modules_to_save=family.heads)


def train(family, model):
    """Stands for a training: every parameter that `freeze_base` leaves trainable gets another value that acts."""
    apt.freeze_base(model)
    randomize(model)
    generator = torch.Generator().manual_seed(7)
    heads = head_tensors(model, family.heads)
    assert heads and all(tensor.requires_grad for tensor in heads.values())
    with torch.no_grad():
        for tensor in heads.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return output(family, model)


def test_saving_and_loading_restore_prompts_and_heads(family, model, tmp_path):
    """In the model that was trained, and in another process's copy of the base model."""
    untouched, base = snapshot(model), output(family, model)
    other = copy.deepcopy(model)
    apt.add_apt(model, with_heads(family))
    trainable, _ = apt.freeze_base(model)
    trained = train(family, model)
    adapters = sum(p.numel() for core in cores_of(model) for p in core.parameters())
    assert trainable == adapters + sum(tensor.numel() for tensor in head_tensors(model, family.heads).values())
    assert not torch.allclose(trained, base, atol=1e-3)
    with apt.disable_apt(model):
        assert torch.equal(output(family, model), base)  # the base model with its own heads
    file = apt.save_apt_weights(model, tmp_path)
    apt.remove_apt(model)
    assert same(untouched, snapshot(model)) and torch.equal(output(family, model), base)
    for loader in (model, other):
        assert sorted(apt.load_apt_weights(loader, file if loader is model else tmp_path)) == sorted(family.sites)
        assert torch.equal(output(family, loader), trained)
        assert apt.freeze_base(loader)[0] == trainable
        loader.requires_grad_(True)
        apt.remove_apt(loader)
        assert same(untouched, snapshot(loader)) and torch.equal(output(family, loader), base)


def test_heads_belong_to_their_adapter(family, model):
    base = output(family, model)
    apt.add_apt(model, with_heads(family), "a")
    trained = train(family, model)
    apt.add_apt(model, dataclasses.replace(with_heads(family), init="identity"), "b")
    assert torch.equal(output(family, model), base)  # a new adapter begins with the base's heads
    apt.set_apt_adapters(model, "a")
    assert torch.equal(output(family, model), trained)
    apt.remove_apt(model, "a")
    apt.set_apt_adapters(model, "b")
    assert torch.equal(output(family, model), base)


def damage(tensors, header, kind, heads):
    """Changes a file's contents and says what the error must name."""
    prompts = next(key for key in tensors if key.endswith(".prompts"))
    head = next(key for key in tensors if ".apt" not in key)
    match kind:
        case "a prompt is missing":
            del tensors[prompts]
            return "lacks 1 tensors"
        case "a head is missing":
            del tensors[head]
            return rf"lacks 1 tensors \({head}\)"
        case "one too many":
            tensors["no.such.head.weight"] = torch.zeros(3)
            return "unexpected 1 tensors .*no.such.head"
        case "prompts of another width":
            tensors[prompts] = torch.zeros(6, 7)
            return r"has shape \(6, 7\), this model needs"
        case "a head of another size":
            tensors[head] = torch.zeros(3, 5, 7)
            return rf"{head} is \(3, 5, 7\) in the file"
        case "not a number":
            tensors[prompts] = torch.full_like(tensors[prompts], torch.nan)
            return "not finite"
        case "heads that the model lacks":
            header["apt_config"] = header["apt_config"].replace(f'"{heads[0]}"', '"no_such_head"')
            return "no_such_head"


@pytest.mark.parametrize(
    "kind",
    [
        "a prompt is missing", "a head is missing", "one too many", "prompts of another width",
        "a head of another size", "not a number", "heads that the model lacks",
    ],
)  # fmt: skip
def test_a_failed_load_leaves_everything_as_it_was(family, model, tmp_path, kind):
    apt.add_apt(model, with_heads(family), "first")
    trained = train(family, model)
    file = apt.save_apt_weights(model, tmp_path, "first")
    before = snapshot(model)
    content = read_adapter_file(file)
    message = damage(content.tensors, content.metadata, kind, family.heads)
    save_file(content.tensors, file, metadata=content.metadata)
    with pytest.raises(ValueError, match=message):
        apt.load_apt_weights(model, file, "second")
    assert same(before, snapshot(model)) and torch.equal(output(family, model), trained)
    assert apt.get_list_apt_adapters(model) == apt.get_active_apt_adapters(model) == ["first"]


def test_files_of_other_architectures_are_refused(family, model, tmp_path):
    for name, other in FAMILIES.items():
        stranger = other.make()
        apt.add_apt(stranger, SMALL)
        apt.save_apt_weights(stranger, tmp_path / name)
    before, base = snapshot(model), output(family, model)
    for name, other in FAMILIES.items():
        if other is not family:
            with pytest.raises(ValueError, match=f"does not fit {type(model).__name__}|damaged, or made for another"):
                apt.load_apt_weights(model, tmp_path / name)
    assert same(before, snapshot(model)) and torch.equal(output(family, model), base)
