"""Where APT acts, and the models that look: against the equations, and against transformers itself."""

import json

import numpy as np
import pytest
import torch
from conftest import randomize
from PIL import Image
from support.studio_helpers import ANNA, copy_adapter, make_adapter, picture
from transformers import CLIPModel

from apt_diffusion import APTConfig, add_apt, load_apt_weights, save_apt_weights, set_apt_adapters
from apt_diffusion.data.processors import load_processor
from apt_diffusion.io.files import WEIGHTS_NAME, read_adapter_file, write_safetensors
from apt_diffusion.miniature import vision_language
from apt_diffusion.studio.gates import mean_map, overlay, recorded_gates
from apt_diffusion.studio.generation import Order, Painter
from apt_diffusion.studio.library import Library
from apt_diffusion.studio.understanding import Reader, image_map, noted_patches

ANSWERS = ["red", "blue", "two", "yes"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Untrained miniature CLIP, ViLT and METER, as they would be downloaded."""
    folder = tmp_path_factory.mktemp("models")
    for name, (make, _) in vision_language.MAKERS.items():
        torch.manual_seed(1)
        vision_language.export(name, folder / name, make())
    return folder


def answerer(kind, base):
    from transformers import ViltForQuestionAnswering

    from apt_diffusion.models.meter import MeterForQuestionAnswering

    model_class = {"vilt": ViltForQuestionAnswering, "meter": MeterForQuestionAnswering}[kind]
    return model_class.from_pretrained(base, num_labels=len(ANSWERS), ignore_mismatched_sizes=True).eval()


@pytest.fixture(scope="module")
def library(models, tmp_path_factory):
    """Adapters for all three, whose prompts act strongly."""
    library = Library(tmp_path_factory.mktemp("adapters"))
    for kind in ("vilt", "meter"):
        torch.manual_seed(2)
        model = answerer(kind, models / kind)
        add_apt(model, APTConfig(num_prompts=5, modules_to_save=["classifier"]))
        randomize(model)
        for parameter in model.classifier.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        header = {"base_model": str(models / kind), "answers": json.dumps(ANSWERS)}
        save_apt_weights(model, library.folder / kind, metadata=header)
    clip = CLIPModel.from_pretrained(models / "clip", dtype=torch.float32)
    add_apt(clip, APTConfig(num_prompts=5))
    randomize(clip)
    save_apt_weights(clip, library.folder / "clip", metadata={"base_model": str(models / "clip")})
    return library


@pytest.fixture
def photo(tmp_path):
    return Image.open(picture(tmp_path / "photo.png", 64, 64)).convert("RGB")


# The gate


def test_the_gate_is_the_largest_affinity_of_each_token(models):
    model = answerer("vilt", models / "vilt")
    add_apt(model, APTConfig(num_prompts=6))
    randomize(model)
    states = {}
    for name, module in model.named_modules():
        if name.endswith(".attention.apt"):
            module.register_forward_pre_hook(lambda _, args, name=name: states.update({name: args[1].double()}))
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "pixel_values": torch.randn(1, 3, 64, 64)}
    with recorded_gates(model) as record:
        model(**inputs)
    seen = dict(states)
    model(**inputs)  # not recorded any more
    assert len(record) == 6 and all(len(calls) == 1 for calls in record.values())
    for name, (gates,) in record.items():
        adapter = model.get_submodule(f"{name}.apt").adapters["default"]
        prompts, down, up = (
            getattr(adapter, part).detach().double().numpy() for part in ("prompts", "low_rank_down", "low_rank_up")
        )
        keys = prompts + prompts @ down.T @ up.T
        affinity = np.maximum(seen[f"{name}.apt"].detach().numpy() @ keys.T, 0)
        assert np.allclose(gates.numpy(), affinity.max(-1), rtol=1e-4, atol=1e-6)


def test_gates_of_mixed_adapters_add_up_by_weight(models):
    model = answerer("vilt", models / "vilt")
    for name in ("one", "two"):
        add_apt(model, APTConfig(num_prompts=3), name)
    randomize(model)
    inputs = {"input_ids": torch.tensor([[5]]), "pixel_values": torch.randn(1, 3, 64, 64)}
    first = "vilt.encoder.layer.0.attention"  # what reaches it does not depend on any weight
    noted = {}
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, 2.0)):
        set_apt_adapters(model, ["one", "two"], list(weights))
        torch.manual_seed(0)  # of the order in which ViLT reads the patches
        with recorded_gates(model) as record:
            model(**inputs)
        noted[weights] = record[first][0]
    assert torch.allclose(noted[0.5, 2.0], 0.5 * noted[1.0, 0.0] + 2 * noted[0.0, 1.0], atol=1e-5)


def test_maps_of_different_sizes_count_alike():
    coarse = torch.tensor([[[0.0, 8.0], [4.0, 0.0]]])  # (steps, h, w)
    fine = torch.zeros(1, 4, 4)
    fine[0, 0, 0] = 0.5
    mean = mean_map([coarse, fine], (4, 4))
    assert mean.shape == (1, 4, 4)
    assert mean[0, 0, 0] == 0.5 and mean[0, 0, 3] == 0.5 and mean[0, 3, 0] == 0.25 and mean[0, 3, 3] == 0


def test_overlays_are_bright_where_the_gate_is_open():
    shown = np.asarray(overlay(Image.new("RGB", (32, 32), "gray"), np.array([[1.0, 0.0], [0.0, 0.0]]))).astype(int)
    assert shown.shape == (256, 256, 3)
    assert shown[10, 10].sum() > 2 * shown[10, 200].sum()


def test_drawing_is_watched_per_latent_position_and_step(tiny_sd_path, tmp_path):
    painter = Painter(str(tiny_sd_path))
    library = Library(tmp_path / "adapters")
    copy_adapter(make_adapter(tiny_sd_path, tmp_path / "glyph"), library.folder / "glyph")
    adapter = library.get(ANNA, "public/glyph")
    settings = {"prompt": "a sks glyph", "steps": 3, "guidance": 3.0, "width": 32, "height": 16, "seed": 5}
    order = Order(adapters=((adapter, 1.0),), **settings)
    last = list(painter.watch(order))[-1]
    assert last.maps.shape == (3, 4, 8)  # 4 pixels per latent cell, high and wide as the picture
    assert last.maps.min() >= 0 and last.maps.max() <= 1
    drawn = [step for step in painter.draw(order) if step.done and step.part == "adapted"]
    assert np.array_equal(np.asarray(last.pictures[0]), np.asarray(drawn[0].pictures[0]))
    assert not any(core._forward_pre_hooks for core in painter.pipe.unet.modules() if hasattr(core, "adapters"))


# Questions


@pytest.mark.parametrize("kind", ["vilt", "meter"])
def test_answers_are_the_models_own_with_and_without_apt(models, library, photo, kind):
    reader = Reader()
    adapter = library.get(ANNA, f"public/{kind}", kind)
    reading = reader.ask(photo, "what color is the circle?", adapter)

    model = answerer(kind, models / kind)
    load_apt_weights(model, adapter.file)
    inputs = load_processor(kind, models / kind)(photo, "what color is the circle?", return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits[0].sigmoid()
    assert reading.with_adapter == pytest.approx(dict(zip(ANSWERS, expected.tolist(), strict=True)), abs=1e-5)
    assert list(reading.with_adapter.values()) == sorted(reading.with_adapter.values(), reverse=True)
    assert reading.without != pytest.approx(reading.with_adapter, abs=1e-3)
    assert reading.gates.width == reading.gates.height >= 256
    again = reader.ask(photo, "what color is the circle?", adapter)  # nothing of the first is left
    assert again.without == pytest.approx(reading.without, abs=1e-5)
    assert again.with_adapter == pytest.approx(reading.with_adapter, abs=1e-5)


@pytest.mark.parametrize("kind", ["vilt", "meter"])
def test_the_map_shows_each_patch_in_its_place(models, library, kind):
    adapter = library.get(ANNA, f"public/{kind}", kind)
    model, processor = answerer(kind, models / kind), load_processor(kind, models / kind)
    load_apt_weights(model, adapter.file)
    if kind == "vilt":
        model.vilt.embeddings.position_embeddings.data.zero_()
        first = "vilt.encoder.layer.0.attention"
    else:
        model.meter.vision_model.embeddings.position_embedding.weight.data.zero_()
        for layer in model.meter.vision_model.encoder.layers:  # patches do not see each other
            layer.self_attn.out_proj.weight.data.zero_()
        first = "meter.cross_modal_image_layers.0.attention"
    odd = Image.new("RGB", (64, 64), "black")
    odd.paste("white", (32, 16, 48, 32))  # row 1, column 2 of 4 x 4 patches
    with recorded_gates(model) as record, noted_patches(model) as order, torch.no_grad():
        model(**processor(odd, "red?", return_tensors="pt"))
    values = image_map({first: record[first]}, kind, (4, 4), order[0] if order else None).numpy()
    others = np.delete(values.flatten(), 4 * 1 + 2)
    assert np.ptp(others) < 1e-5 < abs(values[1, 2] - others[0])


def test_questions_that_cannot_be_answered_are_refused_in_words(library, photo):
    reader = Reader()
    for question in ("", "x" * 301):
        with pytest.raises(ValueError, match="Ask something"):
            reader.ask(photo, question, library.get(ANNA, "public/vilt", "vilt"))
    with pytest.raises(ValueError, match=r"reads \d+ tokens; it would not see '.*red\?'. Ask something shorter"):
        reader.ask(photo, "what color is it? " * 8 + "red?", library.get(ANNA, "public/vilt", "vilt"))
    with pytest.raises(ValueError, match="not trained to answer"):
        reader.ask(photo, "red?", library.get(ANNA, "public/clip", "clip"))


@pytest.mark.parametrize("kind", ["vilt", "clip"])
def test_a_base_model_that_is_not_there_is_said_in_words(library, photo, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    other = Library(tmp_path / "adapters")
    file = read_adapter_file(library.get(ANNA, f"public/{kind}", kind).file)
    lost = {"base_model": str(tmp_path / "gone" / "my-model")}
    write_safetensors(file.tensors, other.folder / "lost.safetensors", file.metadata | lost)
    adapter = other.get(ANNA, "public/lost", kind)
    with pytest.raises(ValueError, match="“my-model”, cannot be loaded") as error:
        Reader().ask(photo, "red?", adapter) if kind == "vilt" else Reader().classify(photo, LABELS, adapter=adapter)
    assert str(tmp_path) not in str(error.value)


def test_a_base_in_a_folder_is_found_where_the_adapter_was_trained(library, models, photo, tmp_path):
    other = Library(tmp_path / "adapters")
    file = read_adapter_file(library.get(ANNA, "public/clip", "clip").file)
    write_safetensors(file.tensors, other.folder / "own" / WEIGHTS_NAME, file.metadata | {"base_model": "clip"})
    (other.folder / "own" / "config.local.toml").write_text(f"model_name_or_path = '{models / 'clip'}'\n")
    found = Reader().classify(photo, LABELS, adapter=other.get(ANNA, "public/own", "clip"))
    expected = Reader().classify(photo, LABELS, adapter=library.get(ANNA, "public/clip", "clip"))
    assert found.with_adapter == expected.with_adapter


# Classes

LABELS = ["red circle", "blue star", "moon"]


def test_zero_shot_probabilities_are_those_of_clip(models, library, photo, monkeypatch):
    monkeypatch.setattr("apt_diffusion.studio.understanding.EMBEDDED_CLIP", str(models / "clip"))
    adapter = library.get(ANNA, "public/clip", "clip")
    reading = Reader().classify(photo, LABELS, adapter=adapter)
    texts = [f"a photo of a {label}." for label in LABELS]
    inputs = load_processor("clip", models / "clip")(text=texts, images=photo, return_tensors="pt", padding=True)
    model = CLIPModel.from_pretrained(models / "clip", dtype=torch.float32).eval()

    def expected():
        with torch.no_grad():
            return dict(zip(LABELS, model(**inputs).logits_per_image[0].softmax(-1).tolist(), strict=True))

    assert reading.without == pytest.approx(expected(), abs=1e-4)
    load_apt_weights(model, adapter.file)
    assert reading.with_adapter == pytest.approx(expected(), abs=1e-4)
    assert reading.gates is not None and Reader().classify(photo, LABELS).with_adapter is None


def test_few_shots_compare_with_the_mean_example(models, photo, tmp_path, monkeypatch):
    monkeypatch.setattr("apt_diffusion.studio.understanding.EMBEDDED_CLIP", str(models / "clip"))
    others = [Image.open(picture(tmp_path / f"{i}.png", 64, 64, seed=i)).convert("RGB") for i in range(1, 4)]
    shots = [(photo, "same"), (others[0], "other"), (others[1], "other")]
    reader = Reader()
    said = reader.classify(photo, ["same", "other"], shots).without
    model, processor = CLIPModel.from_pretrained(models / "clip").eval(), load_processor("clip", models / "clip")
    with torch.no_grad():
        pixels = processor.image_processor([photo, *others[:2]], return_tensors="pt")["pixel_values"]
        same, *rest = torch.nn.functional.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
        other = torch.nn.functional.normalize(sum(rest) / 2, dim=-1)
        logits = model.logit_scale.exp() * torch.stack([same @ same, same @ other])
    assert list(said.values()) == pytest.approx(logits.softmax(0).tolist(), abs=1e-4)
    assert said["same"] > said["other"]


@pytest.mark.parametrize(
    ("labels", "given", "message"),
    [
        (["one"], [], "from 2 to"),
        (["one", "one"], [], "the same"),
        (["one", "two"], ["three"], "none of the labels"),
        (["one", "two"], ["one"], "no example of “two”"),
    ],
)
def test_labels_that_make_no_sense_are_refused_in_words(photo, labels, given, message):
    with pytest.raises(ValueError, match=message):
        Reader().classify(photo, labels, [(photo, label) for label in given])
