"""Wrappers around a model are seen through by every function, or refused with a sentence."""

import copy

import pytest
import torch
from conftest import make_text_encoder, randomize
from support.families import text_output
from torch import nn

import apt_diffusion as apt
from apt_diffusion.api import cores_of
from apt_diffusion.io.files import read_adapter_file

SMALL = apt.APTConfig(num_prompts=6, rank=2)


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    """One process is a group, too."""
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))


def content(file):
    """Tensors and header; the order of a header's entries differs from write to write."""
    adapter = read_adapter_file(file)
    return {key: tensor.tolist() for key, tensor in adapter.tensors.items()}, adapter.metadata


def fully_sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in model.encoder.layers if hasattr(model, "encoder") else model.text_model.encoder.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {
    "compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "DDP": ddp,
    "compile of DDP": lambda model: torch.compile(ddp(model)),
    "DDP of compile": lambda model: ddp(torch.compile(model)),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = make_text_encoder().eval()
    apt.add_apt(model, SMALL)
    randomize(model)
    return model


def numbers(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_function_sees_through(model, wrapper, tmp_path):
    plain = copy.deepcopy(model)
    wrapped = WRAPPERS[wrapper](model)
    assert apt.freeze_base(wrapped) == apt.freeze_base(plain)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in plain.named_parameters() if p.requires_grad
    }
    assert apt.get_list_apt_adapters(wrapped) == apt.get_active_apt_adapters(wrapped) == ["default"]
    file = apt.save_apt_weights(wrapped, tmp_path / "wrapped")
    assert content(file) == content(apt.save_apt_weights(plain, tmp_path / "plain"))
    apt.set_apt_adapters(wrapped, "default", 0.5)
    apt.set_apt_scale(wrapped, 0.5)
    apt.set_apt_adapters(plain, "default", 0.5)
    apt.set_apt_scale(plain, 0.5)
    with torch.no_grad():
        assert torch.equal(text_output(model), text_output(plain))
        with apt.disable_apt(wrapped), apt.disable_apt(plain):
            assert torch.equal(text_output(model), text_output(plain))
        for target in (wrapped, plain):
            apt.load_apt_weights(target, file, hotswap=True)
        with apt.apt_call(wrapped, 0.3, ["default", None]), apt.apt_call(plain, 0.3, ["default", None]):
            assert torch.equal(text_output(model), text_output(plain))
    assert apt.warn_untrained(wrapped) == apt.warn_untrained(plain)
    apt.delete_apt_adapters(wrapped, "default")
    assert not list(cores_of(model)) and apt.get_list_apt_adapters(wrapped) == []


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if "DDP" in name])
def test_adapters_that_would_not_be_synchronised_are_refused(model, wrapper, tmp_path):
    """DDP has built its buckets; a loaded adapter of the same name must not be replaced either."""
    file = apt.save_apt_weights(model, tmp_path)
    wrapped = WRAPPERS[wrapper](model)
    before = numbers(model)
    for call in (lambda: apt.add_apt(wrapped, SMALL, "b"), lambda: apt.load_apt_weights(wrapped, file, "b")):
        with pytest.raises(
            ValueError, match=r"DistributedDataParallel has registered .* `DistributedDataParallel.module`"
        ):
            call()
    for call in (lambda: apt.add_apt(wrapped.module if wrapper == "DDP" else model, SMALL, "default"),):
        with pytest.raises(ValueError, match="already in use"):
            call()
    assert all(torch.equal(tensor, before[key]) for key, tensor in numbers(model).items())
    assert apt.add_apt(model, SMALL, "b")


@pytest.mark.parametrize("wrapper", ["compile", "DataParallel"])
def test_adapters_are_added_through_wrappers_that_share_nothing(wrapper):
    torch.manual_seed(0)
    model = make_text_encoder().eval()
    assert apt.add_apt(WRAPPERS[wrapper](model), SMALL) == apt.add_apt(make_text_encoder(), SMALL)
    assert apt.get_list_apt_adapters(model) == ["default"]


def test_fsdp(model, tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    expected = content(apt.save_apt_weights(model, tmp_path / "plain"))
    wrapped = fsdp(model)
    assert apt.get_list_apt_adapters(wrapped) == ["default"]
    with pytest.raises(ValueError, match=r"sharded by FullyShardedDataParallel.*summon_full_params"):
        apt.save_apt_weights(wrapped, tmp_path / "sharded")
    assert not (tmp_path / "sharded").exists()
    with pytest.raises(ValueError, match="FullyShardedDataParallel has registered"):
        apt.add_apt(wrapped, SMALL, "b")
    with FullyShardedDataParallel.summon_full_params(wrapped):
        assert content(apt.save_apt_weights(wrapped, tmp_path / "full")) == expected
    apt.set_apt_scale(wrapped, 0.0)
    assert {core.scale for core in cores_of(wrapped)} == {0.0}


def test_fully_shard(model, tmp_path):
    """FSDP's second version changes the class in place, and parameters become distributed tensors."""
    expected = content(apt.save_apt_weights(model, tmp_path / "plain"))
    counts = apt.freeze_base(copy.deepcopy(model))
    sharded = fully_sharded(model)
    assert apt.freeze_base(sharded) == counts
    assert content(apt.save_apt_weights(sharded, tmp_path / "sharded")) == expected
    apt.set_apt_adapters(sharded, "default", 0.5)
    assert apt.get_active_apt_adapters(sharded) == ["default"]
    with pytest.raises(ValueError, match="FSDPModule has registered"):
        apt.add_apt(sharded, SMALL, "b")
    with torch.no_grad():
        assert text_output(sharded).isfinite().all()
        for parameter in sharded.parameters():
            parameter.mul_(0.5)
    apt.load_apt_weights(sharded, tmp_path / "plain", hotswap=True)
    assert content(apt.save_apt_weights(sharded, tmp_path / "swapped")) == expected


def test_a_wrapper_inside_keeps_names(tmp_path):
    """Blocks that are compiled, or whose activations are recomputed, carry a segment in their modules' names."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    torch.manual_seed(0)
    plain = make_text_encoder().eval()
    inside = copy.deepcopy(plain)
    layers = inside.encoder.layers if hasattr(inside, "encoder") else inside.text_model.encoder.layers
    layers[0] = torch.compile(layers[0], backend="eager")
    layers[1] = checkpoint_wrapper(layers[1])
    assert apt.add_apt(inside, SMALL) == apt.add_apt(plain, SMALL)
    randomize(plain)
    randomize(inside)
    file = apt.save_apt_weights(plain, tmp_path / "plain")
    assert content(apt.save_apt_weights(inside, tmp_path / "inside")) == content(file)
    with torch.no_grad():
        expected = text_output(plain)
        torch.testing.assert_close(text_output(inside), expected, rtol=1e-4, atol=1e-5)
        apt.remove_apt(inside)
        apt.load_apt_weights(inside, file)
        torch.testing.assert_close(text_output(inside), expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_freezing_after_ddp_is_said(model, caplog):
    """Its buckets hold the base's parameters, which get no gradients from then on."""
    apt.freeze_base(ddp(model))
    assert "wrap the model after freeze_base" in caplog.text
    caplog.clear()
    apt.freeze_base(model)
    apt.freeze_base(ddp(model))
    assert not caplog.text


def test_in_a_pipeline(pipe, tiny_sd_path, tmp_path):
    apt.add_apt(pipe, SMALL)
    randomize(pipe)
    expected = content(apt.save_apt_weights(pipe, tmp_path / "plain"))
    components = {"unet": nn.DataParallel(pipe.unet), "text_encoder": torch.compile(pipe.text_encoder)}
    assert apt.get_list_apt_adapters(components) == {"unet": ["default"], "text_encoder": ["default"]}
    again = apt.save_apt_weights(components, tmp_path / "again", metadata={"base_model": tiny_sd_path.name})
    assert content(again) == expected
