"""The retrieval trainer: exact resume, evaluation alone, every method, the official code's behaviours, errors."""

import json

import pytest
import torch
from safetensors.torch import save_file
from support.method_helpers import METHODS
from support.vl_helpers import (
    assert_same_weights,
    card_code,
    make_retrieval_folder,
    picture,
    results,
    rows,
    train,
    weights,
)

pytestmark = pytest.mark.slow

METRICS = [f"{way}_recall@{k}" for way in ("text", "image") for k in (1, 5, 10)]


@pytest.fixture
def data(retrieval_dir):
    return retrieval_dir


@pytest.fixture
def models(tiny_vl):
    return tiny_vl


@pytest.fixture(params=["vilt", "meter"])
def model(request, models):
    return models[request.param]


def run(model, data, output, **flags):
    return train("retrieval", model, data, output, **({"num_false_captions": 3} | flags))


def test_an_interrupted_run_goes_on_exactly(model, data, tmp_path):
    whole = run(model, data, tmp_path / "whole", max_train_steps=4, checkpointing_steps=2)
    part = run(model, data, tmp_path / "part", max_train_steps=4, resume_from_checkpoint=str(whole / "checkpoint-2"))
    assert_same_weights(whole, part)
    assert rows(whole) == rows(part) and len(rows(whole)) == 4
    assert results(whole)["metrics"] == results(part)["metrics"]
    assert list(results(whole)["metrics"]) == METRICS


def test_evaluation_alone_gives_the_last_metric(model, data, tmp_path):
    trained = run(model, data, tmp_path / "trained", max_train_steps=3)
    alone = run(model, data, tmp_path / "alone", eval_only=True, adapter=str(trained))
    assert results(alone)["metrics"] == results(trained)["metrics"]
    assert results(alone)["method"] == "apt"
    (last,) = rows(trained, "metrics.jsonl")  # measured once: scoring all pairs is dear
    assert last == {"step": 3, **results(trained)["metrics"]}
    base = run(model, data, tmp_path / "base", eval_only=True)
    assert results(base)["method"] is None and set(results(base)["metrics"]) == set(METRICS)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(models, data, tmp_path, method):
    kind = "meter" if METHODS.index(method) % 2 else "vilt"
    folder = run(models[kind], data, tmp_path, method=method, max_train_steps=1)
    assert results(folder)["method"] == method and results(folder)["trained_parameters"] > 0
    assert any("rank_output" in name for name in weights(folder))
    assert "# " in (folder / "README.md").read_text() and (folder / "loss.png").is_file()


def test_the_code_in_the_card_runs(model, data, tmp_path, monkeypatch, capsys):
    folder = run(model, data, tmp_path, max_train_steps=1)
    code = card_code(folder, model)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(code, {"picture": picture("red", 0)})
    assert "tensor([[" in capsys.readouterr().out


def test_more_evaluations_and_fewer_pictures(models, data, tmp_path):
    folder = run(models["vilt"], data, tmp_path, max_train_steps=2, evaluation_steps=1, max_evaluation_images=3)
    assert [row["step"] for row in rows(folder, "metrics.jsonl")] == [1, 2]
    assert results(folder)["metrics"]["image_recall@5"] == 1  # among three


def test_several_splits_are_told_apart(models, tmp_path):
    data = make_retrieval_folder(tmp_path / "data")
    file = data / "dataset_flickr30k.json"
    content = json.loads(file.read_text())
    for image in content["images"][-2:]:
        image["split"] = "val"
    file.write_text(json.dumps(content))
    both = run(models["vilt"], data, tmp_path / "both", eval_only=True, evaluation_splits=["val", "test"])
    for split in ("val", "test"):
        one = run(models["vilt"], data, tmp_path / split, eval_only=True, evaluation_splits=split)
        for metric, value in results(one)["metrics"].items():
            assert results(both)["metrics"][f"{split}_{metric}"] == value


def test_kept_encoder_outputs_give_the_same(models, data, tmp_path):
    flags = {"max_train_steps": 3, "hidden_dropout_prob": 0.0, "augment": None}
    cached = run(models["meter"], data, tmp_path / "a", cache_encoder_outputs=str(tmp_path / "cache"), **flags)
    plain = run(models["meter"], data, tmp_path / "b", **(flags | {"no-augment": True}))
    for a, b in zip(rows(cached), rows(plain), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert results(cached)["metrics"] == pytest.approx(results(plain)["metrics"])
    base = run(models["meter"], data, tmp_path / "c", cache_encoder_outputs=str(tmp_path / "cache"), eval_only=True)
    again = run(models["meter"], data, tmp_path / "d", eval_only=True)
    assert results(base)["metrics"] == pytest.approx(results(again)["metrics"])


def losses(folder):
    return [row["loss"] for row in rows(folder)]


@pytest.mark.slow
def test_official_behaviours_change_what_they_say(models, data, tmp_path):
    folders = iter(tmp_path / str(index) for index in range(20))
    flags = {"max_train_steps": 1, "num_false_captions": 12}  # of 14 that are false: drawn at random, true ones join
    plain = run(models["vilt"], data, next(folders), **flags)
    assert losses(run(models["vilt"], data, next(folders), official_false_captions=True, **flags)) != losses(plain)
    prefixed = run(models["vilt"], data, next(folders), official_prefix=True, **flags)
    assert losses(prefixed) != losses(plain)
    alone = run(models["vilt"], data, next(folders), eval_only=True, adapter=str(prefixed), official_prefix=True)
    assert results(alone)["metrics"] == results(prefixed)["metrics"]  # where every caption has it
    free = run(models["meter"], data, next(folders), max_train_steps=2)
    frozen = run(models["meter"], data, next(folders), max_train_steps=2, freeze_scale=True)
    scales = [name for name in weights(free) if name.endswith("log_scale")]
    assert any(weights(free)[name].any() for name in scales) and not any(
        weights(frozen)[name].any() for name in scales
    )


@pytest.fixture
def with_head(models, tmp_path):
    """METER with the matching head that a conversion leaves beside it."""
    import shutil

    folder = shutil.copytree(models["meter"], tmp_path / "with-head")
    torch.manual_seed(1)
    save_file({"weight": torch.randn(2, 64), "bias": torch.randn(2)}, folder / "matching_head.safetensors")
    return folder


def test_the_matching_loss_of_meter(with_head, models, data, tmp_path):
    found = {}
    for name, flags in {
        "none": {}, "half": {"matching_loss_weight": 0.5}, "official": {"official_matching_loss": True},
    }.items():  # fmt: skip
        found[name] = losses(run(with_head, data, tmp_path / name, max_train_steps=1, **flags))[0]
    assert found["half"] - found["none"] == pytest.approx((found["official"] - found["none"]) / 2, rel=1e-4)
    assert found["official"] > found["none"] + 0.1
    with pytest.raises(ValueError, match=r"needs matching_head\.safetensors beside"):
        run(models["meter"], data, tmp_path / "x", official_matching_loss=True)


def test_ranking_starts_as_matching(with_head, data, tmp_path):
    from safetensors.torch import load_file

    folder = run(with_head, data, tmp_path / "out", max_train_steps=1, learning_rate=1e-12)
    head = load_file(with_head / "matching_head.safetensors")
    torch.testing.assert_close(weights(folder)["rank_output.weight"], head["weight"][1:])
    torch.testing.assert_close(weights(folder)["rank_output.bias"], head["bias"][1:])
    save_file({"weight": torch.zeros(3, 64)}, with_head / "matching_head.safetensors")
    with pytest.raises(ValueError, match="is no matching head"):
        run(with_head, data, tmp_path / "y")


def test_errors_come_before_training(models, data, tmp_path):
    missing = make_retrieval_folder(tmp_path / "missing")
    (missing / "flickr30k-images" / "test1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 4 pictures are missing: .*test1\.jpg"):
        run(models["vilt"], missing, tmp_path / "a")
    with pytest.raises(ValueError, match="15 false captions"):
        run(models["vilt"], data, tmp_path / "b", num_false_captions=15)
    with pytest.raises(SystemExit):
        run(models["vilt"], None, tmp_path / "c")
    with pytest.raises(ValueError, match=r"none of the splits \['val'\]"):
        run(models["vilt"], data, tmp_path / "d", evaluation_splits="val")
