"""The compared methods: their arithmetic, their size, and that they come and go without a trace."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import make_meter, meter_config
from safetensors import safe_open
from safetensors.torch import save_file
from support.families import clip_output, make_clip, make_vilt, meter_output, same, snapshot, vilt_output
from support.method_helpers import ADDING, config_of, shake, stored_config
from torch import nn

from apt_diffusion import APTConfig, add_apt, freeze_base, load_apt_weights, remove_apt, save_apt_weights
from apt_diffusion.baselines import (
    CHILD,
    MethodConfig,
    add_method,
    freeze_for_method,
    load_method,
    method_of,
    method_parameters,
    remove_method,
    save_method,
    trained_beside,
)
from apt_diffusion.baselines.modules import Bottleneck
from apt_diffusion.io.former import METHOD_HEADER
from apt_diffusion.models.meter import MeterForQuestionAnswering

MODELS = {"vilt": (make_vilt, vilt_output), "meter": (make_meter, meter_output), "clip": (make_clip, clip_output)}


@pytest.fixture(params=MODELS)
def family(request):
    return request.param


def make(family: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[family][0]().eval()


@torch.no_grad()
def run(family: str, model: nn.Module) -> torch.Tensor:
    return MODELS[family][1](model)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def test_a_bottleneck_in_numpy():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    for scaled in (False, True):
        module = Bottleneck(8, 5, scaled).double()
        assert module.norm.weight.mean() == 1 if scaled else True
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        states = array(x)
        if scaled:
            states = (states - states.mean(-1, keepdims=True)) / np.sqrt(states.var(-1, keepdims=True) + 1e-5)
            states = states * array(module.norm.weight) + array(module.norm.bias)
        hidden = np.maximum(states @ array(module.down.weight).T + array(module.down.bias), 0)
        expected = (4 if scaled else 1) * (hidden @ array(module.up.weight).T + array(module.up.bias))
        assert np.allclose(array(module(x)), expected, rtol=1e-12)


def test_adapters_come_after_every_branch():
    model = make("vilt")
    names = add_method(model, config_of("adapter"))
    assert names[:2] == ["encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense"] and len(names) == 4
    shake(model)
    linear = model.get_submodule(names[1])
    x = torch.randn(1, 2, linear.in_features)
    plain = x @ linear.weight.T + linear.bias
    adapter = linear.get_submodule(CHILD)
    expected = (
        plain + (plain @ adapter.down.weight.T + adapter.down.bias).relu() @ adapter.up.weight.T + adapter.up.bias
    )
    assert torch.allclose(linear(x), expected, atol=1e-5)


def test_parallel_adapters_take_the_branch_input():
    model = make("vilt")
    add_method(model, config_of("scaled_pa"))
    shake(model)
    attention = model.encoder.layer[0].attention
    x = torch.randn(1, 4, 32)
    with torch.no_grad():
        adapted = attention(x)[0]
        expected = adapted - attention.get_submodule(CHILD)(x)
        remove_method(model)
        assert torch.allclose(attention(x)[0], expected, atol=1e-5)


def test_meters_parallel_adapter_is_added_behind_the_norm():
    model = make("meter")
    layer = model.cross_modal_text_layers[0]
    x, c = torch.randn(1, 3, 32), torch.randn(1, 4, 32)
    inputs = {}
    layer.crossattention.register_forward_pre_hook(lambda module, args: inputs.update(cross=args[0]))
    layer.intermediate.register_forward_pre_hook(lambda module, args: inputs.update(fed=args[0]))
    add_method(model, config_of("scaled_pa"))
    shake(model)
    with torch.no_grad():
        layer(x, c)
        own, cross = layer.attention.get_submodule(CHILD), layer.crossattention.get_submodule(CHILD)
        after_own = nn.functional.layer_norm(
            layer.attention(x)[0] + x, (32,), layer.attention_layer_norm.weight, layer.attention_layer_norm.bias, 1e-12
        ) + own(x)
        assert torch.allclose(inputs["cross"], after_own, atol=1e-5)
        attended = layer.crossattention(after_own, c)[0] + after_own
        norm = layer.crossattention_layer_norm
        expected = nn.functional.layer_norm(attended, (32,), norm.weight, norm.bias, 1e-12) + cross(after_own)
    assert torch.allclose(inputs["fed"], expected, atol=1e-5)


def attend(query, key, value, heads):
    """Softmax attention of `(N, d)` to `(M, d)` in numpy."""
    width = query.shape[-1] // heads
    parts = []
    for head in range(heads):
        q, k, v = (x[:, head * width : (head + 1) * width] for x in (query, key, value))
        scores = q @ k.T / math.sqrt(width)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        parts.append(weights / weights.sum(-1, keepdims=True) @ v)
    return np.concatenate(parts, -1)


def test_deep_prompts_are_keys_and_values_behind_the_layers_norm():
    model = make("vilt").double()
    add_method(model, config_of("deep_prompt"))
    shake(model)
    layer = model.encoder.layer[0]
    prompts, x = layer.attention.get_submodule(CHILD).prompts, torch.randn(1, 4, 32, dtype=torch.float64)
    mask = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    mask[..., 3] = torch.finfo(torch.float64).min
    normed = array(layer.layernorm_before(prompts))
    context = np.concatenate([normed, array(x[0, :3])])  # the fourth token is padding
    inner = layer.attention.attention
    query, key, value = (
        states @ array(linear.weight).T + array(linear.bias)
        for states, linear in ((array(x[0]), inner.query), (context, inner.key), (context, inner.value))
    )
    dense = layer.attention.output.dense
    expected = attend(query, key, value, 4) @ array(dense.weight).T + array(dense.bias)
    assert np.allclose(array(layer.attention(x, mask)[0][0]), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["deep_prompt", "shallow_prompt"])
def test_prompts_keep_clips_text_causal(method):
    model = make("clip").text_model
    tokens = torch.tensor([[512, 3, 9, 27, 5, 513]])
    other = torch.tensor([[512, 3, 9, 40, 6, 513]])
    base = model(input_ids=tokens).last_hidden_state
    add_method(model, config_of(method))
    shake(model)
    first, second = (model(input_ids=ids).last_hidden_state for ids in (tokens, other))
    assert torch.allclose(first[:, :3], second[:, :3], atol=1e-6)
    assert (first[:, 3:] - second[:, 3:]).abs().amax(-1).min() > 1e-4
    assert first.shape == base.shape and (first[:, 0] - base[:, 0]).abs().max() > 1e-3
    padded = torch.tensor([[1, 1, 1, 1, 1, 0]])
    masked = model(input_ids=tokens, attention_mask=padded).last_hidden_state
    assert torch.allclose(masked[:, :5], first[:, :5], atol=1e-5)


def test_shallow_prompts_are_tokens_of_every_layer():
    """Order does not matter to ViLT's attention: the same tokens at the end, through plain layers, give the same."""
    model = make("vilt")
    pixels, pixel_mask = torch.randn(2, 3, 32, 32), torch.ones(2, 32, 32, dtype=torch.long)
    pixel_mask[1, 16:] = 0
    batch = {"input_ids": torch.tensor([[2, 3, 9, 27], [5, 6, 7, 0]]), "pixel_values": pixels}
    masks = {"attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), "pixel_mask": pixel_mask}
    entered = {}
    model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: entered.update(states=args[0], mask=kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        torch.manual_seed(0)
        model(**batch, **masks)  # transformers' own mask: one row per token
        states, seen = entered["states"], entered["mask"][:, :, :1]
        assert entered["mask"].shape == (2, 1, 21, 21) and (seen < 0).sum() == 9
        add_method(model, config_of("shallow_prompt"))
        shake(model)
        torch.manual_seed(0)
        found = model(**batch, **masks).last_hidden_state
        prompts = model.encoder.get_submodule(CHILD).prompts
        states = torch.cat([states, prompts.expand(2, -1, -1)], 1)
        for layer in model.encoder.layer:
            states = layer(states, nn.functional.pad(seen, (0, 5)))[0]
        expected = model.layernorm(states)
    assert torch.allclose(found, expected[:, :21], atol=1e-5)


def test_shallow_prompts_of_meters_two_stacks():
    model = make("meter")
    text, image = torch.randn(2, 3, 32), torch.randn(2, 4, 32)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    stacks = list(zip(model.cross_modal_text_layers, model.cross_modal_image_layers, strict=True))
    plain = copy.deepcopy(stacks)
    add_method(model, config_of("shallow_prompt"))
    shake(model)
    prompts = model.get_submodule(CHILD)

    def through(layers, text, image, mask):
        for text_layer, image_layer in layers:
            text, image = text_layer(text, image, mask, None, False)[0], image_layer(image, text, None, mask, False)[0]
        return text, image

    with torch.no_grad():
        found = through(stacks, text, image, mask)
        long_text = torch.cat([text, prompts.text_prompts.expand(2, -1, -1)], 1)
        long_image = torch.cat([image, prompts.image_prompts.expand(2, -1, -1)], 1)
        expected = through(plain, long_text, long_image, torch.cat([mask, torch.ones(2, 5, dtype=torch.bool)], 1))
    assert torch.allclose(found[0], expected[0][:, :3], atol=1e-5)
    assert torch.allclose(found[1], expected[1][:, :4], atol=1e-5)


@pytest.mark.parametrize("method", ADDING)
def test_attach_freeze_save_load_remove(family, method, tmp_path):
    model = make(family)
    base, before = run(family, model), snapshot(model)
    stored = stored_config(model, method)
    assert add_method(model, config_of(method))
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="attached already"):
        add_method(model, MethodConfig("adapter"))
    shake(model)
    adapted = run(family, model)
    assert (adapted - base).abs().max() > 1e-4
    trainable, total = freeze_for_method(model)
    assert 0 < trainable < total
    own = {id(p) for _, p in method_parameters(model)}
    beside = {n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own}
    assert all(
        {"pooler", "token_type_embeddings"} & set(n.replace("_text_", ".").replace("_image_", ".").split("."))
        for n in beside
    )
    twin = copy.deepcopy(model)
    for _, parameter in method_parameters(twin):
        parameter.data.zero_()
    assert torch.equal(run(family, model), adapted)
    MODELS[family][1](model).square().sum().backward()
    assert all(p.grad is not None for _, p in method_parameters(model))
    model.zero_grad(set_to_none=True)

    file = save_method(model, tmp_path / "method.safetensors")
    remove_method(model)
    model.requires_grad_(True)
    assert torch.allclose(run(family, model), base, atol=1e-6) and same(before, snapshot(model))
    assert load_method(model, file) == stored and method_of(model) == method
    assert torch.equal(run(family, model), adapted)


def test_full_tuning_and_classifier_only_are_a_matter_of_freezing():
    model = make("vilt")
    assert add_method(model, MethodConfig("full")) == []
    assert freeze_for_method(model)[0] == sum(p.numel() for p in model.parameters())
    remove_method(model)
    add_method(model, MethodConfig("classifier_only"))
    freeze_for_method(model)
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"dense", "token_type_embeddings"}
    # The released pattern matches BERT's table of segments, too; of METER's RoBERTa it trains nothing.
    assert [name for name, p in model.named_parameters() if p.requires_grad and "text_embeddings" in name] == [
        "embeddings.text_embeddings.token_type_embeddings.weight"
    ]
    meter = make("meter")
    add_method(meter, MethodConfig("classifier_only"))
    freeze_for_method(meter)
    assert not any("text_model" in name for name, p in meter.named_parameters() if p.requires_grad)


def test_a_file_from_before_the_table_of_segments_was_trained(tmp_path):
    model = make("vilt")
    add_method(model, config_of("adapter"))
    shake(model)
    adapted, file = run("vilt", model), save_method(model, tmp_path / "method.safetensors")
    with safe_open(file, "pt") as content:
        tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        header = content.metadata()
    del tensors["embeddings.text_embeddings.token_type_embeddings.weight"]
    save_file(tensors, file, header)
    other = make("vilt")
    load_method(other, file)
    assert torch.allclose(run("vilt", other), adapted, atol=1e-6)
    del tensors["pooler.dense.bias"]
    save_file(tensors, file, header)
    with pytest.raises(ValueError, match=r"pooler\.dense\.bias"):
        load_method(make("vilt"), file)


def test_a_file_for_another_model_changes_nothing(tmp_path):
    model, other = make("vilt"), make("meter")
    add_method(model, config_of("adapter"))
    file = save_method(model, tmp_path / "method.safetensors")
    before, output = snapshot(other), run("meter", other)
    with pytest.raises(ValueError, match="does not fit MeterModel"):
        load_method(other, file)
    assert same(before, snapshot(other)) and torch.equal(run("meter", other), output)
    (tmp_path / "foreign").write_bytes(b"PK")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_method(other, tmp_path / "foreign")
    for header in ("{", "[]", "{}", '{"method": "ia3", "trained": null}', '{"method": "adapter", "alpha": 1}'):
        save_file({}, tmp_path / "later", {METHOD_HEADER: header})
        message = "describes no method that this version knows|names no method|cannot be used"
        with pytest.raises(ValueError, match=message):
            load_method(other, tmp_path / "later")
    assert same(before, snapshot(other))
    add_apt(other, APTConfig(num_prompts=3))
    with pytest.raises(ValueError, match="'apt' is attached already: call remove_apt"):
        add_method(other, MethodConfig("adapter"))
    with pytest.raises(ValueError, match="made for Vilt, Meter, CLIP, not for Linear"):
        add_method(nn.Linear(2, 2), MethodConfig("adapter"))
    with pytest.raises(ValueError, match="Unknown method 'ia3'"):
        MethodConfig("ia3")
    with pytest.raises(ValueError, match="bottleneck must be positive"):
        MethodConfig("adapter", bottleneck=0)


def test_what_is_trained_beside_a_method_leaves_the_encoders_alone():
    """RoBERTa has a table of token types, too: training it would make everything cached from the encoder wrong."""
    model = make_meter(use_classifier_token=True)
    assert set(trained_beside(model)) == {
        "token_type_embeddings", "cross_modal_text_pooler", "cross_modal_image_pooler", "classifier_token",
    }  # fmt: skip
    add_method(model, MethodConfig("classifier_only"))
    freeze_for_method(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "classifier_token" in trained and not any("text_model" in name for name in trained)


def test_an_adapter_may_keep_a_single_parameter_beside_it(tmp_path):
    model = MeterForQuestionAnswering(meter_config(use_classifier_token=True, num_labels=3))
    token = model.meter.classifier_token
    base, names = token.detach().clone(), trained_beside(model)
    add_apt(model, APTConfig(num_prompts=3, modules_to_save=names))
    freeze_base(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".apt." in n or n.startswith(names)}
    token.data.add_(1)
    file = save_apt_weights(model, tmp_path)
    remove_apt(model)
    assert torch.equal(token, base)
    load_apt_weights(model, file)
    assert torch.equal(token, base + 1)
