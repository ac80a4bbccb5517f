"""Mixed batches: every row has its own adapter, mix and strength, and is what it would be alone."""

import pytest
import torch
from conftest import make_text_encoder, make_unet, randomize

import apt_diffusion as apt
from apt_diffusion.api import cores_of

CONFIGS = {
    "relu": {},
    "wide": {"num_prompts": 9},
    "softmax": {"activation": "softmax"},
    "asked by O": {"query_source": "attn_output"},
}
ROWS = [
    "relu",
    {"relu": 0.5},
    {"relu": 0.5, "wide": -0.7},
    None,
    {"softmax": 1.0, "asked by O": 0.3, "relu": 1.0},
    "wide",
    {},
    {"wide": 0.0},
    {"asked by O": 1.3},
]


@pytest.fixture
def unet():
    torch.manual_seed(0)
    unet = make_unet().eval()
    for name, settings in CONFIGS.items():
        apt.add_apt(unet, apt.APTConfig(**{"num_prompts": 6, "rank": 2, **settings}), name)
    randomize(unet)
    apt.set_apt_adapters(unet, "relu", 0.8)
    return unet


@torch.no_grad()
def run(unet, rows):
    generator = torch.Generator().manual_seed(0)
    sample, context = (torch.randn(len(ROWS), *shape, generator=generator) for shape in ((4, 8, 8), (5, 32)))
    return unet(sample[rows], 7, encoder_hidden_states=context[rows]).sample


@pytest.mark.parametrize("scale", [None, 0.5])
def test_each_row_is_what_it_is_alone(unet, scale):
    with apt.apt_call(unet, scale, ROWS):
        mixed = run(unet, list(range(len(ROWS))))
    for row, sample in enumerate(ROWS):
        with apt.disable_apt(unet):
            base = run(unet, [row])
        weights = {None: {}, "relu": {"relu": 0.8}, "wide": {"wide": 1.0}}.get(
            sample if not isinstance(sample, dict) else 0, sample
        )
        with apt.apt_call(unet, scale, [weights]):
            alone = run(unet, [row])
        with apt.apt_call(unet):
            apt.set_apt_adapters(unet, list(weights), list(weights.values()))
            if scale is not None:
                apt.set_apt_scale(unet, scale)
            set_so = run(unet, [row])
            apt.set_apt_adapters(unet, "relu", 0.8)
            apt.set_apt_scale(unet, 1.0)
        torch.testing.assert_close(mixed[row : row + 1], set_so, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone, set_so, rtol=1e-4, atol=1e-5)
        acts = any(weight != 0 for weight in weights.values())
        assert acts == (not torch.allclose(set_so, base, atol=1e-3))
        if not acts:
            assert torch.equal(alone, base)


def test_one_site_against_the_equation(unet):
    """Rows against `O + Σ λ_i (Y_i − O)` from the adapters' own outputs."""
    core = next(cores_of(unet))
    core.weights = {"relu": 0.8}
    o, x = torch.randn(len(ROWS), 3, core.hidden_size), torch.randn(len(ROWS), 3, core.hidden_size)
    core.adapters_per_sample = tuple(ROWS)
    mixed = core(o, x)
    for row, sample in enumerate(ROWS):
        weights = {sample: core.weights.get(sample, 1.0)} if isinstance(sample, str) else sample or {}
        expected = o[row : row + 1].clone()
        for name, weight in weights.items():
            own = o[row : row + 1]
            query = own if name == "asked by O" else x[row : row + 1]
            expected += weight * (core.adapters[name](own, query) - own)
        torch.testing.assert_close(mixed[row : row + 1], expected, rtol=1e-5, atol=1e-5)


def test_mixes_take_weights_per_block(unet):
    with apt.apt_call(unet, None, [{"relu": {"mid": 0.0, "up": [0.5]}}, "wide"]):
        mixed = run(unet, [0, 1])
    with apt.apt_call(unet):
        apt.set_apt_adapters(unet, "relu", {"mid": 0.0, "up": [0.5]})
        torch.testing.assert_close(mixed[:1], run(unet, [0]), rtol=1e-4, atol=1e-5)


def test_prepared_and_not_are_the_same(unet):
    plain = []
    for rows in (ROWS, ROWS[::-1], ROWS):
        with apt.apt_call(unet, 0.7, rows):
            plain.append(run(unet, list(range(len(ROWS)))))
    with apt.prepared_apt(unet):
        for rows, expected in zip((ROWS, ROWS[::-1], ROWS), plain, strict=True):
            with apt.apt_call(unet, 0.7, rows):
                assert torch.equal(run(unet, list(range(len(ROWS)))), expected)
                assert torch.equal(run(unet, list(range(len(ROWS)))), expected)


def test_dropout_acts_in_mixed_batches_as_in_single_ones():
    """The same random numbers, so the same dropped affinities."""
    torch.manual_seed(0)
    model = make_text_encoder()
    apt.add_apt(model, apt.APTConfig(num_prompts=6, rank=2, dropout=0.5), "a")
    apt.add_apt(model, apt.APTConfig(num_prompts=6, rank=2), "b")
    randomize(model)
    core = next(cores_of(model))
    o, x = torch.randn(4, 5, 32), torch.randn(4, 5, 32)

    def output(samples, seed):
        core.weights, core.adapters_per_sample = {"a": 1.0}, samples
        torch.manual_seed(seed)
        return core(o, x)

    model.train()
    assert not torch.allclose(output(None, 1), output(None, 2))
    assert torch.equal(output(("a",), 1), output(None, 1))
    mixed = output(("a", "b"), 1)
    assert not torch.allclose(mixed[::2], output(("a", "b"), 2)[::2]) and torch.equal(
        mixed[1::2], output(("a", "b"), 2)[1::2]
    )
    model.eval()
    assert torch.equal(output(("a", "b"), 1), output(("a", "b"), 2))


def test_errors(unet):
    for rows, message in (
        (["relu", "zzz"], "zzz"), ([{"zzz": 1.0}], "zzz"), ([{"relu": "x"}], "finite number"),
        ([{"relu": float("inf")}], "finite number"), ([{"relu": {"side": 1.0}}], "side"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message), apt.apt_call(unet, None, rows):
            raise AssertionError("not reached")
    assert all(core.adapters_per_sample is None for core in cores_of(unet))
