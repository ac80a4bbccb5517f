"""The CLIP trainer: exact resume, evaluation alone, both protocols, every method, several seeds, early errors."""

import json
import shutil

import pytest
import torch
from support.method_helpers import METHODS
from support.vl_helpers import COLORS, assert_same_weights, card_code, picture, results, rows, train, weights

from apt_diffusion.data.classification import few_shot, read_data_set
from apt_diffusion.data.crops import ClipPictures

pytestmark = pytest.mark.slow


@pytest.fixture
def model(tiny_clip):
    return tiny_clip["clip"]


@pytest.fixture
def data(classes_dir):
    return classes_dir


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


@pytest.mark.slow
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
    code = card_code(folder, model)
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


@pytest.mark.slow
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


def test_adapters_of_all_seeds_are_looked_for_before_the_first_is_evaluated(model, data, tmp_path, monkeypatch):
    import train_apt_clip

    run(model, data, tmp_path / "out" / "seed-1", seeds=1, max_train_steps=1)
    monkeypatch.setattr(train_apt_clip, "load", lambda *args: pytest.fail("too late"))
    with pytest.raises(FileNotFoundError, match="out"):
        run(model, data, tmp_path / "alone", seeds=[1, 2], eval_only=True, adapter=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="no checkpoint 'checkpoint-1'"):
        run(model, data, tmp_path / "out", seeds=[1, 2], resume_from_checkpoint="checkpoint-1")


# Other people's data


def renamed(data, folder, names):
    """A copy of the data with other class names."""
    shutil.copytree(data, folder)
    file = folder / "split_zhou_Colors.json"
    rows = json.loads(file.read_text())
    for items in rows.values():
        for item in items:
            item[2] = names.get(item[1], item[2])
    file.write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("protocol", ["base_to_new", "few_shot"])
def test_two_classes_of_the_same_name(model, data, tmp_path, protocol):
    """CoOp's ImageNet has such: both protocols run to their end."""
    twice = renamed(data, tmp_path / "twice", {3: "missile", 5: "missile"})
    folder = run(model, twice, tmp_path / "out", protocol=protocol, max_train_steps=1)
    again = run(model, twice, tmp_path / "again", protocol=protocol, eval_only=True, adapter=str(folder))
    assert results(again)["metrics"] == results(folder)["metrics"]


def test_new_classes_that_read_the_same_are_refused_before_training(model, data, tmp_path, monkeypatch):
    from apt_diffusion.training.session import Session

    monkeypatch.setattr(Session, "prepare", lambda *args, **kwargs: pytest.fail("too late"))
    long = renamed(data, tmp_path / "long", {3: "x" * 90 + "a", 5: "x" * 90 + "b"})
    with pytest.raises(ValueError, match="become the same class: only 77 tokens"):
        run(model, long, tmp_path / "out")


def test_an_evaluation_alone_needs_test_pictures_only(model, data, tmp_path):
    trained = run(model, data, tmp_path / "trained", max_train_steps=1)
    bare = shutil.copytree(data, tmp_path / "bare")
    shutil.rmtree(bare / "images" / "train")
    shutil.rmtree(bare / "images" / "val")
    alone = run(model, bare, tmp_path / "alone", eval_only=True, adapter=str(trained))
    expected = {name: value for name, value in results(trained)["metrics"].items() if name != "val_accuracy"}
    assert results(alone)["metrics"] == expected
    with pytest.raises(FileNotFoundError, match=r"24 of 36 pictures are missing"):
        run(model, bare, tmp_path / "x")


def test_another_size_of_pictures(model, data, tmp_path, monkeypatch, capsys):
    """Positions are interpolated, in training, in evaluation and in the card's code."""
    folder = run(model, data, tmp_path / "out", image_size=24, max_train_steps=2)
    assert rows(folder)[0]["loss"] != rows(run(model, data, tmp_path / "own", max_train_steps=2))[0]["loss"]
    again = run(model, data, tmp_path / "again", image_size=24, eval_only=True, adapter=str(folder))
    assert results(again)["metrics"] == results(folder)["metrics"]
    code = card_code(folder, model)
    monkeypatch.chdir(folder)
    scope = {"picture": picture("red", 0)}
    exec(code, scope)
    assert scope["pixels"].shape == (1, 3, 24, 24)
    with pytest.raises(ValueError, match="--image_size 20 must be a multiple of 8"):
        run(model, data, tmp_path / "x", image_size=20)


def test_several_templates(model, data, tmp_path, monkeypatch):
    templates = ["a photo of a {}.", "{} texture."]
    folder = run(model, data, tmp_path / "out", template=templates, max_train_steps=1)
    one = run(model, data, tmp_path / "one", template=templates[0], max_train_steps=1)
    assert rows(folder)[0]["loss"] != rows(one)[0]["loss"]
    code = card_code(folder, model)
    monkeypatch.chdir(folder)
    scope = {"picture": picture("red", 0)}
    exec(code, scope)
    assert scope["classifier"].template == templates
    with pytest.raises(ValueError, match=r"--template 'no place' has no \{\}"):
        run(model, data, tmp_path / "x", template=[templates[0], "no place"])


def test_a_warmup_longer_than_the_run_is_said(model, data, tmp_path, caplog):
    run(model, data, tmp_path, warmup_epochs=3, max_train_steps=2)
    assert "--warmup_epochs is 3, and the run has 1 epochs" in caplog.text
