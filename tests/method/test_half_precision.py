"""The step next to a model in half precision: its error to float64, its range, its gradients, what it keeps."""

import math

import pytest
import torch

from apt_diffusion import ApproximatedPrompt, APTProcessorCore
from apt_diffusion.equation import FoldedPrompt, float16_factor

HALF = [torch.bfloat16, torch.float16]
# (std of X, size of three outlying features, factor on the initial prompts)
RANGES = [
    (0.1, 0, 1),
    (1, 0, 1),
    (10, 0, 1),
    (30, 0, 1),
    (1, 1000, 1),
    (30, 1000, 1),
    (1, 0, 5),
    (10, 0, 5),
    (30, 0, 5),
]


def make_case(dtype, width=320, tokens=96, std=1.0, outliers=0.0, prompts=1.0, init="paper", activation="relu"):
    """Module in float32 with trained-looking weights, X and O in `dtype`."""
    torch.manual_seed(0)
    module = ApproximatedPrompt(width, 50, 4, activation=activation, init=init)
    with torch.no_grad():
        module.prompts.mul_(prompts)
        module.low_rank_up.normal_(std=0.02 / math.sqrt(width))
        module.log_scale.fill_(0.02)
        if module.gate is not None:
            module.gate.fill_(0.5)
    x, o = torch.randn(2, 1, tokens, width)
    x = x * std
    if outliers:
        x[..., :3] = outliers * x[..., :3].sign()
    return module, x.to(dtype), o.to(dtype)


def exact(module, o, x):
    """Y, its gradients to parameters, O and X, and the gradient of Y that they start from, in float64."""
    double = ApproximatedPrompt(x.shape[-1], len(module.prompts), 4, activation=module.activation).double()
    if module.gate is not None:
        double.gate = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    double.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    return with_gradients(double, o.double(), x.double())


def with_gradients(module, o, x, cotangent=None):
    o, x = o.clone().requires_grad_(), x.clone().requires_grad_()
    y = module(o, x)
    if cotangent is None:  # along O and the update, too: so that scale and gate do not have sums that cancel
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        cotangent = (
            (noise + sum(part / part.square().mean().sqrt() for part in (o, y - o))).detach().bfloat16().to(y.dtype)
        )
    y.backward(cotangent)
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return y.detach(), {**gradients, "attn_output": o.grad, "hidden_states": x.grad}, cotangent


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("init", ["paper", "identity"])
@pytest.mark.parametrize(("std", "outliers", "prompts"), RANGES)
def test_error_to_float64(dtype, init, std, outliers, prompts):
    module, x, o = make_case(dtype, std=std, outliers=outliers, prompts=prompts, init=init)
    expected, *_ = exact(module, o, x)
    actual = module(o, x)
    fits = expected.abs() < 0.99 * torch.finfo(dtype).max
    assert fits.float().mean() > 0.8
    assert actual.dtype == dtype and actual[fits].isfinite().all()
    assert relative(actual[fits], expected[fits]) < 1.5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("std", "prompts"), [(0.3, 1), (1, 1), (1, 5)])
def test_gradients_against_float64(dtype, std, prompts):
    module, x, o = make_case(dtype, std=std, prompts=prompts, init="identity")
    _, expected, cotangent = exact(module, o, x)
    _, actual, _ = with_gradients(module, o, x, cotangent.to(dtype))
    for name, gradient in expected.items():
        assert relative(actual[name], gradient) < 8 * torch.finfo(dtype).eps, name
        assert actual[name].dtype == (dtype if name in ("attn_output", "hidden_states") else torch.float32)


@pytest.mark.parametrize("strength", [0.0, 1e-6, 0.05, 3.0, 100.0])
def test_scaling_for_float16_is_exact_and_within_range(strength):
    torch.manual_seed(0)
    keys, values = torch.randn(2, 3, 8, 16)
    folded = FoldedPrompt(keys, strength * values.sign(), torch.ones(1)).in_precision(torch.float16, "relu")
    factor = float16_factor(strength * values.sign())
    assert factor.shape == (3, 1, 1) and bool((factor.log2() % 1 == 0).all())
    assert torch.equal(folded.keys, (keys / factor).half())
    assert torch.equal(folded.values.double(), (strength * values.sign() * factor.square()).half().double())
    largest = folded.values.abs().max().item()
    assert largest <= max(16, strength * 1.001) and (largest > 4 or factor.max() == 64 or strength > 16)


def test_affinities_whose_product_float16_cannot_hold():
    """A of 12,000 and a weak adapter: A² is 2,000 times beyond the range, the update is not."""
    module, x, o = make_case(torch.float16, std=1, init="identity")
    with torch.no_grad():
        module.gate.fill_(3e-6)
        keys = module.fold(torch.float32).keys
        x = (x.float() * (12000 / (x.float() @ keys.mT).amax())).half()
    expected, *_ = exact(module, o, x)
    affinity = (x.double() @ keys.double().mT).amax()
    assert affinity > 11000 and expected.abs().max() < 60000 and relative(o, expected) > 0.1
    assert relative(module(o, x), expected) < 1.5 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dtype", HALF)
def test_a_scale_next_to_one_keeps_its_digits(dtype):
    """`exp(s) · O`, rounded once: rounding exp(s) itself would move all of O by up to 2^-9."""
    module, x, o = make_case(dtype)
    with torch.no_grad():
        module.prompts.zero_()
        module.log_scale.fill_(0.0131)
    expected = (math.exp(0.0131) * o.float()).to(dtype)
    assert (module(o, x) == expected).float().mean() > 0.99


def test_the_gradient_of_the_scale_is_summed_in_float32():
    """Every token's share fits float16, their sum does not."""
    module, x, o = make_case(torch.float16, width=64, tokens=2048)
    with torch.no_grad():
        module.prompts.zero_()
    (module(o, x) * o).sum(dtype=torch.float32).backward()
    expected = math.exp(0.02) * o.double().square().sum()
    assert expected > 2 * torch.finfo(torch.float16).max
    assert module.log_scale.grad.item() == pytest.approx(expected.item(), rel=2e-3)


@pytest.mark.parametrize("dtype", HALF)
def test_untrained_identity_changes_no_bit(dtype):
    torch.manual_seed(0)
    module = ApproximatedPrompt(64, 16, init="identity")
    x, o = torch.randn(2, 2, 9, 64).to(dtype)
    assert torch.equal(module(o, 100 * x), o)


@pytest.mark.parametrize("activation", ["relu", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_is_the_equation_to_the_last_bit(dtype, activation):
    module, x, o = make_case(dtype, activation=activation)
    module.to(dtype)
    prompts, scale = module.prompts, module.log_scale.exp()
    keys = prompts + (prompts @ module.low_rank_down.T) @ module.low_rank_up.T
    affinity = x @ keys.mT
    affinity = affinity.relu() if activation == "relu" else affinity.softmax(-1)
    update = (affinity.amax(-1, keepdim=True) * affinity) @ (scale * prompts)
    assert torch.equal(module(o, x), scale * o + update)


@pytest.mark.parametrize("dtype", HALF)
def test_a_softmax_is_computed_in_float32(dtype):
    module, x, o = make_case(dtype, std=30, activation="softmax", prompts=5)
    assert torch.equal(module(o, x), module(o.float(), x.float()).to(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_nothing_as_large_as_the_states_is_kept_in_float32(dtype):
    """For the backward pass: X and O, which exist anyway, and affinities; twice as many bytes before."""
    module, x, o = make_case(dtype, width=512)
    o.requires_grad_(), x.requires_grad_()
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = module(o, x)
    large = [tensor for tensor in kept.values() if tensor.numel() >= o.numel()]
    assert y.grad_fn is not None and {tensor.data_ptr() for tensor in large} == {o.data_ptr(), x.data_ptr()}


@pytest.mark.parametrize("dtype", HALF)
def test_rows_of_a_mixed_batch_are_what_they_would_be_alone(dtype):
    core = APTProcessorCore(64)
    torch.manual_seed(0)
    for name, count in (("a", 8), ("b", 16)):
        adapter = ApproximatedPrompt(64, count)
        adapter.log_scale.data.fill_(0.05)
        adapter.prompts.data.mul_(5)
        core.add(name, adapter, "hidden_states")
    x, o = torch.randn(2, 3, 10, 64).to(dtype)
    samples = ("a", None, {"a": 0.7, "b": -0.4})
    core.adapters_per_sample = samples
    together = core(o, x)
    core.adapters_per_sample = None
    for row, weights in enumerate(({"a": 1.0}, {}, {"a": 0.7, "b": -0.4})):
        core.weights = weights
        alone = core(o[row : row + 1], x[row : row + 1])
        # Sums of products may be taken in another order: one rounding of the result.
        assert torch.allclose(together[row].float(), alone[0].float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    assert torch.equal(together[1], o[1]) and not torch.equal(together[0], o[0])


@pytest.mark.parametrize("dtype", HALF)
def test_compiled_without_breaks(dtype):
    module, x, o = make_case(dtype, width=32, tokens=8)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(o, x), module(o, x))
