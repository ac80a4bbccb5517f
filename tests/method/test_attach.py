"""Attachment in the cases that one architecture is enough to show."""

import copy
import dataclasses

import pytest
import torch
from conftest import make_text_encoder, make_unet, meter_config, meter_inputs, randomize
from support.families import FAMILIES, SMALL, make_vilt, text_output, unet_output

import apt_diffusion as apt
from apt_diffusion.baselines.families import trained_beside
from apt_diffusion.heads import head_tensors


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("kind", ["ViltForQuestionAnswering", "MeterForQuestionAnswering"])
def test_heads_of_task_models(kind, tmp_path):
    """With the heads and tables that the official code trains, on the same base with another, new head."""
    from transformers import ViltForQuestionAnswering

    cls = ViltForQuestionAnswering if kind.startswith("Vilt") else apt.MeterForQuestionAnswering
    config = make_vilt().config if kind.startswith("Vilt") else meter_config(use_classifier_token=True)
    config.num_labels = 5
    torch.manual_seed(0)
    model, other = cls(config).eval(), cls(config).eval()
    other.base_model.load_state_dict(model.base_model.state_dict())
    heads = trained_beside(model)
    assert ("meter.classifier_token" in heads) == kind.startswith("Meter") and "classifier" in heads
    apt.add_apt(model, dataclasses.replace(SMALL, modules_to_save=heads))
    apt.freeze_base(model)
    randomize(model)
    with torch.no_grad():
        for tensor in head_tensors(model, heads).values():
            tensor.add_(torch.randn_like(tensor) * 0.3)
    trained = task_logits(model)
    assert not torch.allclose(task_logits(other), trained, atol=1e-3)
    apt.load_apt_weights(other, apt.save_apt_weights(model, tmp_path))
    assert torch.equal(task_logits(other), trained)


@torch.no_grad()
def task_logits(model):
    torch.manual_seed(0)
    if isinstance(model, apt.MeterForQuestionAnswering):
        return model(**meter_inputs()).logits
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return model(input_ids=torch.tensor([[2, 3, 9, 27], [5, 6, 7, 8]]), pixel_values=pixels).logits
