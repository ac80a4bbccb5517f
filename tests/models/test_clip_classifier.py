"""Classification by CLIP: its logits, memory-saving text encoding, and a cache that knows when it is out of date."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tokenizer, randomize
from support.families import make_clip
from support.method_helpers import METHODS, config_of

from apt_diffusion import APTConfig, add_apt, disable_apt, enable_apt, freeze_base, remove_apt, set_apt_scale
from apt_diffusion.baselines import MethodConfig, add_method, freeze_for_method, remove_method
from apt_diffusion.models.clip_classifier import ClipClassifier, add_linear_classifier

NAMES = ["red_circle", "blue square", "star", "green heart", "moon"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def classifier(tokenizer):
    torch.manual_seed(0)
    return ClipClassifier(make_clip().eval(), tokenizer, NAMES, "a photo of a {}.", text_batch_size=2)


def pixels(count=3):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def count_encodings(classifier, monkeypatch):
    calls = []
    method = classifier.model.get_text_features
    monkeypatch.setattr(classifier.model, "get_text_features", lambda ids: calls.append(len(ids)) or method(ids))
    return calls


@torch.no_grad()
def test_logits_are_those_of_clip(classifier, tokenizer):
    add_apt(classifier.model)
    randomize(classifier.model)
    texts = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
    tokens = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")
    expected = classifier.model(**tokens, pixel_values=pixels()).logits_per_image
    torch.testing.assert_close(classifier(pixels()), expected, rtol=1e-4, atol=1e-4)
    assert classifier.texts[0] == "a photo of a red circle."
    assert expected.std() > 0.1


def test_text_parts_give_the_gradients_of_the_whole(classifier):
    add_apt(classifier.model)
    randomize(classifier.model)
    freeze_base(classifier.model)
    classifier.train()
    labels = torch.tensor([0, 3, 4])
    losses, gradients = [], []
    for size in (100, 2):  # all at once; in parts
        classifier.text_batch_size = size
        classifier.zero_grad()
        loss = F.cross_entropy(classifier(pixels()), labels)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in classifier.parameters() if p.grad is not None])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(gradients[0]) == len(gradients[1]) == 4 * 5  # five attentions, in both towers
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_memory_is_that_of_one_part(classifier):
    """What autograd keeps for the backward pass grows with the part, not with the number of classes."""
    add_apt(classifier.model)
    freeze_base(classifier.model)
    classifier.train()
    classifier.set_classes([f"class {index}" for index in range(24)])

    def kept(size):
        classifier.text_batch_size, total = size, 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            classifier.text_features()
        return total

    assert kept(4) < 0.05 * kept(100)


def test_texts_are_encoded_once(classifier, monkeypatch):
    calls = count_encodings(classifier, monkeypatch)
    with torch.no_grad():
        first = classifier(pixels())
        assert calls == [2, 2, 1]
        assert torch.equal(classifier(pixels()), first)
    with torch.inference_mode():
        assert torch.equal(classifier(pixels()), first)
    assert calls == [2, 2, 1]
    # Learning to look at pictures alone needs the texts' features, but not their graph.
    classifier.model.requires_grad_(False)
    classifier.model.visual_projection.requires_grad_(True)
    classifier(pixels()).sum().backward()
    assert calls == [2, 2, 1]
    classifier.model.requires_grad_(True)
    assert classifier.text_features().requires_grad
    classifier.train()
    with torch.no_grad():
        classifier.text_features()
    assert len(calls) == 9  # while training nothing is kept: there may be dropout


def add_one(parameter):
    with torch.no_grad():
        parameter.add_(1)


def with_lora(model):
    add_method(model, MethodConfig("lora", rank=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)


def scale_lora(model):
    next(module for name, module in model.text_model.named_modules() if hasattr(module, "scaling")).scaling.update(
        default=5.0
    )


def optimizer_step(model):
    parameter = model.text_model.encoder.layers[0].self_attn.apt.adapters["default"].prompts
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=0.1).step()


def text_apt(model):
    return model.text_model.encoder.layers[1].self_attn.apt.adapters["default"]


def new_data(model):
    """Until it lies where the old data was, if the allocator gives that place again."""
    weight = model.text_model.encoder.layers[0].mlp.fc1.weight
    address = weight.data_ptr()
    for _ in range(20):
        weight.data = weight.data.roll(1)
        if weight.data_ptr() == address:
            break


CHANGES = {
    "one APT weight in place": (add_apt, lambda model: add_one(text_apt(model).prompts)),
    "the scale of the output": (add_apt, lambda model: add_one(text_apt(model).log_scale)),
    "a step of an optimizer": (add_apt, optimizer_step),
    "add_apt": (None, add_apt),
    "another add_apt": (add_apt, lambda model: add_apt(model, APTConfig(num_prompts=9), "second")),
    "remove_apt": (add_apt, remove_apt),
    "set_apt_scale": (add_apt, lambda model: set_apt_scale(model, 0.5)),
    "disable_apt": (add_apt, disable_apt),
    "a base weight in place": (None, lambda model: add_one(model.text_model.encoder.layers[0].mlp.fc1.weight[:, :9])),
    "a base weight replaced": (
        None,
        lambda model: setattr(
            model.text_projection, "weight", torch.nn.Parameter(model.text_projection.weight.roll(1))
        ),
    ),
    "load_state_dict": (None, lambda model: model.load_state_dict(make_clip().state_dict())),
    "a compared method": (None, lambda model: add_method(model, MethodConfig("deep_prompt", num_prompts=3))),
    "its removal": (lambda model: add_method(model, MethodConfig("adapter", bottleneck=3)), remove_method),
    "the scaling of LoRA": (with_lora, scale_lora),
    "another precision": (None, lambda model: model.to(torch.float64)),
    "new data, perhaps where the old was": (None, new_data),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_makes_the_cache_invalid(classifier, monkeypatch, change):
    prepare, act = CHANGES[change]
    if prepare:
        prepare(classifier.model)
        randomize(classifier.model)
    before = classifier.text_features()
    calls = count_encodings(classifier, monkeypatch)
    assert classifier.text_features() is before and not calls
    act(classifier.model)
    after = classifier.text_features()
    assert calls == [2, 2, 1], "the features were not computed again"
    fresh = ClipClassifier(classifier.model, classifier.tokenizer, NAMES, text_batch_size=2).text_features()
    assert torch.equal(after, fresh)
    if change not in ("add_apt", "another precision"):  # these hardly move the numbers
        assert (after - before).abs().max() > 1e-4
    assert classifier.text_features() is after


@torch.no_grad()
def test_switching_back_gives_the_same_again(classifier):
    add_apt(classifier.model)
    randomize(classifier.model)
    on = classifier.text_features()
    with disable_apt(classifier.model):
        off = classifier.text_features()
    enable_apt(classifier.model)
    assert torch.equal(classifier.text_features(), on) and not torch.equal(on, off)


@torch.no_grad()
def test_other_classes_and_templates(classifier):
    five = classifier(pixels())
    classifier.set_classes(["star", "moon"])
    torch.testing.assert_close(classifier(pixels()), five[:, [2, 4]], rtol=1e-4, atol=1e-4)
    classifier.set_classes(["star", "moon"], "{} texture.")
    assert classifier.texts == ["star texture.", "moon texture."]
    assert (classifier(pixels()) - five[:, [2, 4]]).abs().max() > 1e-3
    for wrong in ("a photo", ["a photo of {}.", "a photo"]):
        with pytest.raises(ValueError, match=r"The template 'a photo' has no \{\}"):
            classifier.set_classes(["a"], wrong)
    assert classifier.class_names == ["star", "moon"]  # an error changes nothing
    classifier.set_classes(["a {b}", "c"], "{} and {x}, {}")  # other braces are text
    assert classifier.texts[0] == "a {b} and {x}, a {b}"
    with pytest.raises(ValueError, match="got none"):
        classifier.set_classes([])
    with pytest.raises(ValueError, match=r"has no \{\}"):
        classifier.set_classes(["a"], "a photo")


@torch.no_grad()
def test_labels_are_unique_and_names_need_not_be(classifier, caplog):
    """CoOp's ImageNet has two missiles: two labels, one text, the same score."""
    alone = classifier(pixels())
    classifier.set_classes([*NAMES, "star"])
    found = classifier(pixels())
    assert found.shape == (3, 6) and torch.allclose(found[:, 5], found[:, 2], atol=1e-5)
    assert torch.equal(classifier.text_features()[5], classifier.text_features()[2])
    torch.testing.assert_close(found[:, :5], alone, rtol=1e-4, atol=1e-4)
    assert "same name cannot be told apart by their texts: ['star']" in caplog.text


@torch.no_grad()
def test_several_templates_are_averaged(classifier, tokenizer):
    """CLIP's prompt ensembles: the mean of the features of length 1, and again of length 1."""
    templates = ["a photo of a {}.", "{} texture.", "the {}"]
    classifier.set_classes(NAMES, templates)
    assert classifier.texts[:3] == ["a photo of a red circle.", "red circle texture.", "the red circle"]
    assert classifier.texts[3] == "a photo of a blue square."
    model = classifier.model
    rows = []
    for name in NAMES:
        texts = [template.replace("{}", name.replace("_", " ")) for template in templates]
        tokens = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")
        features = model.get_text_features(**tokens).pooler_output
        mean = (features / features.norm(dim=-1, keepdim=True)).mean(0)
        rows.append(mean / mean.norm())
    torch.testing.assert_close(classifier.text_features(), torch.stack(rows), rtol=1e-4, atol=1e-5)
    image = F.normalize(model.get_image_features(pixels()).pooler_output, dim=-1)
    expected = model.logit_scale.exp() * image @ torch.stack(rows).T
    torch.testing.assert_close(classifier(pixels()), expected, rtol=1e-4, atol=1e-4)


def test_names_that_read_the_same_are_refused(classifier, caplog):
    """77 tokens are read; here a letter is one."""
    long = "x" * 80
    with pytest.raises(
        ValueError, match=rf"The classes \['{long}a', '{long}b'\] become the same class: only 77 tokens"
    ):
        classifier.set_classes(["star", f"{long}a", f"{long}b"])
    fits = "x " * 74 + "x"  # exactly
    with pytest.raises(ValueError, match=rf"\['{fits}', '{fits} b'\] become the same class"):
        classifier.set_classes([fits, f"{fits} b"], "{}")
    assert classifier.class_names == NAMES
    classifier.set_classes(["star", f"{long}a", f"y{long}"])
    classifier.set_classes([f"{long}c", "star"], ["{} texture.", "{} photo"])  # one class twice is no other class
    assert "2 of 3 texts are longer than the 77 tokens that the model reads" in caplog.text
    assert "loses 'x" in caplog.text


@torch.no_grad()
def test_pictures_of_another_size_have_their_positions_interpolated(classifier):
    model = classifier.model
    larger = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    expected = model.get_image_features(larger, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(classifier.image_features(larger), F.normalize(expected, dim=-1))


@torch.no_grad()
def test_what_hides_from_the_version_counter_needs_clear(classifier):
    before = classifier.text_features()
    classifier.model.text_projection.weight.data.mul_(-1)
    assert classifier.text_features() is before  # documented
    classifier.cache.clear()
    torch.testing.assert_close(classifier.text_features(), -before)


@torch.no_grad()
def test_copies_have_caches_of_their_own(classifier):
    before = classifier.text_features()
    for other in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
        other.model.text_projection.weight.mul_(-1)
        torch.testing.assert_close(other.text_features(), -before)
    assert classifier.text_features() is before


def test_weights_without_a_version_counter_are_not_trusted(tokenizer):
    with torch.inference_mode():
        classifier = ClipClassifier(make_clip().eval(), tokenizer, NAMES)
        before = classifier.text_features()
        classifier.model.text_projection.weight.mul_(-1)
        torch.testing.assert_close(classifier.text_features(), -before)


def test_a_linear_classifier_starts_as_zero_shot_and_serves_its_own_classes(classifier):
    with torch.no_grad():
        zero_shot = classifier(pixels())
        head = add_linear_classifier(classifier)
        torch.testing.assert_close(classifier(pixels()), zero_shot)
        new = ClipClassifier(classifier.model, classifier.tokenizer, ["comet", "ring"])
        texts = new(pixels())
        head.weight.neg_()
        torch.testing.assert_close(classifier(pixels()), -zero_shot)
        torch.testing.assert_close(new(pixels()), texts)  # of other classes it knows nothing


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(classifier, method):
    """A step along the gradient of what is trained makes the loss smaller."""
    torch.manual_seed(1)
    if method == "classifier_only":
        add_linear_classifier(classifier)
    add_method(classifier.model, config_of(method, num_prompts=4, rank=2, bottleneck=4))
    trainable, _ = freeze_for_method(classifier.model)
    labels = torch.tensor([0, 3, 4])
    loss = F.cross_entropy(classifier(pixels()), labels)
    loss.backward()
    trained = [p for p in classifier.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == trainable > 0
    norm = sum(p.grad.square().sum() for p in trained if p.grad is not None).sqrt()
    with torch.no_grad():
        for parameter in trained:
            if parameter.grad is not None:
                parameter.sub_(1e-3 / norm * parameter.grad)
    assert F.cross_entropy(classifier(pixels()), labels) < loss
