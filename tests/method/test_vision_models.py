"""What vision-language people use keeps the promises of the behaviour matrix, at the default places of its row."""

import copy
import pickle

import pytest
import torch
from conftest import randomize
from support.families import same, snapshot
from support.vision_models import VISION_MODELS, make_dinov2, make_llava, make_vit, run_llava

import apt_diffusion as apt
from apt_diffusion.api import apt_call, cores_of

pytestmark = pytest.mark.slow

SMALL = apt.APTConfig(num_prompts=4, rank=2)
NAMES = list(VISION_MODELS)


@pytest.fixture(params=NAMES)
def row(request):
    return VISION_MODELS[request.param]


@pytest.fixture
def model(row):
    torch.manual_seed(0)
    return row.make().eval()


@torch.no_grad()
def output(row, model):
    return row.run(model)


def test_an_untrained_adapter_stands_at_the_default_places_and_changes_no_bit(row, model):
    before = output(row, model)
    assert apt.add_apt(model, SMALL) == row.sites
    assert torch.equal(output(row, model), before)


def test_every_parameter_of_an_adapter_is_reached_by_gradients(row, model):
    apt.add_apt(model, SMALL)
    apt.freeze_base(model)
    randomize(model)
    result = row.run(model)
    (result * torch.randn(result.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle and all(p.grad is None for name, p in model.named_parameters() if ".apt." not in name)


def test_what_leaves_an_attention_is_the_equation_of_what_the_bare_one_gives(row, model):
    apt.add_apt(model, SMALL)
    randomize(model)
    for name in row.sites:
        module, calls = model.get_submodule(name), []
        handle = module.register_forward_pre_hook(
            lambda _, args, kwargs, calls=calls: calls.append((args, kwargs)), with_kwargs=True
        )
        output(row, model)
        handle.remove()
        args, kwargs = calls[0]
        with torch.no_grad():
            adapted = module(*args, **kwargs)
            with apt.disable_apt(model):
                bare = module(*args, **kwargs)
            o, y = (out[0] if isinstance(out, tuple) else out for out in (bare, adapted))
            x = args[0] if args else kwargs["hidden_states"]
            expected = module.apt.adapters["default"](o, x)
        assert (y - expected).abs().max() <= 1e-5 * expected.abs().max() and not torch.allclose(y, o, atol=1e-3)


def test_weight_zero_scale_zero_disabled_and_removed_are_the_base_model(row, model):
    before, state = output(row, model), snapshot(model)
    apt.add_apt(model, SMALL)
    randomize(model)
    adapted = output(row, model)
    assert not torch.allclose(adapted, before, atol=1e-4)
    apt.set_apt_adapters(model, "default", 0.0)
    assert torch.equal(output(row, model), before)
    apt.set_apt_adapters(model, "default")
    apt.set_apt_scale(model, 0.0)
    assert torch.equal(output(row, model), before)
    apt.set_apt_scale(model, 1.0)
    with apt.disable_apt(model):
        assert torch.equal(output(row, model), before)
    assert torch.equal(output(row, model), adapted)
    apt.remove_apt(model)
    assert torch.equal(output(row, model), before) and same(state, snapshot(model))


def test_files_swaps_and_copies_give_the_same_outputs(row, model, tmp_path):
    fresh = copy.deepcopy(model)
    apt.add_apt(model, SMALL)
    outputs = {}
    for name, seed in (("a", 1), ("b", 2)):
        randomize(model, seed)
        outputs[name] = output(row, model)
        apt.save_apt_weights(model, tmp_path / name)
    assert sorted(apt.load_apt_weights(fresh, tmp_path / "a")) == sorted(row.sites)
    pickled = pickle.dumps(fresh)  # before it has run: transformers' own hooks cannot be pickled
    assert torch.equal(output(row, fresh), outputs["a"])
    assert torch.equal(output(row, pickle.loads(pickled)), outputs["a"])
    twin = copy.deepcopy(fresh)
    apt.load_apt_weights(fresh, tmp_path / "b", hotswap=True)
    assert torch.equal(output(row, fresh), outputs["b"]) and torch.equal(output(row, twin), outputs["a"])


def test_two_adapters_share_a_batch_or_are_refused(row, model):
    rows = len(output(row, model)) // 2  # of the output per sample: two towers give a text and a picture each
    outputs = {None: output(row, model)}
    for name, seed in (("a", 1), ("b", 2)):
        apt.add_apt(model, SMALL, name)
        for core in cores_of(model):  # the one before keeps its values
            generator = torch.Generator().manual_seed(seed)
            for parameter in core.adapters[name].parameters():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        apt.set_apt_adapters(model, name)
        outputs[name] = output(row, model)
    for samples in (["a", "b"], ["b", None]):
        if not row.per_sample:
            with (
                pytest.raises(ValueError, match="One adapter per sample needs"),
                apt_call(model, adapter_names=samples),
            ):
                output(row, model)
            continue
        with apt_call(model, adapter_names=samples):
            found = output(row, model)
        for index in range(2 * rows):
            alone = outputs[samples[index % 2]][index]
            torch.testing.assert_close(found[index], alone, rtol=1e-4, atol=1e-5)
    apt.set_apt_adapters(model, ["a", "b"], [0.0, 1.0])
    torch.testing.assert_close(output(row, model), outputs["b"], rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(row, model):
    apt.add_apt(model, SMALL)
    apt.freeze_base(model)
    randomize(model)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            model.disable_input_require_grads()  # with it BLIP fails on a frozen base, without APT, too
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        result = row.run(model)
        (result * torch.randn(result.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) >= 5 * len(row.sites)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_in_bfloat16_next_to_lora(row, model):
    from peft import LoraConfig, inject_adapter_in_model

    model = model.to(torch.bfloat16)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=r".*\.(q_proj|query|qkv)", init_lora_weights=False), model)
    before = output(row, model)
    assert apt.add_apt(model, SMALL) == row.sites
    assert torch.equal(output(row, model), before)
    randomize(model)
    adapted = output(row, model)
    assert adapted.isfinite().all() and not torch.allclose(adapted.float(), before.float(), atol=1e-2)
    with apt.disable_apt(model):
        assert torch.equal(output(row, model), before)


@pytest.mark.parametrize(
    ("feature_layer", "layers"), [(-1, [0, 1, 2]), (-2, [0, 1]), (1, [0]), ([-3, -2], [0, 1]), ([0, 3], [0, 1, 2])]
)
def test_llava_leaves_out_the_layers_that_it_does_not_read(feature_layer, layers):
    torch.manual_seed(0)
    model = make_llava(feature_layer).eval()
    names = apt.add_apt(model, SMALL)
    assert names == [f"model.vision_tower.encoder.layers.{index}.self_attn" for index in layers]
    apt.freeze_base(model)
    randomize(model)
    run_llava(model).square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_packed_tokens_have_no_adapter_per_sample_at_named_places_either():
    """Of a model without a row, too: the shape tells."""

    class PackedAttention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_dim, self.proj = 8, torch.nn.Linear(8, 8)

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.proj(hidden_states)

    model = torch.nn.ModuleDict({"attn": PackedAttention()})
    for name in ("a", "b"):
        apt.add_apt(model, apt.APTConfig(num_prompts=2, target_modules=["attn"]), name)
    with (
        pytest.raises(ValueError, match="tokens of all samples in one row"),
        apt_call(model, adapter_names=["a", "b"]),
    ):
        model["attn"](torch.randn(6, 8))


@pytest.mark.parametrize("make", [make_vit, make_dinov2])
def test_a_compiled_vision_tower_is_the_same(make):
    torch.manual_seed(0)
    model = make().eval()
    apt.add_apt(model, SMALL)
    randomize(model)
    row = VISION_MODELS["vit"]
    expected = output(row, model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(output(row, compiled), expected, rtol=1e-5, atol=1e-6)
    apt.set_apt_scale(model, 0.0)
    apt.remove_apt(model)
