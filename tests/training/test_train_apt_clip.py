"""The CLIP trainer: exact resume, evaluation alone, both protocols, every method, several seeds, early errors."""

import json

import pytest
import torch
from conftest import make_tokenizer
from support.families import make_clip
from support.method_helpers import METHODS
from support.vl_helpers import COLORS, assert_same_weights, picture, results, rows, train, weights

from apt_diffusion.data.classification import few_shot, read_data_set
from apt_diffusion.data.crops import ClipPictures


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import CLIPImageProcessorPil, CLIPProcessor

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    make_clip().save_pretrained(folder)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(image_processor, make_tokenizer(folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three colours, large and small: four base classes would be three, three new ones."""
    folder = tmp_path_factory.mktemp("data") / "classes"
    rows = {"train": [], "val": [], "test": []}
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        for label in range(6):
            for index in range(count):
                path = f"{split}/{label}-{index}.png"
                (folder / "images" / split).mkdir(parents=True, exist_ok=True)
                size = (24, 16) if label < 3 else (16, 40)
                picture(list(COLORS)[label % 3], 10 * label + index, size).save(folder / "images" / path)
                rows[split].append([path, label, f"{list(COLORS)[label % 3]}_{'wide' if label < 3 else 'tall'}"])
    (folder / "split_zhou_Colors.json").write_text(json.dumps(rows))
    return folder


def run(model, data, output, **flags):
    flags = {"seed": None, "seeds": 1, "num_shots": 2, "train_batch_size": 3, "warmup_epochs": 0} | flags
    return train("clip", model, data, output, **flags)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_interrupted_run_goes_on_exactly(model, data, tmp_path, optimizer):
    flags = {"max_train_steps": 4, "optimizer": optimizer}
    whole = run(model, data, tmp_path / "whole", checkpointing_steps=2, **flags)
    part = run(model, data, tmp_path / "part", resume_from_checkpoint=str(whole / "checkpoint-2"), **flags)
    assert_same_weights(whole, part)
    assert rows(whole) == rows(part) and len(rows(whole)) == 4
    assert results(whole)["metrics"] == results(part)["metrics"]
    assert list(results(whole)["metrics"]) == ["base_accuracy", "new_accuracy", "val_accuracy", "harmonic_mean"]


def test_rates_are_constant_within_an_epoch_and_follow_the_cosine(model, data, tmp_path):
    flags = {"num_train_epochs": 4, "max_train_steps": None, "warmup_epochs": 1, "learning_rate": 0.1}
    folder = run(model, data, tmp_path, **flags)
    found = [row["lr"] for row in rows(folder)]  # two steps per epoch: two shots of three classes
    cosine = [0.1 * (1 + c) / 2 for c in (0.5**0.5, 0.0, -(0.5**0.5))]
    assert found == pytest.approx([rate for rate in (1e-5, *cosine) for _ in range(2)])


def test_evaluation_alone_gives_the_last_metric_and_zero_shot_is_plain_clip(model, data, tmp_path):
    trained = run(model, data, tmp_path / "trained", protocol="few_shot", learning_rate=0.5)
    alone = run(model, data, tmp_path / "alone", protocol="few_shot", eval_only=True, adapter=str(trained))
    assert results(alone)["metrics"] == results(trained)["metrics"]
    (last,) = rows(trained, "metrics.jsonl")
    assert last == {"step": 2, **results(trained)["metrics"]}

    zero_shot = run(model, data, tmp_path / "zero", eval_only=True, template="it is {}")
    assert results(zero_shot)["method"] is None
    from transformers import CLIPModel, CLIPProcessor

    clip, processor = CLIPModel.from_pretrained(model), CLIPProcessor.from_pretrained(model)
    items = read_data_set(data).test
    for name, first in (("base", 0), ("new", 3)):
        of_group = [(path, label - first) for path, label in items if first <= label < first + 3]
        names = [f"{color} {'wide' if first == 0 else 'tall'}" for color in COLORS]
        texts = processor.tokenizer([f"it is {name}" for name in names], padding=True, return_tensors="pt")
        batch = ClipPictures(processor.image_processor)([(item, None) for item in of_group])
        with torch.no_grad():
            chosen = clip(**texts, pixel_values=batch["pixel_values"]).logits_per_image.argmax(-1)
        expected = (chosen == batch["labels"]).float().mean().item()
        assert results(zero_shot)["metrics"][f"{name}_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_evaluated_again(model, data, tmp_path, method):
    folder = run(model, data, tmp_path / "out", method=method, learning_rate=0.1, max_train_steps=1)
    assert results(folder)["method"] == method and results(folder)["trained_parameters"] > 0
    alone = run(model, data, tmp_path / "alone", eval_only=True, adapter=str(folder))
    assert results(alone)["metrics"] == results(folder)["metrics"]
    if method == "classifier_only":
        assert set(weights(folder)) == {"classifier.weight"}
        zero_shot = run(model, data, tmp_path / "zero", eval_only=True)
        assert results(folder)["metrics"]["new_accuracy"] == results(zero_shot)["metrics"]["new_accuracy"]


@pytest.mark.parametrize("method", ["apt", "classifier_only"])
def test_the_code_in_the_card_runs(model, data, tmp_path, monkeypatch, capsys, method):
    folder = run(model, data, tmp_path / "out", max_train_steps=1, method=method)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    scope = {"picture": picture("red", 0)}
    capsys.readouterr()
    exec(code, scope)
    assert capsys.readouterr().out.strip() in [f"{color}_wide" for color in COLORS]
    trained = weights(folder)
    loaded = dict(scope["model"].named_parameters())
    if method == "classifier_only":
        assert torch.equal(loaded["classifier.weight"], trained["classifier.weight"])
    else:
        assert any(parameter.abs().max() > 0 for name, parameter in loaded.items() if name.endswith("low_rank_up"))


def test_several_seeds_give_means_and_spread_and_go_on(model, data, tmp_path, capsys):
    out = run(model, data, tmp_path / "out", seeds=[1, 2], max_train_steps=1)
    summary = results(out)
    each = {seed: results(out / f"seed-{seed}")["metrics"] for seed in (1, 2)}
    assert summary["seeds"] == {str(seed): metrics for seed, metrics in each.items()}
    for name in ("base_accuracy", "new_accuracy"):
        a, b = (metrics[name] for metrics in each.values())
        assert summary["metrics"][name] == pytest.approx((a + b) / 2)
        assert summary["spread"][name] == pytest.approx(abs(a - b) / 2**0.5)
    base, new = summary["metrics"]["base_accuracy"], summary["metrics"]["new_accuracy"]
    assert summary["metrics"]["harmonic_mean"] == pytest.approx(2 * base * new / max(base + new, 1e-9))
    assert "base_accuracy: " in capsys.readouterr().out
    single = run(model, data, tmp_path / "single", seeds=2, max_train_steps=1)
    assert_same_weights(single, out / "seed-2")
    alone = run(model, data, tmp_path / "alone", seeds=[1, 2], eval_only=True, adapter=str(out))
    assert results(alone)["metrics"] == summary["metrics"]
    run(model, data, out, seeds=[1, 2], max_train_steps=2, resume_from_checkpoint="latest")
    assert results(out / "seed-1")["step"] == results(out / "seed-2")["step"] == 2


def test_shots_differ_by_seed(data):
    first, second = (few_shot(read_data_set(data), 2, seed).train for seed in (1, 2))
    assert first != second


def test_errors_come_before_training(model, data, tmp_path):
    with pytest.raises(SystemExit):
        run(model, None, tmp_path / "a")
    with pytest.raises(ValueError, match=r"has no \{\} for the name"):
        run(model, data, tmp_path / "b", template="a photo")
    with pytest.raises(ValueError, match="has one twice"):
        run(model, data, tmp_path / "c", seeds=[1, 1])
    with pytest.raises(FileNotFoundError, match="no folder"):
        run(model, tmp_path / "nowhere", tmp_path / "d")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert' model: this script trains CLIP"):
        run(tmp_path / "other", data, tmp_path / "e")
    assert not (tmp_path / "e").exists()
