"""The mathematics against a derivation by hand: numpy in float64, with its own backward pass."""

import numpy as np
import pytest
import torch

from apt_diffusion import ApproximatedPrompt, APTConfig, APTProcessorCore

PARAMETERS = ("prompts", "low_rank_down", "low_rank_up", "log_scale", "gate")


def derive(x, o, cotangent, p, d, u, s, g, activation):
    """Y and the gradients of sum(cotangent · Y), written out from the equations of the paper."""
    c = np.exp(s)
    low = p @ d.T
    k = p + low @ u.T
    scores = x @ k.T
    if activation == "relu":
        a = np.maximum(scores, 0)
    else:
        e = np.exp(scores - scores.max(-1, keepdims=True))
        a = e / e.sum(-1, keepdims=True)
    w = a.max(-1, keepdims=True)  # a constant for the gradient
    update = w * (a @ p)
    y = c * (o + g * update)

    d_e = c * g * w * cotangent
    d_a = d_e @ p.T
    d_scores = d_a * (scores > 0) if activation == "relu" else a * (d_a - (d_a * a).sum(-1, keepdims=True))
    d_k = np.einsum("bnp,bnd->pd", d_scores, x)
    d_low = d_k @ u
    gradients = {
        "attn_output": c * cotangent,
        "hidden_states": d_scores @ k,
        "prompts": np.einsum("bnp,bnd->pd", a, d_e) + d_k + d_low @ d,
        "low_rank_down": d_low.T @ p,
        "low_rank_up": d_k.T @ low,
        "log_scale": np.array([(cotangent * y).sum()]),
        "gate": np.array([(cotangent * c * update).sum()]),
    }
    return y, gradients


def assert_close(actual, expected, tolerance=1e-12):
    scale = max(np.abs(expected).max(), 1e-300)
    assert np.abs(actual - expected).max() <= tolerance * scale


def make_case(hidden_size, num_prompts, init="paper", activation="relu", negative_rows=0):
    """Module, X and O in float64; the first `negative_rows` tokens have negative affinities only."""
    torch.manual_seed(hidden_size + num_prompts)
    module = ApproximatedPrompt(hidden_size, num_prompts, 4, activation=activation, init=init).double()
    for name, parameter in module.named_parameters():
        if name != "prompts":
            torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        if negative_rows:  # prompts on one side of the origin: so are the keys, and something is opposite to all
            module.prompts += torch.randn(hidden_size, dtype=torch.float64) * 0.1
        keys = module.prompts + module.prompts @ module.low_rank_down.T @ module.low_rank_up.T
    x, o = torch.randn(2, 2, 7, hidden_size, dtype=torch.float64)
    x[:, :negative_rows] = -keys.mean(0) * (1 + torch.rand(2, negative_rows, 1, dtype=torch.float64))
    assert (x[:, :negative_rows] @ keys.T < 0).all()
    return module, x, o


# A softmax gives every prompt its share, whatever the sign.
@pytest.mark.parametrize(("activation", "negative_rows"), [("relu", 0), ("relu", 3), ("relu", 7), ("softmax", 0)])
@pytest.mark.parametrize("init", ["paper", "released", "identity"])
@pytest.mark.parametrize(("hidden_size", "num_prompts"), [(8, 1), (8, 200), (64, 16), (320, 50), (768, 1), (768, 200)])
def test_forward_and_gradients(hidden_size, num_prompts, init, activation, negative_rows):
    module, x, o = make_case(hidden_size, num_prompts, init, activation, negative_rows)
    x.requires_grad_()
    o.requires_grad_()
    y = module(o, x)
    cotangent = torch.randn_like(y)
    (y * cotangent).sum().backward()

    values = {name: p.detach().numpy() for name, p in module.named_parameters()}
    expected, gradients = derive(
        x.detach().numpy(), o.detach().numpy(), cotangent.numpy(),
        values["prompts"], values["low_rank_down"], values["low_rank_up"], values["log_scale"],
        values.get("gate", np.ones(1)), activation,
    )  # fmt: skip
    assert_close(y.detach().numpy(), expected)
    assert_close(x.grad.numpy(), gradients["hidden_states"])
    assert_close(o.grad.numpy(), gradients["attn_output"])
    for name, parameter in module.named_parameters():
        assert_close(parameter.grad.numpy(), gradients[name])


@pytest.mark.parametrize("query_source", ["hidden_states", "attn_output"])
@pytest.mark.parametrize("weight", [1.0, 0.3, -1.2])
def test_the_core_at_any_strength_and_asked_by_the_output(query_source, weight):
    """Y_λ = O + λ (Y − O), and what O's gradient gains where O asks the prompts."""
    module, x, o = make_case(48, 20, "identity", negative_rows=2)
    core = APTProcessorCore(48)
    core.add("default", module, query_source)
    core.weights = {"default": weight}
    x.requires_grad_()
    o.requires_grad_()
    y = core(o, x)
    cotangent = torch.randn_like(y)
    (y * cotangent).sum().backward()

    values = {name: p.detach().numpy() for name, p in module.named_parameters()}
    asks_o = query_source == "attn_output"
    full, gradients = derive(
        (o if asks_o else x).detach().numpy(), o.detach().numpy(), weight * cotangent.numpy(),
        *(values[name] for name in PARAMETERS), "relu",
    )  # fmt: skip
    assert_close(y.detach().numpy(), o.detach().numpy() + weight * (full - o.detach().numpy()))
    of_o = gradients["attn_output"] + (1 - weight) * cotangent.numpy()
    assert_close(o.grad.numpy(), of_o + asks_o * gradients["hidden_states"])
    if asks_o:
        assert x.grad is None
    else:
        assert_close(x.grad.numpy(), gradients["hidden_states"])
    for name, parameter in module.named_parameters():
        assert_close(parameter.grad.numpy(), gradients[name])


@pytest.mark.parametrize("init", ["paper", "identity"])
def test_tokens_with_negative_affinities_get_the_scaled_output_exactly(init):
    module, x, o = make_case(32, 8, init, negative_rows=3)
    y = module(o, x)
    scale = module.log_scale.exp()
    assert torch.equal(y[:, :3], scale * o[:, :3])
    assert not torch.equal(y[:, 3:], scale * o[:, 3:])
    y[:, :3].sum().backward()
    assert torch.count_nonzero(module.prompts.grad) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_where_the_result_fits(dtype):
    torch.manual_seed(0)
    module = ApproximatedPrompt(64, 16, init="paper")
    module.prompts.data.mul_(400)  # affinities up to ~1e4: their products overflow float16 on the way
    x, o = torch.randn(2, 5, 64) * 10, torch.randn(2, 5, 64)
    with torch.no_grad():
        module.log_scale.fill_(-17.0)
        expected = module(o, x)
        actual = module.to(dtype)(o.to(dtype), x.to(dtype))
    assert expected.abs().max() < torch.finfo(dtype).max
    assert actual.dtype == dtype and torch.isfinite(actual).all()
    assert (actual.float() - expected).abs().max() / expected.abs().max() < 0.05


def test_autocast_does_not_touch_the_affinities():
    torch.manual_seed(0)
    module = ApproximatedPrompt(32, 8, init="paper")
    x, o = torch.randn(1, 4, 32), torch.randn(1, 4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(o, x), module(o, x))
        under_autocast = module(o, x)
    assert torch.equal(under_autocast, module(o, x))


@pytest.mark.parametrize("init", ["paper", "released", "identity"])
def test_initialisation(init):
    torch.manual_seed(0)
    module = ApproximatedPrompt(256, 512, 8, init=init)
    assert module.prompts.std().item() == pytest.approx(0.02, rel=0.02)
    down = 0.02 if init == "released" else 1.0
    assert module.low_rank_down.std().item() == pytest.approx(down, rel=0.1)
    assert module.low_rank_up.std().item() == pytest.approx(0.02 if init == "released" else 0.0, rel=0.1)
    assert module.log_scale.item() == 0
    names = [name for name, _ in module.named_parameters()]
    assert names == list(PARAMETERS if init == "identity" else PARAMETERS[:4])
    x, o = torch.randn(1, 3, 256), torch.randn(1, 3, 256)
    assert torch.equal(module(o, x), o) == (init == "identity")


def test_dropout_acts_on_affinities_in_training_only():
    torch.manual_seed(0)
    module = ApproximatedPrompt(16, 8, dropout=0.5)
    x, o = torch.randn(1, 64, 16), torch.zeros(1, 64, 16)
    assert not torch.equal(module(o, x), module(o, x))
    module.eval()
    assert torch.equal(module(o, x), module(o, x))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_prompts": 0}, "num_prompts"),
        ({"num_prompts": True}, "num_prompts"),
        ({"rank": -1}, "rank"),
        ({"rank": 2.5}, "2.5"),
        ({"activation": "gelu"}, "gelu"),
        ({"dropout": 1.0}, "dropout"),
        ({"init": "zero"}, "zero"),
        ({"query_source": "keys"}, "keys"),
        ({"streams": []}, "streams"),
        ({"streams": ["key"]}, "key"),
        ({"target_modules": [""]}, "target_modules"),
        ({"target_modules": "attn[2"}, r"regular expression.*attn\[2"),
        ({"dropout": float("nan")}, "nan"),
        ({"modules_to_save": "classifier"}, "classifier"),
    ],
)
def test_config_names_the_bad_value(settings, named):
    with pytest.raises(ValueError, match=named):
        APTConfig(**settings)


def test_config_json_round_trip():
    config = APTConfig(
        num_prompts=7, rank=2, streams=["query", "context"], target_modules=["attn2"], modules_to_save=["classifier"]
    )
    assert APTConfig.from_json(config.to_json()) == config
    assert hash(config) == hash(APTConfig.from_json(config.to_json()))
    assert APTConfig.from_json(APTConfig(target_modules=r".*attn\d").to_json()).target_modules == r".*attn\d"
    with pytest.raises(ValueError, match="alpha"):
        APTConfig.from_dict({"alpha": 3})
    with pytest.raises(AttributeError):
        config.rank = 5
