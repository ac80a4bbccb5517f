"""What data and flags imply for a run of a vision-language task is said, or refused, before the first step."""

import json
import shutil

import datasets
import pytest
from PIL import Image
from support.vl_helpers import results, train

SMALL = {"min_answer_count": 3, "max_train_steps": 1}


@pytest.fixture
def too_late(monkeypatch):
    """Fails when a model is loaded."""
    import train_apt_vqa

    monkeypatch.setattr(train_apt_vqa, "load_model", lambda *args, **kwargs: pytest.fail("too late"))


def capitals(vqa_dir, folder):
    """The same questions, answered with capitals and full stops."""
    shutil.copytree(vqa_dir, folder)
    for file in folder.glob("*annotations.json"):
        content = json.loads(file.read_text())
        for entry in content["annotations"]:
            entry["multiple_choice_answer"] = entry["multiple_choice_answer"].capitalize() + "."
            entry["answers"] = [{"answer": f"{a['answer'].capitalize()}."} for a in entry["answers"]]
        file.write_text(json.dumps(content))
    return folder


def test_answers_with_capitals_are_all_used(tiny_vl, vqa_dir, tmp_path, caplog):
    plain = train("vqa", tiny_vl["vilt"], vqa_dir, tmp_path / "plain", **SMALL)
    before = [r.getMessage() for r in caplog.records if "in the vocabulary" in r.getMessage()]
    assert before[:2] == [
        "11 of 12 questions to train on have an answer in the vocabulary.",
        "5 of 6 questions to evaluate on have an answer in the vocabulary.",
    ]
    folder = capitals(vqa_dir, tmp_path / "capitals")
    out = train("vqa", tiny_vl["vilt"], folder, tmp_path / "out", **SMALL)
    assert results(out)["metrics"] == results(plain)["metrics"]
    assert json.loads((out / "answers.json").read_text()) == json.loads((plain / "answers.json").read_text())


@pytest.fixture
def tuned(tiny_vl, tmp_path):
    """A model that was tuned for answers that nobody gives here."""
    from transformers import AutoTokenizer, ViltForQuestionAnswering

    from apt_diffusion.data.processors import load_processor

    names = {"id2label": {0: "yes", 1: "no"}, "label2id": {"yes": 0, "no": 1}}
    model = ViltForQuestionAnswering.from_pretrained(tiny_vl["vilt"], num_labels=2, **names)
    model.save_pretrained(tmp_path / "tuned")
    load_processor("vilt", tiny_vl["vilt"]).save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(tiny_vl["vilt"]).save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_answers_that_a_tuned_base_does_not_know(tuned, vqa_dir, tmp_path):
    import train_apt_vqa

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_apt_vqa, "load_model", lambda *args, **kwargs: pytest.fail("too late"))
        with pytest.raises(ValueError, match=r"None of the 12 questions to train on .*'yes', 'no'.*--new_vocabulary"):
            train("vqa", tuned, vqa_dir, tmp_path / "out", **SMALL)
        with pytest.raises(ValueError, match="None of the 6 questions to evaluate on"):
            train("vqa", tuned, vqa_dir, tmp_path / "out", eval_only=True)
    assert not (tmp_path / "out").exists()
    out = train("vqa", tuned, vqa_dir, tmp_path / "new", new_vocabulary=True, **SMALL)
    assert json.loads((out / "answers.json").read_text()) == ["red", "green", "blue"]
    again = train("vqa", tuned, vqa_dir, tmp_path / "again", eval_only=True, adapter=out)
    assert results(again)["metrics"] == results(out)["metrics"]
    with pytest.raises(SystemExit):
        train("vqa", tuned, vqa_dir, tmp_path / "x", new_vocabulary=True, adapter=out)


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("meter", {"image_size": 20}, "--image_size 20 must be a multiple of 8"),
        ("vilt", {"image_size": 8}, "--image_size 8 must be at least 16"),
    ],
)
def test_image_sizes_that_the_model_cannot_read(too_late, tiny_vl, vqa_dir, tmp_path, kind, flags, message):
    with pytest.raises(ValueError, match=message):
        train("vqa", tiny_vl[kind], vqa_dir, tmp_path / "out", **SMALL, **flags)


def test_texts_that_are_cut_and_a_long_warmup_are_said(tiny_vl, vqa_dir, tmp_path, caplog):
    flags = SMALL | {"max_text_length": 10, "lr_warmup_steps": 5, "max_train_steps": 1}
    train("vqa", tiny_vl["vilt"], vqa_dir, tmp_path / "out", **flags)
    assert "2 of 2 texts are longer than the 10 tokens that the model reads" in caplog.text  # two different questions
    assert "'what color 0' loses" in caplog.text
    assert "--lr_warmup_steps is 5, and the run has 1 steps: its learning rate never reaches" in caplog.text
    caplog.clear()
    train("vqa", tiny_vl["vilt"], vqa_dir, tmp_path / "more", **(SMALL | {"max_text_length": 1000}))
    assert "--max_text_length 1000 is 40: the model has no more" in caplog.text


def test_a_multiplier_without_effect_is_said(tiny_vl, vqa_dir, retrieval_dir, tmp_path, caplog):
    """ViLT has no cross-modal layers, retrieval has no classifier."""
    train("vqa", tiny_vl["vilt"], vqa_dir, tmp_path / "a", cross_modal_lr_multiplier=5, **SMALL)
    assert "--cross_modal_lr_multiplier 5: without effect" in caplog.text
    flags = {"max_train_steps": 1, "num_false_captions": 3, "max_evaluation_images": 2}
    caplog.clear()
    train("retrieval", tiny_vl["meter"], retrieval_dir, tmp_path / "b", head_lr_multiplier=7, **flags)
    assert "--head_lr_multiplier 7: without effect" in caplog.text
    caplog.clear()
    train("retrieval", tiny_vl["meter"], retrieval_dir, tmp_path / "c", **flags)
    assert "without effect, because nothing" not in caplog.text


def spoil(folder, how):
    """Spoils one picture of the training data, so that it is there but cannot be used."""
    file = folder / "train2014" / "COCO_train2014_000000000003.jpg"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:300])
    else:
        Image.new("RGB", {"long": (3, 40), "very long": (1, 400)}[how]).save(file)
    return file


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"The picture .*000003\.jpg cannot be read: .*[Tt]runcated"),
        ("long", r"The picture .*000003\.jpg of 3 x 40 pixels cannot be brought to the model's size"),
        ("very long", r"The picture .*000003\.jpg cannot be read: it has 1 x 400 pixels, a long side of more than 50"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named(tiny_vl, vqa_dir, tmp_path, how, message):
    folder = shutil.copytree(vqa_dir, tmp_path / "data")
    spoil(folder, how)
    flags = SMALL | {"max_train_steps": 10, "no-augment": True}
    with pytest.raises(ValueError, match=message):
        train("vqa", tiny_vl["vilt"], folder, tmp_path / "out", **flags)


def test_a_spoilt_picture_of_the_hub_is_named_by_its_row(tmp_path):
    from apt_diffusion.data.sources import HubPicture, read_source

    folder = tmp_path / "hub"
    folder.mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    content = [{"bytes": whole, "path": None}, {"bytes": whole[:300], "path": None}]
    datasets.Dataset.from_dict({"image": content}).cast_column("image", datasets.Image()).to_parquet(
        folder / "x.parquet"
    )
    rows = datasets.load_dataset(str(folder))["train"]
    assert read_source(HubPicture(rows, 0)).size == (40, 40)
    with pytest.raises(ValueError, match="The picture in row 1, 'image', cannot be read"):
        read_source(HubPicture(rows, 1))
