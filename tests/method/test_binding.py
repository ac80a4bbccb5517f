"""Any attention module: arguments are bound when attaching, or it is refused, by name, before it is touched."""

import copy

import pytest
import torch
from conftest import randomize
from torch import nn

import apt_diffusion as apt
from apt_diffusion.api import cores_of

SMALL = apt.APTConfig(num_prompts=4, rank=2, target_modules=["attn"])


def make(signature, call, x):
    namespace = {"nn": nn, "torch": torch}
    exec(
        f"""
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(12, 12)

    def forward(self, {signature}):
        return self.proj({x})

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()

    def forward(self, states):
        return self.attn({call})
""",
        namespace,
    )
    torch.manual_seed(0)
    return namespace["Model"]()


@pytest.mark.parametrize(
    ("signature", "call", "x"),
    [
        ("x", "states", "x"),
        ("x", "x=states", "x"),
        ("x, mask=None", "mask=None, x=states", "x"),
        ("mask, hidden_states", "None, states", "hidden_states"),
        ("mask, hidden_states", "hidden_states=states, mask=None", "hidden_states"),
        ("*, hidden_states", "hidden_states=states", "hidden_states"),
        ("x, **kwargs", "states, anything=1", "x"),
        ("query, key, value", "states, states * 0, states * 0", "query"),
    ],
)
def test_x_is_found_however_the_attention_is_called(signature, call, x):
    model = make(signature, call, x)
    base = copy.deepcopy(model)
    assert apt.add_apt(model, SMALL) == ["attn"]
    randomize(model)
    states = torch.randn(2, 3, 12)
    adapter = model.attn.apt.adapters["default"]
    torch.testing.assert_close(model(states), adapter(base(states), states))
    with apt.apt_call(model, None, ["default", None]):
        mixed = model(states)
    torch.testing.assert_close(mixed[0], model(states)[0])
    torch.testing.assert_close(mixed[1], base(states)[1])


@pytest.mark.parametrize(
    ("signature", "x"), [("*args", "args[0]"), ("**kwargs", "kwargs['x']"), ("*args, **kwargs", "args[0]")]
)
def test_what_cannot_be_bound_is_refused_by_name(signature, x):
    model = make(signature, "states", x)
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=r"attn \(Attention\) cannot be adapted: its forward.*hidden_states"):
        apt.add_apt(model, SMALL)
    assert set(model.state_dict()) == before and not list(cores_of(model))
    assert not model.attn._forward_hooks and apt.get_list_apt_adapters(model) == []


def test_a_context_is_found_by_name_only():
    model = make("x, y", "states, states", "x")
    model.attn.cross_attention_dim = 12
    with pytest.raises(ValueError, match=r"attn .*no parameter 'encoder_hidden_states'"):
        apt.add_apt(model, apt.APTConfig(num_prompts=4, target_modules=["attn"], streams=["context"]))


class BatchSecond(nn.Module):
    """torch's own attention with its default layout, (N, B, d)."""

    def __init__(self, batch_first):
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, batch_first=batch_first)

    def forward(self, states):
        return self.attn(states, states, states, need_weights=False)[0]


def test_batch_second_modules_with_an_adapter_per_sample():
    torch.manual_seed(0)
    first, second = BatchSecond(True).eval(), BatchSecond(False).eval()
    second.load_state_dict(first.state_dict())
    states = torch.randn(3, 5, 12)
    for model in (first, second):
        for name in ("a", "b"):
            apt.add_apt(model, SMALL, name)
        randomize(model)
    with torch.no_grad():
        for rows in (None, ["a", None, {"a": 0.5, "b": 0.7}]):
            with apt.apt_call(first, None, rows), apt.apt_call(second, None, rows):
                torch.testing.assert_close(second(states.transpose(0, 1)).transpose(0, 1), first(states))


def test_a_wrapper_with_unknown_axes_is_refused_for_mixed_batches():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.Module()
            self.block = BatchSecond(False)

        def forward(self, x):
            return self.block(x)

    model = nn.ModuleDict({"attn": Wrapper()})
    model["attn"].hidden_size = 12
    apt.add_apt(model, apt.APTConfig(num_prompts=4, rank=2, target_modules=r"attn"))
    message = r"attn.apt is a wrapper around a module with batch_first=False"
    with pytest.raises(ValueError, match=message), apt.apt_call(model, None, ["default"]):
        raise AssertionError("not reached")
    apt.set_apt_adapters(model, "default", 0.5)  # and nothing is left under way
    with apt.apt_call(model, 0.5):
        pass


def test_inside_torchs_transformer_layer():
    """Its fast path for inference would go past the attention's forward."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 24, batch_first=True), 2).eval()
    states = torch.randn(2, 4, 12)
    with torch.no_grad():
        base = model(states)
        apt.add_apt(model, apt.APTConfig(num_prompts=4, rank=2, target_modules=["self_attn"]))
        randomize(model)
        adapted = model(states)
        assert not torch.allclose(adapted, base, atol=1e-3)
    torch.testing.assert_close(model(states), adapted, rtol=1e-4, atol=1e-5)
