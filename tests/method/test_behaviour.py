"""The behaviour matrix: one set of promises, held by every architecture."""

import copy
import dataclasses
import pickle

import pytest
import torch
from conftest import randomize
from support.families import FAMILIES, SMALL, output, same, snapshot, vilt_output

import apt_diffusion as apt
from apt_diffusion.api import cores_of
from apt_diffusion.equation import ApproximatedPrompt


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def model(family):
    torch.manual_seed(0)
    return family.make().eval()


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
        from apt_diffusion.hooks import apply_apt

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
    assert {p.dtype for p in next(cores_of(model)).adapters["late"].parameters()} == {
        torch.promote_types(dtype, torch.float32)
    }


def test_folded_weights_follow_every_change(family, model, monkeypatch):
    """In prepared inference keys are folded once, and each way of changing a weight is seen."""
    apt.add_apt(model, SMALL)
    randomize(model)
    core = next(cores_of(model))
    adapter: ApproximatedPrompt = core.adapters["default"]
    x = torch.randn(1, 4, core.hidden_size)
    o = torch.randn(1, 4, core.hidden_size)
    query = x if core.query_sources["default"] == "hidden_states" else o
    folds, fold = [], ApproximatedPrompt.fold
    monkeypatch.setattr(ApproximatedPrompt, "fold", lambda *args, **kwargs: folds.append(1) or fold(*args, **kwargs))

    @torch.no_grad()
    def check():
        folds.clear()
        torch.testing.assert_close(core(o, x), adapter(o, query), rtol=1e-5, atol=1e-6)
        assert len(folds) == 2  # the core's and the adapter's own
        core(o, x)
        assert len(folds) == 2

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
    assert not core.keep_folded


@pytest.mark.slow
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
    for name in ("", None, 3):
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
