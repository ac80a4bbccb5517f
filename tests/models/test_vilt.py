"""ViLT with the fused attention kernel and the classifier token: transformers' numbers, whatever else is attached."""

import copy
import pickle

import pytest
import torch
from conftest import make_meter, randomize
from support.families import SMALL, make_vilt, snapshot, vilt_output
from support.method_helpers import ADDING, config_of, shake
from transformers.models.vilt.modeling_vilt import ViltSelfAttention

import apt_diffusion as apt
from apt_diffusion.baselines import add_method, remove_method
from apt_diffusion.models.vilt import ViltSdpaSelfAttention, add_classifier_token, use_sdpa


@pytest.fixture
def model():
    torch.manual_seed(0)
    return make_vilt().eval()


def batch():
    """Padding in both modalities."""
    mask = torch.ones(2, 32, 32, dtype=torch.long)
    mask[1, :, 16:] = 0
    return {
        "input_ids": torch.tensor([[2, 3, 9, 27], [5, 6, 7, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        "pixel_mask": mask,
    }


def run(model, **more):
    torch.manual_seed(0)  # ViLT draws its image patches at random
    return model(**batch(), **more)


def classes(model):
    return {type(module) for module in model.modules() if isinstance(module, ViltSelfAttention)}


def test_the_same_numbers_and_gradients(model):
    model.double()
    states = torch.randn(2, 6, 32, dtype=torch.float64)
    mask = torch.zeros(2, 1, 6, 6, dtype=torch.float64)
    mask[1, ..., 4:] = torch.finfo(torch.float64).min
    found = []
    for enabled in (False, True):
        assert use_sdpa(model, enabled) == 2
        x = states.clone().requires_grad_()
        out = model.encoder(x, mask).last_hidden_state
        (out * torch.linspace(-1, 1, 32, dtype=torch.float64)).sum().backward()
        found.append((out.detach(), x.grad, model.encoder.layer[0].attention.attention.key.weight.grad.clone()))
        model.zero_grad()
    for eager, fused in zip(*found, strict=True):
        assert eager.abs().max() > 1e-3
        torch.testing.assert_close(fused, eager, rtol=1e-10, atol=1e-12)


def test_whole_model_with_padding_and_probabilities(model):
    with torch.no_grad():
        expected = run(model, output_attentions=True)
        use_sdpa(model)
        torch.testing.assert_close(run(model).last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
        asked = run(model, output_attentions=True)
    assert torch.equal(asked.last_hidden_state, expected.last_hidden_state)
    assert len(asked.attentions) == 2 and all(map(torch.equal, asked.attentions, expected.attentions))


def test_it_leaves_no_trace(model, tmp_path):
    untouched, keys = snapshot(model), list(model.state_dict())
    use_sdpa(model)
    assert classes(model) == {ViltSdpaSelfAttention} and list(model.state_dict()) == keys
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert classes(clone) == {ViltSdpaSelfAttention} and torch.equal(vilt_output(clone), vilt_output(model))
    model.save_pretrained(tmp_path)
    assert classes(type(model).from_pretrained(tmp_path)) == {ViltSelfAttention}
    use_sdpa(model, enabled=False)
    after = snapshot(model)
    assert classes(model) == {ViltSelfAttention} and untouched[:2] == after[:2]


@pytest.mark.parametrize("first", ["sdpa", "apt"])
def test_with_apt_attached_before_or_after(model, first, tmp_path):
    expected_model = copy.deepcopy(model)
    apt.add_apt(expected_model, SMALL)
    randomize(expected_model)
    file = apt.save_apt_weights(expected_model, tmp_path)
    if first == "sdpa":
        use_sdpa(model)
    apt.load_apt_weights(model, file)
    if first == "apt":
        use_sdpa(model)
    with torch.no_grad():
        expected, base = run(expected_model).pooler_output, run(model).pooler_output
        torch.testing.assert_close(base, expected, rtol=1e-4, atol=1e-5)
    apt.remove_apt(model)
    assert classes(model) == {ViltSdpaSelfAttention}


@pytest.mark.parametrize("method", ADDING)
def test_with_the_compared_methods(model, method):
    fused = copy.deepcopy(model)
    use_sdpa(fused)
    outputs = []
    for variant in (model, fused):
        torch.manual_seed(1)
        add_method(variant, config_of(method))
        shake(variant)
        with torch.no_grad():
            outputs.append(run(variant).pooler_output)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    remove_method(fused)
    assert classes(fused) == {ViltSdpaSelfAttention}


def test_dropout_of_probabilities_while_training():
    """Dropped at the same rate and scaled back: over many draws mean and variance are those of the slow way."""
    model = make_vilt()
    attention = model.encoder.layer[0].attention.attention.train()
    attention.dropout.p = 0.4
    states = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0)).expand(20_000, -1, -1)
    moments = []
    for enabled in (False, True):
        use_sdpa(model, enabled)
        with torch.no_grad():
            drawn = attention(states)[0]
        moments.append((drawn.mean(0), drawn.var(0)))
    (mean, variance), (fused_mean, fused_variance) = moments
    assert variance.min() > 0
    assert ((fused_mean - mean).abs() < 6 * (2 * variance / 20_000).sqrt()).all()
    assert torch.allclose(fused_variance, variance, rtol=0.15)
    attention.eval()
    assert torch.equal(attention(states[:2])[0][0], attention(states[:2])[0][1])


def test_autocast_and_compilation(model):
    with torch.no_grad():
        expected = run(model).last_hidden_state
        use_sdpa(model)
        with torch.autocast("cpu", torch.bfloat16):  # the mask stays float32
            assert (run(model).last_hidden_state.float() - expected).abs().max() < 0.1 * expected.abs().max()
        states, mask = torch.randn(2, 6, 32), torch.zeros(2, 1, 6, 6)
        compiled = torch.compile(model.encoder, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(
            compiled(states, mask).last_hidden_state, model.encoder(states, mask).last_hidden_state
        )
    torch._dynamo.reset()


def test_an_attachment_asks_for_no_probabilities(model):
    """Neither APT nor the fused kernel makes the attention return more than it did."""
    asked = []
    for layer in model.encoder.layer:
        layer.attention.attention.register_forward_hook(
            lambda module, args, kwargs, output: asked.append((args[2:], kwargs, len(output))), with_kwargs=True
        )
    run(model)
    before, asked[:] = list(asked), []
    apt.add_apt(model, SMALL)
    use_sdpa(model)
    run(model)
    assert asked == before == [((False,), {}, 1)] * 2
    assert not model.config.output_attentions and not model.config.output_hidden_states


def test_a_model_without_vilt():
    with pytest.raises(ValueError, match="MeterModel has no ViLT attention; METER and CLIP use the fused kernel"):
        use_sdpa(make_meter())


def test_the_classifier_token_takes_the_first_words_place(model):
    before = run(model).pooler_output
    token = add_classifier_token(model, cls_token_id=2)
    assert token.shape == (1, 1, 32) and token.requires_grad
    torch.testing.assert_close(run(model).pooler_output[0], before[0])  # this text begins with token 2
    assert (run(model).pooler_output[1] - before[1]).abs().max() > 1e-4  # and this one does not
    with torch.no_grad():
        clone = copy.deepcopy(model)
        clone.embeddings.text_embeddings.classifier_token.fill_(3.0)
        first = clone.embeddings.text_embeddings(torch.tensor([[2, 9]]))
    assert (first[0, 0] == 3).all() and not (token == 3).any()
    restored = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(restored).pooler_output, run(model).pooler_output)
    run(model).pooler_output.sum().backward()
    assert token.grad.abs().max() > 0
    with pytest.raises(ValueError, match="has a classifier token already"):
        add_classifier_token(model)
    with pytest.raises(ValueError, match="MeterModel has no ViLT text embeddings"):
        add_classifier_token(make_meter())


def official_block(layer, x, apt_module, p):
    """The official block in plain torch: projection, APT, dropout; then GELU, dropout, second map, dropout."""
    normed = layer.layernorm_before(x)
    attention = layer.attention.attention
    query, key, value = (
        project(normed).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        for project in (attention.query, attention.key, attention.value)
    )
    probabilities = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    out = layer.attention.output.dense((probabilities @ value).transpose(1, 2).flatten(2))
    prompts = apt_module.prompts
    keys = prompts + prompts @ apt_module.low_rank_down.T @ apt_module.low_rank_up.T
    affinities = (normed @ keys.T).relu()
    gate = affinities.max(-1, keepdim=True).values.detach()
    corrected = apt_module.log_scale.exp() * (out + gate * (affinities @ prompts))
    x = x + torch.nn.functional.dropout(corrected, p)
    hidden = torch.nn.functional.gelu(layer.intermediate.dense(layer.layernorm_after(x)))
    hidden = layer.output.dense(torch.nn.functional.dropout(hidden, p))
    return x + torch.nn.functional.dropout(hidden, p)


def test_training_dropout_stands_where_the_official_code_has_it(model, tmp_path):
    """Same generator, same masks: a block equals the official one only where it drops out in the same places."""
    from apt_diffusion.models.vilt import use_official_dropout

    model.double()
    for layer in model.encoder.layer:
        layer.attention.output.dropout.p = layer.output.dropout.p = 0.4
    apt.add_apt(model, SMALL)
    randomize(model)
    before = run(model.float()).pooler_output
    keys = list(model.state_dict())
    assert use_official_dropout(model) == use_official_dropout(model) == 2  # a second call changes nothing
    assert torch.equal(run(model).pooler_output, before) and list(model.state_dict()) == keys
    for trained in (model.double(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        trained.train()
        layer = trained.encoder.layer[0]
        x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        torch.manual_seed(7)
        found = layer(x)[0]
        torch.manual_seed(7)
        expected = official_block(layer, x, layer.attention.apt.adapters["default"], 0.4)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        torch.manual_seed(7)
        undropped = official_block(layer, x, layer.attention.apt.adapters["default"], 0.0)
        assert (found - undropped).abs().max() > 0.1
    apt.remove_apt(model)
    model.eval()
    assert torch.isfinite(run(model.float()).pooler_output).all()
