"""`state_dict()` of adapted models: the whole model's has the adapters in it, a part's is the base's."""

import copy

import pytest
import torch
from conftest import make_unet, randomize
from support.families import FAMILIES, SMALL, output, unet_output

import apt_diffusion as apt
from apt_diffusion.api import cores_of


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return make_unet().eval()


@pytest.fixture
def adapted(unet):
    adapted = copy.deepcopy(unet)
    apt.add_apt(adapted, SMALL)
    randomize(adapted)
    return adapted


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_controlnet_is_made_from_an_adapted_unet(unet, adapted):
    from diffusers import ControlNetModel

    def make(model):
        torch.manual_seed(1)
        return ControlNetModel.from_unet(model, conditioning_embedding_out_channels=(8, 16, 32))

    assert same(make(adapted).state_dict(), make(unet).state_dict())


def test_animatediff_is_made_from_an_adapted_unet(unet, adapted, tmp_path):
    """And the UNet's file loads on it: the same places, none of them in motion modules."""
    from diffusers import MotionAdapter, UNetMotionModel

    motion = MotionAdapter(block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=8,
                           motion_num_attention_heads=4, use_motion_mid_block=True)  # fmt: skip

    def make(model):
        torch.manual_seed(1)
        return UNetMotionModel.from_unet2d(model, copy.deepcopy(motion)).eval()

    video = make(adapted)
    assert same(video.state_dict(), make(unet).state_dict())
    assert any("motion_modules" in name and name.endswith("attn2") for name, _ in video.named_modules())
    assert apt.add_apt(video, SMALL) == [name for name, m in video.named_modules() if hasattr(m, "apt")]
    assert sorted(apt.add_apt(make_unet(), SMALL)) == sorted(n for n, m in video.named_modules() if hasattr(m, "apt"))
    apt.remove_apt(video)
    with torch.no_grad():
        arguments = torch.randn(1, 4, 3, 8, 8), 7
        context = torch.randn(1, 5, 32).repeat(3, 1, 1)  # for each of the three frames
        base = video(*arguments, encoder_hidden_states=context).sample
        assert apt.load_apt_weights(video, apt.save_apt_weights(adapted, tmp_path))
        changed = video(*arguments, encoder_hidden_states=context).sample
    assert not torch.allclose(changed, base, atol=1e-4)
    expected = {name: core.state_dict() for name, core in apt_cores(adapted)}
    assert expected.keys() == dict(apt_cores(video)).keys()
    assert all(same(core.state_dict(), expected[name]) for name, core in apt_cores(video))


def apt_cores(model):
    from apt_diffusion.model import named_cores

    return named_cores(model)


@pytest.mark.parametrize("key", FAMILIES)
def test_the_whole_state_has_the_adapters(key):
    family = FAMILIES[key]
    torch.manual_seed(0)
    model = family.make().eval()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apt.add_apt(model, SMALL)
    randomize(model)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters = [name for name, _ in model.named_parameters() if ".apt." in name]
    assert whole.keys() == base.keys() | set(adapters)
    expected = output(family, model)
    randomize(model, seed=9)
    assert not torch.equal(output(family, model), expected)
    model.load_state_dict(whole, strict=True)
    assert torch.equal(output(family, model), expected)
    model.load_state_dict(base, strict=True)  # the base's state: the adapters keep their values
    assert torch.equal(output(family, model), expected)
    apt.remove_apt(model)
    assert same(model.state_dict(), base)


def test_a_state_that_lost_some_adapters_is_refused(adapted):
    state = adapted.state_dict()
    lost = {name: tensor for name, tensor in state.items() if not name.startswith("mid_block") or ".apt." not in name}
    assert len(lost) < len(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*mid_block.*apt\.adapters\.default\.prompts"):
        adapted.load_state_dict(lost)
    one = {
        name: tensor
        for name, tensor in state.items()
        if not name.endswith("mid_block.attentions.0.transformer_blocks.0.attn2.apt.adapters.default.gate")
    }
    with pytest.raises(RuntimeError, match="Missing key"):
        adapted.load_state_dict(one)


def test_a_state_with_adapters_is_refused_by_a_base(unet, adapted):
    with pytest.raises(RuntimeError, match=r"Unexpected key.*\.apt\."):
        unet.load_state_dict(adapted.state_dict())


def test_parts_are_saved_and_loaded_without_adapters(unet, adapted):
    expected = unet_output_of(adapted)
    for name in ("mid_block", "down_blocks", "down_blocks.1.attentions.0.transformer_blocks.0.attn2"):
        part = adapted.get_submodule(name)
        assert same(part.state_dict(), unet.get_submodule(name).state_dict())
        part.load_state_dict(part.state_dict(), strict=True)
    assert unet_output_of(adapted).equal(expected)
    core = next(cores_of(adapted))
    assert {"adapters.default.prompts", "adapters.default.gate"} <= set(core.state_dict())
    core.load_state_dict(core.state_dict())


@torch.no_grad()
def unet_output_of(model):
    return unet_output(model)


def test_inside_a_larger_module(adapted):
    """A trainer's own module around the UNet: checkpoints have the adapters."""
    outer = torch.nn.ModuleDict({"unet": adapted, "other": torch.nn.Linear(2, 2)})
    state = outer.state_dict()
    assert {f"unet.{name}" for name in adapted.state_dict()} | {"other.weight", "other.bias"} == set(state)
    assert any(".apt." in name for name in state)
    outer.load_state_dict({name: tensor for name, tensor in state.items() if ".apt." not in name})
    outer.load_state_dict(state)


def test_averages_of_all_parameters(adapted):
    from diffusers.training_utils import EMAModel

    ema = EMAModel(adapted.parameters(), decay=0.5)
    before = unet_output_of(adapted)
    kept = [p.detach().clone() for p in adapted.parameters()]
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.1)
    ema.step(adapted.parameters())
    ema.copy_to(adapted.parameters())
    for parameter, old in zip(adapted.parameters(), kept, strict=True):
        assert ((parameter - old) > -1e-6).all() and (parameter - old).max() <= 0.1 + 1e-5
    assert not unet_output_of(adapted).equal(before)


def test_deepcopies_and_what_is_saved_as_the_base(unet, adapted, tmp_path):
    clone = copy.deepcopy(adapted)
    assert same(clone.state_dict(), adapted.state_dict())
    assert unet_output_of(clone).equal(unet_output_of(adapted))
    adapted.save_pretrained(tmp_path)
    assert unet_output_of(type(unet).from_pretrained(tmp_path).eval()).equal(unet_output_of(unet))
