"""Families of models as data: joint attention, rows from outside, and which parts of a pipeline are adapted."""

import copy
import logging

import pytest
import torch
from conftest import make_text_encoder, make_unet, randomize
from torch import nn

import apt_diffusion as apt
from apt_diffusion.api import cores_of
from apt_diffusion.architectures import ARCHITECTURES

SMALL = apt.APTConfig(num_prompts=4, rank=2)


class JointAttention(nn.Module):
    """Image and text attend to both, as in diffusion transformers; the last block drops the text."""

    def __init__(self, text_out=True):
        super().__init__()
        self.query_dim = 12
        self.to_q, self.add_q = nn.Linear(12, 12), nn.Linear(12, 12)
        self.to_out = nn.Linear(12, 12)
        self.to_add_out = nn.Linear(12, 12) if text_out else None

    def forward(self, hidden_states, encoder_hidden_states=None, mask=None):
        if encoder_hidden_states is None:
            return self.to_out(self.to_q(hidden_states))
        mixed = torch.cat([self.add_q(encoder_hidden_states), self.to_q(hidden_states)], 1).cumsum(1)
        text, image = mixed.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        return (self.to_out(image), self.to_add_out(text)) if self.to_add_out is not None else self.to_out(image)


class PositionalAttention(JointAttention):
    """HiDream's form: everything by position, the text third."""

    def forward(self, image, mask, txt):
        return super().forward(image, txt)


class ToyTransformer(nn.Module):
    def __init__(self, attention=JointAttention):
        super().__init__()
        self.blocks = nn.ModuleList([attention(), attention(), attention(False)])

    def forward(self, image, text):
        for block in self.blocks:
            out = (
                block(image, None, text)
                if isinstance(block, PositionalAttention)
                else block(image, encoder_hidden_states=text)
            )
            image, text = (image + out[0], text + out[1]) if isinstance(out, tuple) else (image + out, text)
        return image


@pytest.fixture
def registered():
    """Rows of the test, gone afterwards."""
    before = list(ARCHITECTURES)
    yield apt.register_architecture
    ARCHITECTURES[:] = before


def inputs(batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 5, 12, generator=generator), torch.randn(batch, 3, 12, generator=generator)


def make(attention=JointAttention):
    torch.manual_seed(0)
    return ToyTransformer(attention).eval()


ROW = apt.Architecture(("ToyTransformer",), r"blocks\.\d+", init="identity")
POSITIONAL = apt.Architecture(
    ("ToyTransformer",), r"blocks\.\d+", init="identity",
    bindings={"query": apt.Stream("apt", "image"), "text": apt.Stream("apt_text", "txt", output=1)},
)  # fmt: skip


@pytest.mark.parametrize(("attention", "row"), [(JointAttention, ROW), (PositionalAttention, POSITIONAL)])
@pytest.mark.parametrize("streams", [["query"], ["text"], ["query", "text"]])
def test_each_stream_is_the_equation(registered, attention, row, streams):
    registered(row)
    model = make(attention)
    bare = copy.deepcopy(model)
    base = model(*inputs())
    apt.add_apt(model, apt.APTConfig(num_prompts=4, rank=2, streams=streams))
    assert torch.equal(model(*inputs()), base)
    randomize(model)
    with torch.no_grad():
        expected = (image, text) = inputs()
        for number, block in enumerate(bare.blocks):
            out = (
                block(image, None, text)
                if attention is PositionalAttention
                else block(image, encoder_hidden_states=text)
            )
            out = out if isinstance(out, tuple) else (out, None)
            adapted = model.blocks[number]
            if "query" in streams:
                out = (adapted.apt.adapters["default"](out[0], image), out[1])
            if "text" in streams and number < 2:
                out = (out[0], adapted.apt_text.adapters["default"](out[1], text))
            assert hasattr(adapted, "apt_text") == ("text" in streams and number < 2)
            image, text = image + out[0], text if out[1] is None else text + out[1]
        torch.testing.assert_close(model(*inputs()), image)
        assert not torch.allclose(image, expected[0]) and not torch.allclose(image, base, atol=1e-3)


def test_text_and_image_in_files_and_mixed_batches(registered, tmp_path):
    registered(ROW)
    model = make()
    for name in ("a", "b"):
        apt.add_apt(model, apt.APTConfig(num_prompts=4, rank=2, streams=["query", "text"]), name)
    randomize(model)
    with torch.no_grad():
        rows = ["a", None, {"a": 0.5, "b": 0.7}]
        with apt.apt_call(model, None, rows):
            mixed = model(*inputs(3))
        for row, weights in enumerate(({"a": 1.0}, {}, {"a": 0.5, "b": 0.7})):
            apt.set_apt_adapters(model, list(weights), list(weights.values()))
            torch.testing.assert_close(mixed[row], model(*(part[row : row + 1] for part in inputs(3)))[0])
        file = apt.save_apt_weights(model, tmp_path, "b")
        apt.set_apt_adapters(model, "b")
        expected = model(*inputs())
        other = make()
        assert apt.load_apt_weights(other, file) == ["blocks.0", "blocks.1", "blocks.2"]
        assert torch.equal(other(*inputs()), expected)
        apt.remove_apt(other)
        assert not any(m._forward_hooks for m in other.modules()) and torch.equal(other(*inputs()), make()(*inputs()))


def test_a_block_whose_text_nobody_reads(registered):
    """And a row that names the joint attentions, where no projection shows them."""
    registered(
        apt.Architecture(("ToyTransformer",), r"blocks\.\d+", last_text_is_idle=True, streams=("query", "text"))
    )
    model = make()
    apt.add_apt(model, SMALL)
    assert [hasattr(block, "apt_text") for block in model.blocks] == [True, False, False]
    registered(apt.Architecture(("ToyTransformer",), r"blocks\.\d+", text_modules=r"blocks\.[12]", streams=("text",)))
    model = make()
    assert apt.add_apt(model, SMALL) == ["blocks.1", "blocks.2"]
    with torch.no_grad():
        model(*inputs())  # the last one gives no text: nothing to correct


def test_text_streams_need_joint_attention(registered):
    with pytest.raises(ValueError, match="is a joint attention: stream 'text'"):
        apt.add_apt(make_unet(), apt.APTConfig(streams=["text"]))
    registered(ROW)
    with pytest.raises(ValueError, match=r"blocks\.0 .*no parameter 'encoder_hidden_states'"):
        apt.add_apt(make(PositionalAttention), apt.APTConfig(streams=["query", "text"]))


def test_a_row_from_outside(registered):
    model = make()
    with pytest.raises(ValueError, match="no default places for ToyTransformer"):
        apt.add_apt(model, SMALL)
    registered(apt.Architecture(("ToyTransformer",), r"blocks\.0"))
    assert apt.add_apt(model, SMALL) == ["blocks.0"]
    registered(apt.Architecture(("ToyTransformer",), r"blocks\.1", query_source="attn_output"))  # the last one holds
    assert apt.add_apt(model, SMALL, "b") == ["blocks.1"]
    assert model.blocks[1].apt.query_sources == {"b": "attn_output"}

    class Mine(ToyTransformer):
        """A subclass is known by its base class, until it has a row of its own."""

    assert apt.add_apt(Mine(), SMALL) == ["blocks.1"]
    registered(apt.Architecture(("Mine",), r"blocks\.2"))
    assert apt.add_apt(Mine(), SMALL) == ["blocks.2"] and apt.add_apt(make(), SMALL) == ["blocks.1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), "x"), "tuple of class names"),
        (("Toy", "x"), "tuple of class names"),
        ((("Toy",), ""), "target_modules"),
        ((("Toy",), "("), "regular expression"),
        ((("Toy",), "x", "zero"), "init"),
        ((("Toy",), "x", "paper", "hidden_states", ("sideways",)), "sideways"),
    ],
)
def test_bad_rows(arguments, message):
    before = list(ARCHITECTURES)
    with pytest.raises(ValueError, match=message):
        apt.register_architecture(apt.Architecture(*arguments))
    assert before == ARCHITECTURES


class Pipeline:
    """The components of a pipeline of diffusers."""

    def __init__(self, **components):
        self.components = components


class Unknown(nn.Module):
    """T5, Gemma, ...: no row."""

    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(2, 2)


def test_parts_without_a_row_are_skipped_with_a_word(registered, caplog):
    registered(ROW)
    pipeline = Pipeline(transformer=make(), text_encoder=make_text_encoder(), text_encoder_3=Unknown(), vae=Unknown())
    with caplog.at_level(logging.INFO, "apt_diffusion"):
        names = apt.add_apt(pipeline, SMALL)
    assert {name.split(".")[0] for name in names} == {"transformer", "text_encoder"}
    assert "text_encoder_3" in caplog.text and "Unknown" in caplog.text and "vae" not in caplog.text
    assert list(apt.get_list_apt_adapters(pipeline)) == ["transformer", "text_encoder"]


def test_text_encoders_alone_are_never_adapted_by_default():
    parts = {"transformer": Unknown(), "text_encoder": make_text_encoder(), "text_encoder_2": make_text_encoder()}
    for pipeline in (Pipeline(**parts), parts, Pipeline(decoder=Unknown(), text_encoder=make_text_encoder())):
        with pytest.raises(
            ValueError, match=r"no default places for .*only for \['text_encoder'.*register_architecture"
        ):
            apt.add_apt(pipeline, SMALL)
        assert apt.get_list_apt_adapters(pipeline) == {}
    assert apt.add_apt({"text_encoder": parts["text_encoder"]}, SMALL)  # named alone, it is meant
    assert apt.add_apt(Pipeline(**parts), {"text_encoder_2": SMALL})


def test_wan_has_two_denoisers(registered):
    registered(ROW)
    pipeline = Pipeline(transformer=make(), transformer_2=make(), text_encoder=Unknown())
    config = apt.APTConfig(num_prompts=4, rank=2, query_source="attn_output", streams=["query", "text"])
    names = apt.add_apt(pipeline, config)
    assert {name.split(".")[0] for name in names} == {"transformer", "transformer_2"}
    assert {source for core in cores_of(pipeline) for source in core.query_sources.values()} == {"attn_output"}


def test_untrained_parameters_are_named_once(registered, caplog):
    """An adapter on a layer whose output nobody reads."""
    registered(ROW)

    class Early(ToyTransformer):
        def forward(self, image, text):
            self.blocks[2](image, encoder_hidden_states=text)
            out = self.blocks[0](image, encoder_hidden_states=text)
            return out[0]

    torch.manual_seed(0)
    model = Early()
    apt.add_apt(model, apt.APTConfig(num_prompts=4, rank=2, streams=["query", "text"]))
    randomize(model)
    apt.freeze_base(model)
    model(*inputs()).square().mean().backward()
    names = apt.warn_untrained(model)
    assert len(caplog.records) == 1 and f"{len(names)} adapter parameters" in caplog.text
    expected = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert set(names) == expected and expected
    assert not any(name.startswith("blocks.0.apt.") for name in names)
    caplog.clear()
    trained = make()
    apt.add_apt(trained, SMALL)
    apt.freeze_base(trained)
    trained(*inputs()).square().mean().backward()
    assert apt.warn_untrained(trained) == [] and not caplog.records
