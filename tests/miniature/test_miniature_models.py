"""The embedded CLIP, ViLT and METER: what they are, what they know, how they were started."""

from pathlib import Path

import pytest
import torch

from apt_diffusion.data.processors import load_processor
from apt_diffusion.miniature import FOLDER, MODELS, resolve_model
from apt_diffusion.miniature.knowledge import (
    clip_grades,
    load,
    masked_word_accuracy,
    matching_accuracy,
    matching_items,
    ridge,
)
from apt_diffusion.miniature.pictures import to_images
from apt_diffusion.miniature.start import start_meter, start_vilt
from apt_diffusion.miniature.vision_language import export, load_word_head, make_clip, make_meter, make_vilt
from apt_diffusion.miniature.world import render, sample_scenes
from apt_diffusion.models.meter import MeterForImagesAndTextClassification, MeterForQuestionAnswering

ROOT = Path(__file__).parents[2]
MIB = 2**20


@pytest.fixture(scope="module")
def clip():
    return load("clip", resolve_model("miniature-clip"))


@pytest.fixture(scope="module", params=["vilt", "meter"])
def fused(request):
    """Name, model and processor of ViLT and of METER."""
    return request.param, *load(request.param, resolve_model(f"miniature-{request.param}"))


@pytest.fixture(scope="module")
def items():
    return matching_items(100, seed=5)


def drawn(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return render(sample_scenes(count, generator), generator)


def test_names_of_embedded_models_resolve_and_others_pass():
    for name, folder in MODELS.items():
        assert resolve_model(name) == str(folder) and (folder / "README.md").is_file()
    assert resolve_model("openai/clip-vit-base-patch16") == "openai/clip-vit-base-patch16"


def test_embedded_models_are_small_and_not_pickled():
    files = {name: [file for file in folder.rglob("*") if file.is_file()] for name, folder in MODELS.items()}
    sizes = {name: sum(file.stat().st_size for file in inside) for name, inside in files.items()}
    assert all(sizes[f"miniature-{name}"] < 8 * MIB for name in ("clip", "vilt", "meter")), sizes
    assert sizes["miniature-emoji"] < 45 * MIB
    everything = [file for file in FOLDER.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in everything) < 90 * MIB
    assert not [file for file in everything if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_they_load_with_the_heads_of_the_tasks_in_full_precision():
    from transformers import CLIPModel, ViltForImagesAndTextClassification, ViltForQuestionAnswering

    for model_class, name in (
        (CLIPModel, "miniature-clip"),
        (ViltForQuestionAnswering, "miniature-vilt"),
        (MeterForQuestionAnswering, "miniature-meter"),
    ):
        model = model_class.from_pretrained(resolve_model(name))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for model_class, name, changes in (
        (ViltForImagesAndTextClassification, "miniature-vilt", {"num_images": 2}),
        (MeterForImagesAndTextClassification, "miniature-meter", {}),
    ):
        changes |= {"modality_type_vocab_size": 3, "ignore_mismatched_sizes": True}
        model = model_class.from_pretrained(resolve_model(name), **changes)
        assert model.config.modality_type_vocab_size == 3


def test_clip_classifies_without_training(clip):
    """Chance: 1/12 among base or new classes, 1/90 among the pairs of colour and shape."""
    grades = clip_grades(*clip, count=240)
    assert grades["zero-shot, base classes"] > 0.2 and grades["zero-shot, new classes"] > 0.2
    assert grades["zero-shot, 90 colour-shape pairs, those shown"] > 0.7
    assert grades["zero-shot, 90 colour-shape pairs, those held out"] > 0.4
    assert grades["16-shot ridge regression, all classes"] > grades["zero-shot, all classes"] + 0.1  # room to adapt


def test_matching_and_masked_words(fused, items):
    """Chance: one half; one tenth or one ninth. The texts that do not fit are wrong in one part."""
    name, model, processor = fused
    assert matching_accuracy(model, processor, items) > 0.8
    word_head = load_word_head(resolve_model(f"miniature-{name}"), model)
    assert masked_word_accuracy(model, word_head, processor, items) > {"vilt": 0.7, "meter": 0.5}[name]


def test_matching_items_differ_only_in_their_picture(items):
    half = len(items.texts) // 2
    assert half == 100 and items.texts[:half] == items.texts[half:]
    assert items.fits.tolist() == [True] * half + [False] * half
    assert all(a.tobytes() != b.tobytes() for a, b in zip(items.images[:half], items.images[half:], strict=True))


def test_ridge_regression_finds_a_linear_rule():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 8, generator=generator)
    labels = (features @ torch.randn(8, 3, generator=generator)).argmax(1)
    assert (ridge(features[:300], labels[:300], features[300:], 3, penalty=1e-4) == labels[300:]).float().mean() > 0.85


def test_meter_starts_as_clip_sees(clip):
    meter = make_meter().eval()
    start_meter(meter, clip[0].vision_model)
    pixels = drawn(4)
    with torch.no_grad():
        hidden = clip[0].vision_model(pixels, output_hidden_states=True).hidden_states[-2]
        expected = clip[0].vision_model.post_layernorm(hidden)
        assert torch.allclose(meter.meter.get_image_features(pixels), expected, atol=1e-5)


def test_vilt_starts_nearly_as_clip_sees(clip):
    vision, vilt = clip[0].vision_model, make_vilt().eval()
    start_vilt(vilt, vision)
    pixels = drawn(16)
    embed = vilt.vilt.embeddings
    with torch.no_grad():
        states = embed.patch_embeddings(pixels).flatten(2).transpose(1, 2)
        states = torch.cat([embed.cls_token.expand(16, -1, -1), states], 1) + embed.position_embeddings
        for layer in vilt.vilt.encoder.layer[:4]:
            (states,) = layer(states)[:1]
        expected = vision(pixels, output_hidden_states=True).hidden_states[4]
    assert (states - expected).norm() / expected.norm() < 0.4


def test_an_export_reads_back_in_full_precision(tmp_path):
    torch.manual_seed(0)
    model = make_clip()
    export("clip", tmp_path / "model", model)
    again, processor = load("clip", tmp_path / "model")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.half().float()), name
    batch = processor(images=to_images(drawn(1)), text=["a red circle"], return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 64, 64) and batch["input_ids"].shape == (1, 5)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import pretrain_miniature_vl

    return pretrain_miniature_vl


def test_training_reads_pictures_as_the_processor_gives_them(script):
    pixels = drawn(2)
    for name in ("vilt", "meter"):
        image_processor = load_processor(name, MODELS[f"miniature-{name}"]).image_processor
        expected = image_processor(to_images(pixels), return_tensors="pt")["pixel_values"]
        assert (script.normalised(pixels, image_processor) - expected).abs().max() < 0.02  # bytes are rounded


def test_training_runs_the_models_as_their_own_forward_does(script, fused):
    _, model, processor = fused
    pixels, texts = drawn(3), ["a red circle", "the background is blue", "there are two shapes"]
    batch = processor(images=to_images(pixels), text=texts, padding=True, return_tensors="pt")
    shown = [2, 0, 1]
    with torch.no_grad():
        _, pooled = script.encode(model, batch["input_ids"], batch["attention_mask"], batch["pixel_values"], shown)
        batch["pixel_values"] = batch["pixel_values"][shown]
        assert torch.allclose(pooled, model.base_model(**batch).pooler_output, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vilt"])
def test_pretraining_resumes_exactly(script, name, tmp_path):
    import stages

    def interrupt(step: int) -> None:
        raise KeyboardInterrupt

    def weights(folder: str, *runs: str) -> dict[str, torch.Tensor]:
        arguments = ["--model", name, "--output_dir", str(tmp_path / folder), "--steps", "4", "--save_every", "2"]
        args = script.parse_args([*arguments, "--batch_size", "8"])
        (tmp_path / folder).mkdir()
        for run in runs:
            stage = script.make_stage(args)
            if run == "killed":
                with pytest.raises(KeyboardInterrupt):
                    stages.fit(stage, args.output_dir, args.seed, args.save_every, interrupt)
            else:
                stages.fit(stage, args.output_dir, args.seed, args.save_every)
        return stage.modules["model"].state_dict()

    straight, resumed = weights("straight", "whole"), weights("resumed", "killed", "rest")
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
