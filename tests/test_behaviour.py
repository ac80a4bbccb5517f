"""The behaviour matrix: one set of promises, held by every architecture."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from conftest import make_meter, make_text_encoder, make_unet, meter_inputs, randomize

import apt_diffusion as apt
from apt_diffusion.attach import cores_of
from apt_diffusion.core import ApproximatedPrompt


@dataclass
class Family:
    make: Callable[[], torch.nn.Module]
    run: Callable[[torch.nn.Module], torch.Tensor]
    sites: list[str]
    default_init: str


def unet_output(model):
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    sample = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    context = torch.randn(2, 5, 32, generator=generator).to(dtype)
    return model(sample, torch.tensor([3, 700]), encoder_hidden_states=context).sample


def text_output(model):
    tokens = torch.tensor([[512, 3, 9, 27, 513, 513], [512, 5, 6, 7, 8, 513]])
    return model(input_ids=tokens).last_hidden_state


def clip_output(model):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 16, 16, generator=generator).to(next(model.parameters()).dtype)
    tokens = torch.tensor([[512, 3, 9, 27, 513, 513], [512, 5, 6, 7, 8, 513]])
    return model(input_ids=tokens, pixel_values=pixels).logits_per_image


def vilt_output(model):
    torch.manual_seed(0)  # ViLT draws its image patches at random
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[2, 3, 9, 27], [5, 6, 7, 8]])
    return model(input_ids=tokens, pixel_values=pixels.to(next(model.parameters()).dtype)).pooler_output


def make_clip():
    from transformers import CLIPConfig, CLIPModel

    text = make_text_encoder().config.to_dict()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def make_vilt():
    from transformers import ViltConfig, ViltModel

    config = ViltConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    return ViltModel(config)


def meter_output(model):
    batch = meter_inputs()
    pixels = batch.pop("pixel_values").to(next(model.parameters()).dtype)
    return model(pixel_values=pixels, **batch).pooler_output


FAMILIES = {
    "unet": Family(
        make_unet,
        unet_output,
        [
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2",
            "up_blocks.0.attentions.0.transformer_blocks.0.attn2",
            "up_blocks.0.attentions.1.transformer_blocks.0.attn2",
            "mid_block.attentions.0.transformer_blocks.0.attn2",
        ],
        "identity",
    ),
    "text_encoder": Family(
        make_text_encoder, text_output, [f"encoder.layers.{i}.self_attn" for i in range(3)], "identity"
    ),
    "clip": Family(
        make_clip,
        clip_output,
        [
            *[f"text_model.encoder.layers.{i}.self_attn" for i in range(3)],
            *[f"vision_model.encoder.layers.{i}.self_attn" for i in range(2)],
        ],
        "paper",
    ),
    "meter": Family(
        make_meter,
        meter_output,
        [
            f"cross_modal_{tower}_layers.{i}.{kind}"
            for tower in ("text", "image")
            for i in range(2)
            for kind in ("attention", "crossattention")
        ],
        "paper",
    ),
    "vilt": Family(make_vilt, vilt_output, [f"encoder.layer.{i}.attention" for i in range(2)], "paper"),
}
SMALL = apt.APTConfig(num_prompts=6, rank=2)


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def model(family):
    torch.manual_seed(0)
    return family.make().eval()


@torch.no_grad()
def output(family, model):
    return family.run(model)


def snapshot(model):
    hooks = [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs))
        for name, m in model.named_modules()
    ]
    attributes = {name: sorted(set(vars(m)) - {"_is_hf_initialized"}) for name, m in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return hooks, attributes, state


def same(before, after):
    return (
        before[:2] == after[:2]
        and before[2].keys() == after[2].keys()
        and all(torch.equal(value, after[2][key]) for key, value in before[2].items())
    )


def test_default_sites_and_counts(family, model):
    base = sum(p.numel() for p in model.parameters())
    assert apt.add_apt(model, SMALL) == family.sites
    trainable, total = apt.freeze_base(model)
    widths = [core.hidden_size for core in cores_of(model)]
    gate = 1 if family.default_init == "identity" else 0
    assert trainable == sum(6 * d + 2 * d * 2 + 1 + gate for d in widths)
    assert total == base + trainable
    assert all((".apt" in name) == p.requires_grad for name, p in model.named_parameters())


def test_untrained_identity_changes_nothing_and_training_moves_it(family, model):
    before = output(family, model)
    apt.add_apt(model, apt.APTConfig(num_prompts=6, rank=2, init="identity"))
    assert torch.equal(output(family, model), before)
    apt.freeze_base(model)
    result = family.run(model)
    (result * torch.randn(result.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    gates = [core.adapters["default"].gate for core in cores_of(model)]
    assert all(gate.grad.abs() > 0 for gate in gates)


def test_hook_applies_the_equation_at_every_site(family, model):
    """What flows out of each attention is `ApproximatedPrompt` of what the bare attention gave, nothing else."""
    apt.add_apt(model, dataclasses.replace(SMALL, query_source="hidden_states", streams=["query"]))
    randomize(model)
    seen = {}
    modules = dict(model.named_modules())

    def record(module, args, kwargs, out):
        x = args[0] if args else kwargs["hidden_states"]
        seen[module] = (x.detach(), (out[0] if isinstance(out, tuple) else out).detach())

    for name in family.sites:
        modules[name].register_forward_hook(record, with_kwargs=True)
    output(family, model)
    adapted = dict(seen)
    for name in family.sites:
        module = modules[name]
        core = module._modules.pop("apt")
        module._forward_hooks.clear()
        module.register_forward_hook(record, with_kwargs=True)
        x, y = adapted[module]
        inputs = capture_inputs(family, model, module)
        out = module(*inputs[0], **inputs[1])
        o = out[0] if isinstance(out, tuple) else out
        expected = core.adapters["default"](o, x)
        assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert not torch.allclose(y, o)
        module._modules["apt"] = core
        module._forward_hooks.clear()
        from apt_diffusion.processor import apply_apt

        module.register_forward_hook(apply_apt, with_kwargs=True)


def capture_inputs(family, model, module):
    captured = {}

    def keep(_, args, kwargs):
        captured["inputs"] = (args, kwargs)

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    hooks = dict(module._forward_hooks)
    module._forward_hooks.clear()
    core_free = torch.no_grad()
    with core_free:
        family.run(model)
    module._forward_hooks.update(hooks)
    handle.remove()
    return captured["inputs"]


def test_weight_zero_scale_zero_and_disable_are_the_base_model(family, model):
    before = output(family, model)
    apt.add_apt(model, SMALL)
    randomize(model)
    adapted = output(family, model)
    assert not torch.allclose(adapted, before, atol=1e-4)
    apt.set_apt_adapters(model, "default", 0.0)
    assert torch.equal(output(family, model), before)
    apt.set_apt_adapters(model, "default")
    apt.set_apt_scale(model, 0.0)
    assert torch.equal(output(family, model), before)
    apt.set_apt_scale(model, 1.0)
    with apt.disable_apt(model):
        assert torch.equal(output(family, model), before)
    assert torch.equal(output(family, model), adapted)
    apt.disable_apt(model)
    assert torch.equal(output(family, model), before)
    apt.enable_apt(model)
    assert torch.equal(output(family, model), adapted)


def test_remove_leaves_no_trace(family, model):
    untouched = snapshot(model)
    before = output(family, model)
    apt.add_apt(model, SMALL, "a")
    apt.add_apt(model, apt.APTConfig(num_prompts=3, rank=1), "b")
    randomize(model)
    apt.remove_apt(model, "a")
    assert apt.get_list_apt_adapters(model) == ["b"]
    apt.remove_apt(model)
    assert same(untouched, snapshot(model))
    assert torch.equal(output(family, model), before)


def test_strength_interpolates_and_adapters_add_up(family, model):
    """One site: `Y = O + Σ λ_i (Y_i − O)`, from the adapters' own outputs."""
    apt.add_apt(model, SMALL, "a")
    apt.add_apt(model, SMALL, "b")
    randomize(model)
    apt.set_apt_adapters(model, ["a", "b"], [0.3, -1.2])
    core = next(cores_of(model))
    o, x = torch.randn(2, 3, core.hidden_size), torch.randn(2, 3, core.hidden_size)
    source = {"hidden_states": x, "attn_output": o}
    expected = o.clone()
    for name, weight in (("a", 0.3), ("b", -1.2)):
        expected += weight * (core.adapters[name](o, source[core.query_sources[name]]) - o)
    torch.testing.assert_close(core(o, x), expected, rtol=1e-5, atol=1e-5)


def test_adapter_per_sample_equals_separate_passes(family, model):
    apt.add_apt(model, SMALL, "a")
    apt.add_apt(model, apt.APTConfig(num_prompts=9, rank=2), "b")
    randomize(model)
    core = next(cores_of(model))
    o, x = torch.randn(6, 4, core.hidden_size), torch.randn(6, 4, core.hidden_size)
    core.adapters_per_sample = ("a", None, "b")  # twice: classifier-free guidance stacks two batches
    mixed = core(o, x)
    core.adapters_per_sample = None
    for row, name in enumerate(("a", None, "b") * 2):
        core.weights = {} if name is None else {name: 1.0}
        torch.testing.assert_close(mixed[row], core(o, x)[row], rtol=1e-5, atol=1e-6)
    core.adapters_per_sample = ("a", "b", "a", "b")
    with pytest.raises(ValueError, match="batch of 6"):
        core(o, x)


def test_deepcopy_and_pickle_are_independent(family, model):
    apt.add_apt(model, SMALL)
    randomize(model)
    adapted = output(family, model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(family, clone), adapted)
        randomize(clone, seed=5)
        assert not torch.equal(output(family, clone), adapted)
        assert torch.equal(output(family, model), adapted)
        apt.remove_apt(clone)
    assert torch.equal(output(family, model), adapted)


def test_gradient_checkpointing_gives_the_same_gradients(family, model):
    apt.add_apt(model, SMALL)
    randomize(model)
    apt.freeze_base(model)
    model.train()

    def gradients():
        model.zero_grad()
        result = family.run(model)
        (result * torch.randn(result.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    (model.enable_gradient_checkpointing if hasattr(model, "enable_gradient_checkpointing") else
     model.gradient_checkpointing_enable)()  # fmt: skip
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_moves_with_the_model(family, model, dtype):
    apt.add_apt(model, SMALL)
    randomize(model)
    reference = output(family, model).double()
    model.to(dtype)
    assert all(p.dtype == dtype for core in cores_of(model) for p in core.parameters())
    moved = output(family, model)
    assert moved.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float64 else 0.2
    assert (moved.double() - reference).abs().max() <= tolerance * reference.abs().max()
    apt.add_apt(model, SMALL, "late")
    assert {p.dtype for p in next(cores_of(model)).adapters["late"].parameters()} == {dtype}


def test_folded_weights_follow_every_change(family, model):
    """In prepared inference keys are folded once, and each way of changing a weight is seen."""
    apt.add_apt(model, SMALL)
    randomize(model)
    core = next(cores_of(model))
    adapter: ApproximatedPrompt = core.adapters["default"]
    x = torch.randn(1, 4, core.hidden_size)
    o = torch.randn(1, 4, core.hidden_size)
    query = x if core.query_sources["default"] == "hidden_states" else o

    @torch.no_grad()
    def check():
        torch.testing.assert_close(core(o, x), adapter(o, query), rtol=1e-5, atol=1e-6)
        folded = core._folded["default"][1]
        core(o, x)
        assert core._folded["default"][1] is folded and not folded.keys.requires_grad

    with apt.prepared_apt(model):
        check()
        with torch.no_grad():
            adapter.prompts.mul_(2.0)
        check()
        adapter.log_scale.data = torch.tensor([0.5])
        check()
        model.load_state_dict({k: v * 1.5 if ".apt" in k else v for k, v in model.state_dict().items()})
        check()
        optimizer = torch.optim.SGD(core.parameters(), lr=1e-3)
        core(o, x).square().mean().backward()
        optimizer.step()
        check()
        apt.set_apt_adapters(model, "default", 0.5)
        with torch.no_grad():
            half = core(o, x)
            torch.testing.assert_close(half, o + 0.5 * (adapter(o, query) - o), rtol=1e-5, atol=1e-5)
    assert not core._folded and not core.keep_folded


def test_context_stream_is_the_equation_on_the_encoder_states():
    """`streams=["context"]`: keys and values are those of Y(O := c, X := c), at every site."""
    torch.manual_seed(0)
    unet = make_unet().eval()
    bare = copy.deepcopy(unet)
    apt.add_apt(unet, dataclasses.replace(SMALL, streams=["context"]))
    randomize(unet)
    states, context = torch.randn(2, 9, 64), torch.randn(2, 5, 32)
    with torch.no_grad():
        for name in FAMILIES["unet"].sites:
            adapter = unet.get_submodule(name).apt_context.adapters["default"]
            corrected = adapter(context, context)
            assert not torch.allclose(corrected, context, atol=1e-2)
            expected = bare.get_submodule(name)(states, encoder_hidden_states=corrected)
            actual = unet.get_submodule(name)(states, encoder_hidden_states=context)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_scales_and_weights_do_not_compile_anew():
    torch.manual_seed(0)
    unet = make_unet().eval()
    apt.add_apt(unet, SMALL)
    randomize(unet)
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(unet, backend=backend, fullgraph=True)
    with torch.no_grad():
        for scale in torch.linspace(0.1, 0.9, 12).tolist():
            apt.set_apt_scale(unet, scale)
            apt.set_apt_adapters(unet, "default", 1 - scale)
            torch.testing.assert_close(unet_output(compiled), unet_output(unet), rtol=1e-5, atol=1e-5)
    assert len(graphs) <= 2  # torch takes a number for a constant until it sees it change
    torch._dynamo.reset()


def test_attachment_after_a_compiled_call_is_seen(family, model):
    if family.run is vilt_output:
        model = model.encoder  # the whole ViltModel has data-dependent shapes, with or without APT

    def run(m):
        if family.run is vilt_output:
            states = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
            return m(states, torch.zeros(1, 1, 1, 4)).last_hidden_state
        return family.run(m)

    sites = family.sites if family.run is not vilt_output else [name.removeprefix("encoder.") for name in family.sites]
    settings = apt.APTConfig(num_prompts=6, rank=2, target_modules=sites)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(run(compiled), run(model), rtol=1e-4, atol=1e-5)
        base = run(model)
        apt.add_apt(model, settings)
        randomize(model)
        eager = run(model)
        assert not torch.allclose(eager, base, atol=1e-4)
        torch.testing.assert_close(run(compiled), eager, rtol=1e-4, atol=1e-5)
        apt.disable_apt(model)
        torch.testing.assert_close(run(compiled), base, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_a_compiled_model_is_steered_like_any_other():
    torch.manual_seed(0)
    model = make_text_encoder().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        base = text_output(compiled)
        assert apt.add_apt(compiled, SMALL, "a") == apt.add_apt(compiled, SMALL, "b") == FAMILIES["text_encoder"].sites
        randomize(model)
        apt.set_apt_adapters(compiled, ["a", "b"], [0.5, 0.7])
        both = text_output(model)
        assert not torch.allclose(both, base, atol=1e-4)
        torch.testing.assert_close(text_output(compiled), both, rtol=1e-4, atol=1e-5)
        apt.remove_apt(compiled)
        torch.testing.assert_close(text_output(compiled), base, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("lora_first", [True, False])
def test_lora_lives_beside_apt(family, model, lora_first):
    from peft import LoraConfig, inject_adapter_in_model

    targets = {"unet": ["to_q", "to_v"], "vilt": ["query", "value"]}
    key = next(name for name, row in FAMILIES.items() if row is family)
    lora = LoraConfig(r=2, target_modules=targets.get(key, ["q_proj", "v_proj"]), init_lora_weights=False)

    def attach_lora():
        inject_adapter_in_model(lora, model, "style")

    def attach_apt():
        apt.add_apt(model, SMALL)
        randomize(model)

    torch.manual_seed(3)
    for step in (attach_lora, attach_apt) if lora_first else (attach_apt, attach_lora):
        step()
    both = output(family, model)
    with apt.disable_apt(model):
        lora_only = output(family, model)
    assert not torch.allclose(both, lora_only, atol=1e-4)
    if lora_first:
        assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n or ".apt" in n)
    trainable, _ = apt.freeze_base(model)
    assert trainable == sum(p.numel() for n, p in model.named_parameters() if ".apt" in n)
    apt.remove_apt(model)
    assert torch.equal(output(family, model), lora_only)


def test_errors_name_cause_and_remedy(family, model):
    apt.add_apt(model, SMALL, "a")
    with pytest.raises(ValueError, match="'a' is already in use"):
        apt.add_apt(model, SMALL, "a")
    for call in (apt.set_apt_adapters, apt.delete_apt_adapters, apt.remove_apt):
        with pytest.raises(ValueError, match=r"\['zzz'\] not in the list of present adapters: \['a'\]"):
            call(model, "zzz")
    with pytest.raises(ValueError, match="Length of adapter names 1"):
        apt.set_apt_adapters(model, "a", [1.0, 2.0])
    for weight in ("x", float("nan"), None, True):
        with pytest.raises(ValueError, match="finite number"):
            apt.set_apt_adapters(model, ["a"], [weight])
        with pytest.raises(ValueError, match="finite number"):
            apt.set_apt_scale(model, weight)
    for name in ("", "a.b", "keys", 3):
        with pytest.raises(ValueError, match="adapter"):
            apt.add_apt(model, SMALL, name)
    with pytest.raises(ValueError, match="no_such_place"):
        apt.add_apt(model, apt.APTConfig(target_modules=["no_such_place"]), "b")
    assert apt.get_list_apt_adapters(model) == apt.get_active_apt_adapters(model) == ["a"]


def test_save_pretrained_of_the_base_still_loads(family, model, tmp_path):
    before = output(family, model)
    apt.add_apt(model, SMALL)
    randomize(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(family, type(model).from_pretrained(tmp_path).eval()), before)


def test_any_module_with_target_modules():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(12, 12)

        def forward(self, hidden_states):
            return self.proj(hidden_states)

    model = torch.nn.Sequential(Attention(), Attention())
    x = torch.randn(1, 3, 12)
    with pytest.raises(ValueError, match="target_modules"):
        apt.add_apt(model, SMALL)
    assert apt.add_apt(model, apt.APTConfig(num_prompts=4, target_modules=["1"])) == ["1"]
    randomize(model)
    expected = model[1].apt.adapters["default"](model[1].proj(model[0](x)), model[0](x))
    torch.testing.assert_close(model(x), expected)


def test_heads_belong_to_their_adapter(tmp_path):
    from transformers import ViltForQuestionAnswering

    config = make_vilt().config
    config.num_labels = 5
    torch.manual_seed(0)
    model = ViltForQuestionAnswering(config).eval()
    untouched = snapshot(model)
    settings = apt.APTConfig(num_prompts=4, rank=2, modules_to_save=["classifier"])
    apt.add_apt(model, settings, "a")
    trainable, _ = apt.freeze_base(model)
    heads = sum(p.numel() for p in model.classifier.parameters())
    assert trainable == heads + 2 * (4 * 32 + 2 * 32 * 2 + 1)
    with torch.no_grad():
        model.classifier[0].weight.fill_(1.5)
    apt.add_apt(model, settings, "b")
    assert torch.equal(model.classifier[0].weight, untouched[2]["classifier.0.weight"])
    apt.set_apt_adapters(model, "a")
    assert (model.classifier[0].weight == 1.5).all()
    with apt.disable_apt(model):
        assert torch.equal(model.classifier[0].weight, untouched[2]["classifier.0.weight"])
    file = apt.save_apt_weights(model, tmp_path, "a")
    apt.remove_apt(model)
    assert same(untouched, snapshot(model))
    apt.load_apt_weights(model, file)
    assert (model.classifier[0].weight == 1.5).all()
    apt.remove_apt(model)
    assert same(untouched, snapshot(model))
