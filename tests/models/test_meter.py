"""METER against arithmetic in numpy, and as a model of transformers."""

import math

import numpy as np
import pytest
import torch
from conftest import make_meter, make_tokenizer, meter_config, meter_inputs

from apt_diffusion.models.meter import (
    MeterConfig,
    MeterForImageAndTextRetrieval,
    MeterForImagesAndTextClassification,
    MeterForQuestionAnswering,
    MeterModel,
    MeterProcessor,
)

# Arithmetic in numpy, float64, one sample


def layer_norm(x, module):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + module.eps) * array(module.weight) + array(
        module.bias
    )


def array(tensor):
    return tensor.detach().double().numpy()


def linear(x, module):
    return x @ array(module.weight).T + array(module.bias)


def attend(x, context, module, keep):
    """Loops over heads and queries."""
    heads, width = module.num_heads, module.hidden_size // module.num_heads
    q, k, v = linear(x, module.query), linear(context, module.key), linear(context, module.value)
    out = np.zeros_like(q)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for row in range(len(q)):
            scores = np.array([q[row, part] @ k[column, part] / math.sqrt(width) for column in range(len(k))])
            weights = np.where(keep, np.exp(scores - scores.max()), 0)
            out[row, part] = weights / weights.sum() @ v[:, part]
    return linear(out, module.dense)


def cross_layer(x, context, layer, keep_own, keep_context):
    x = layer_norm(attend(x, x, layer.attention, keep_own) + x, layer.attention_layer_norm)
    x = layer_norm(attend(x, context, layer.crossattention, keep_context) + x, layer.crossattention_layer_norm)
    hidden = linear(x, layer.intermediate)
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return layer_norm(linear(hidden, layer.output) + x, layer.output_layer_norm)


def reference(model, text_features, image_features, mask):
    """Pooled output of one sample."""
    kinds = array(model.token_type_embeddings.weight)
    text = linear(array(text_features), model.cross_modal_text_transform) + kinds[0]
    image = linear(array(image_features), model.cross_modal_image_transform) + kinds[1]
    keep_text, keep_image = mask.bool().numpy(), np.ones(len(image), bool)
    for text_layer, image_layer in zip(model.cross_modal_text_layers, model.cross_modal_image_layers, strict=True):
        text, image = (
            cross_layer(text, image, text_layer, keep_text, keep_image),
            cross_layer(image, text, image_layer, keep_image, keep_text),
        )
    pooled = [
        np.tanh(linear(states[0], pooler.dense))
        for states, pooler in ((text, model.cross_modal_text_pooler), (image, model.cross_modal_image_pooler))
    ]
    return np.concatenate(pooled)


def test_cross_modal_layers_agree_with_loops_in_numpy():
    model = make_meter().double()
    batch = meter_inputs() | {"pixel_values": meter_inputs()["pixel_values"].double()}
    with torch.no_grad():
        pooled = model(**batch).pooler_output
        text = model.get_text_features(batch["input_ids"], batch["attention_mask"])
        image = model.get_image_features(batch["pixel_values"])
    for index in range(2):
        expected = reference(model, text[index], image[index], batch["attention_mask"][index])
        assert np.allclose(array(pooled[index]), expected, rtol=1e-10, atol=1e-12)


def test_encoders_are_those_of_transformers_with_the_last_norm_on_all_tokens():
    model, batch = make_meter(), meter_inputs()
    with torch.no_grad():
        states = model.vision_model(batch["pixel_values"]).last_hidden_state
        norm = model.vision_model.post_layernorm
        expected = torch.nn.functional.layer_norm(states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        assert torch.equal(model.get_image_features(batch["pixel_values"]), expected)
        larger = model.get_image_features(torch.zeros(1, 3, 32, 32))
    assert expected.shape == (2, 5, 16) and larger.shape == (1, 17, 16)
    assert meter_config().vision_config.num_hidden_layers == 2 and MeterConfig().vision_config.num_hidden_layers == 11


def test_default_sizes_are_meters():
    with torch.device("meta"):
        model = MeterModel(MeterConfig())
    count = sum(p.numel() for p in model.parameters())
    # The official 319,474,688 hold RoBERTa's unused pooler and what is left of CLIP's text tower.
    assert count == 319_474_688 - (768 * 768 + 768) - 40_448
    assert sum(p.numel() for p in model.cross_modal_text_layers[0].parameters()) == 9_451_776


def test_padding_does_not_matter():
    model, batch = make_meter(), meter_inputs()
    other = batch["input_ids"].clone()
    other[1, 3:] = 40
    with torch.no_grad():
        expected, changed = model(**batch).pooler_output, model(**(batch | {"input_ids": other})).pooler_output
        longer = {
            key: torch.nn.functional.pad(batch[key], (0, 3), value=value)
            for key, value in (("input_ids", 1), ("attention_mask", 0))
        }
        padded = model(**(batch | longer)).pooler_output
    assert torch.allclose(expected, changed, atol=1e-6) and torch.allclose(expected, padded, atol=1e-6)


def test_eager_attention_gives_the_numbers_of_the_fused_kernel():
    model, batch = make_meter(), meter_inputs()
    with torch.no_grad():
        fused = model(**batch)
        eager = model(**batch, output_attentions=True, output_hidden_states=True)
    assert torch.allclose(fused.last_hidden_state, eager.last_hidden_state, atol=1e-6)
    assert [tuple(a.shape) for a in eager.attentions[:4]] == [(2, 4, 5, 5), (2, 4, 5, 5), (2, 4, 5, 5), (2, 4, 5, 5)]
    assert eager.attentions[3][1, 0, 0, 3:].sum() == 0  # the image does not look at padding
    assert len(eager.hidden_states) == 3 and torch.equal(eager.hidden_states[-1], eager.last_hidden_state)
    assert isinstance(model(**batch, return_dict=False), tuple)


def test_kept_encoder_outputs_stand_for_the_raw_meter_inputs():
    model, batch = make_meter(), meter_inputs()
    with torch.no_grad():
        expected = model(**batch).pooler_output
        kept = {
            "text_embeds": model.get_text_features(batch["input_ids"], batch["attention_mask"]),
            "image_embeds": model.get_image_features(batch["pixel_values"]),
        }
        assert torch.equal(model(attention_mask=batch["attention_mask"], **kept).pooler_output, expected)
    with pytest.raises(ValueError, match="Give the text once"):
        model(**batch, **kept)
    with pytest.raises(ValueError, match="Give the image once"):
        model(input_ids=batch["input_ids"])


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = make_meter().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(**meter_inputs()).pooler_output.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.cross_modal_text_layers.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_the_classifier_token_takes_the_first_words_place():
    model, batch = make_meter(use_classifier_token=True), meter_inputs()
    other = batch["input_ids"].clone()
    other[:, 0] = 30
    text = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    image = model.get_image_features(batch["pixel_values"])
    changed = torch.cat([torch.randn(2, 1, 24), text[:, 1:]], 1)
    mask = {"attention_mask": batch["attention_mask"], "image_embeds": image}
    before = model(text_embeds=text, **mask).pooler_output
    assert torch.equal(before, model(text_embeds=changed, **mask).pooler_output)
    with torch.no_grad():
        model.classifier_token += 1
    assert (model(text_embeds=text, **mask).pooler_output - before).abs().max() > 1e-3


def test_question_answering_loss():
    torch.manual_seed(0)
    model = MeterForQuestionAnswering(meter_config(num_labels=7)).eval()
    labels = torch.rand(2, 7)
    outputs = model(**meter_inputs(), labels=labels)
    p = array(outputs.logits)
    p = 1 / (1 + np.exp(-p))
    y = array(labels)
    expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(1).mean()
    assert outputs.logits.shape == (2, 7) and outputs.loss.item() == pytest.approx(expected, rel=1e-5)


def test_two_images_are_two_passes_with_their_own_row():
    torch.manual_seed(0)
    model = MeterForImagesAndTextClassification(meter_config(num_labels=2, modality_type_vocab_size=3)).eval()
    batch = meter_inputs(images=2)
    outputs = model(**batch, labels=torch.tensor([1, 0]))
    first, second = (
        model.meter(
            batch["input_ids"], batch["attention_mask"], batch["pixel_values"][:, i], image_token_type_idx=i + 1
        )
        for i in range(2)
    )
    expected = model.classifier(torch.cat([first.pooler_output, second.pooler_output], -1))
    assert torch.allclose(outputs.logits, expected, atol=1e-6)
    assert outputs.loss.item() == pytest.approx(
        torch.nn.functional.cross_entropy(expected, torch.tensor([1, 0])).item()
    )
    with pytest.raises(ValueError, match="Expected 2 images"):
        model(**meter_inputs(images=3))


@pytest.mark.parametrize(
    "cls", [MeterModel, MeterForQuestionAnswering, MeterForImagesAndTextClassification, MeterForImageAndTextRetrieval]
)
def test_save_and_load(cls, tmp_path):
    torch.manual_seed(0)
    two = cls is MeterForImagesAndTextClassification
    model = cls(meter_config(num_labels=3, modality_type_vocab_size=3 if two else 2, use_classifier_token=True)).eval()
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path).eval()
    assert again.config.text_config.hidden_size == 24 and again.config.vision_config.patch_size == 8
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    batch = meter_inputs(images=2) if two else meter_inputs()
    with torch.no_grad():  # products may differ in the last bit with where the weights lie in memory
        assert torch.allclose(model(**batch)[0], again(**batch)[0], rtol=0, atol=1e-6)


def test_processor(tmp_path):
    from PIL import Image
    from transformers import CLIPImageProcessor

    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    processor = MeterProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16), tokenizer)
    batch = processor(
        text=["a cat", "two"], images=[Image.new("RGB", (40, 20), "white")] * 2, padding=True, return_tensors="pt"
    )
    assert batch["pixel_values"].shape == (2, 3, 16, 16) and batch["input_ids"].shape == batch["attention_mask"].shape
    white = (1 - 0.48145466) / 0.26862954
    assert batch["pixel_values"][0, 0, 3, 3].item() == pytest.approx(white, rel=1e-4)
    processor.save_pretrained(tmp_path / "processor")
    again = MeterProcessor.from_pretrained(tmp_path / "processor")
    second = again(
        text=["a cat", "two"], images=[Image.new("RGB", (40, 20), "white")] * 2, padding=True, return_tensors="pt"
    )
    assert all(torch.equal(batch[key], second[key]) for key in ("input_ids", "attention_mask", "pixel_values"))
