"""Columns by what they hold: usual forms of texts and pictures are read, others refused by name, in every reader."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from support.vl_helpers import COLORS, picture

from apt_diffusion.data import nlvr2, vqa, vqa_answers
from apt_diffusion.data.classification import read_hub as read_classes
from apt_diffusion.data.columns import several_texts
from apt_diffusion.data.retrieval import read_hub, read_karpathy
from apt_diffusion.data.sources import read_source
from apt_diffusion.models.retrieval import recall

TEXT, IMAGE = datasets.Value("string"), datasets.Image()


def encoded(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pictures(count):
    """Of different colours."""
    return [picture(list(COLORS)[index % 3], index) for index in range(count)]


def write(folder, splits, **features):
    """`{split: {column: values}}` as a data set in parquet files."""
    folder.mkdir(parents=True)
    for split, columns in splits.items():
        typed = datasets.Features({name: features[name] for name in columns if name in features})
        table = datasets.Dataset.from_dict(columns, features=typed if len(typed) == len(columns) else None)
        table.to_parquet(folder / f"{split}.parquet")
    return str(folder)


# Texts

ANSWERS = {
    "a list of texts": (lambda texts: texts, datasets.List(TEXT)),
    "a list of dicts": (
        lambda texts: [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(texts)],
        datasets.List({"answer": TEXT, "answer_confidence": TEXT, "answer_id": datasets.Value("int64")}),
    ),
    "a dict of lists": (
        lambda texts: {"answer": texts, "answer_confidence": ["yes"] * len(texts), "answer_id": [1] * len(texts)},
        {
            "answer": datasets.List(TEXT),
            "answer_confidence": datasets.List(TEXT),
            "answer_id": datasets.List(datasets.Value("int64")),
        },
    ),
}  # fmt: skip


def vqa_columns(count=3, **more):
    return {"question_id": list(range(count)), "question": ["what color"] * count, "image": pictures(count)} | more


@pytest.mark.parametrize("form", ANSWERS)
def test_answers_in_every_usual_form(tmp_path, form):
    make, feature = ANSWERS[form]
    given = [["red"] * 7 + ["blue"] * 3, ["blue"] * 10, ["red", "yes"] * 5]
    folder = write(
        tmp_path / "hub", {"train": vqa_columns(answers=[make(texts) for texts in given])},
        question_id=datasets.Value("int64"), question=TEXT, image=IMAGE, answers=feature,
    )  # fmt: skip
    questions = vqa.load_hub_questions(folder, "train")
    assert [list(q.answers) for q in questions] == given
    assert [q.answer for q in questions] == ["red", "blue", "red"]
    examples = vqa_answers.training_examples(questions, ["red", "blue"])
    assert [dict(e.target) for e in examples] == [{0: 1.0, 1: 0.9}, {1: 1.0}, {0: 1.0}]


def test_answers_in_the_official_files_in_every_usual_form(vqa_dir, tmp_path):
    import shutil

    expected = [q.answers for q in vqa.load_questions(vqa_dir, "train")]
    folder = shutil.copytree(vqa_dir, tmp_path / "copy")
    file = folder / "v2_mscoco_train2014_annotations.json"
    content = json.loads(file.read_text())
    for form in ("dict of lists", "texts"):
        for entry, answers in zip(content["annotations"], expected, strict=True):
            entry["answers"] = list(answers) if form == "texts" else {"answer": list(answers), "answer_id": [0] * 10}
        file.write_text(json.dumps(content))
        assert [q.answers for q in vqa.load_questions(folder, "train")] == expected
    content["annotations"][5]["answers"] = 7
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"question 6: 'answers' holds int \(7\), and should hold a text, a list of"):
        vqa.load_questions(folder, "train")
    del content["annotations"][5]["question_id"]
    file.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"annotations 5: a dict with the keys .*, and should be a dict with \['quest"
    ):
        vqa.load_questions(folder, "train")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answers": [{"text": ["red"]}] * 3}, r"row 0: 'answers' holds a dict with the keys \['text'\]"),
        ({"answers": [[1, 2]] * 3}, r"row 0: 'answers' holds a list of 2, first int \(1\), and should hold"),
        ({"answers": [["red"]] * 3, "question": [["a", "b"]] * 3}, r"row 0: 'question' holds a list of 2, first str"),
        ({"answers": [["red"]] * 3, "image": ["a.jpg"] * 3}, r"The column 'image' of .* should hold pictures"),
        ({"answers": [["red"]] * 3, "multiple_choice_answer": [4] * 3}, r"'multiple_choice_answer' holds int \(4\)"),
    ],
)
def test_other_forms_are_refused_by_name(tmp_path, columns, message):
    folder = write(tmp_path / "hub", {"train": vqa_columns() | columns})
    with pytest.raises(ValueError, match=message):
        vqa.load_hub_questions(folder, "train")


CAPTIONS = {
    "a text": (lambda texts: texts[0], TEXT),
    "a list of texts": (lambda texts: texts, datasets.List(TEXT)),
    "a list of dicts": (
        lambda texts: [{"raw": t, "sentid": n} for n, t in enumerate(texts)],
        datasets.List({"raw": TEXT, "sentid": datasets.Value("int64")}),
    ),
    "a dict of lists": (
        lambda texts: {"sentid": [0] * len(texts), "raw": texts},
        {"sentid": datasets.List(datasets.Value("int64")), "raw": datasets.List(TEXT)},
    ),
}


@pytest.mark.parametrize("form", CAPTIONS)
def test_captions_in_every_usual_form(tmp_path, form):
    make, feature = CAPTIONS[form]
    texts = [[f"picture {index} a", f"picture {index} b"] for index in range(3)]
    folder = write(
        tmp_path / "hub", {"test": {"image": pictures(3), "caption": [make(own) for own in texts]}},
        image=IMAGE, caption=feature,
    )  # fmt: skip
    split = read_hub(folder, ("test",))
    assert split.captions == [t for own in texts for t in (own[:1] if form == "a text" else own)]


def test_captions_of_another_kind_are_refused_by_name(tmp_path):
    folder = write(
        tmp_path / "hub", {"test": {"image": pictures(2), "caption": [{"de": "ein Bild"}] * 2}},
        image=IMAGE, caption={"de": TEXT},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"'caption' of .*, row 0, holds a dict with the keys \['de'\].*key 'raw'"):
        read_hub(folder, ("test",))
    assert several_texts("one", ("raw",), "here") == several_texts({"raw": "one"}, ("raw",), "here") == ["one"]


def test_statements_of_another_kind_are_refused_by_name(tmp_path):
    good = {
        "sentence": ["a", "b"], "label": ["True", "False"], "left_image": pictures(2), "right_image": pictures(2),
    }  # fmt: skip
    types = {"left_image": IMAGE, "right_image": IMAGE, "sentence": TEXT, "label": TEXT}
    folder = write(tmp_path / "good", {"train": good}, **types)
    assert [s.label for s in nlvr2.load_hub_statements(folder, "train")] == [True, False]
    for number, (columns, message) in enumerate(
        [
            ({"label": ["True", "-1"]}, r"split 'train', row 1: the label '-1' is neither true nor false"),
            ({"sentence": [["a"], ["b"]]}, r"row 0: 'sentence' holds a list of 1, first str"),
            ({"right_image": ["x.png", "y.png"]}, r"The column 'right_image' of .* should hold pictures"),
        ]
    ):
        changed = {name: value for name, value in types.items() if name not in columns}
        folder = write(tmp_path / str(number), {"train": good | columns}, **changed)
        with pytest.raises(ValueError, match=message):
            nlvr2.load_hub_statements(folder, "train")


# Pictures


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_encoded_pictures_are_pictures(tmp_path, form):
    images = pictures(3)
    values = [encoded(image) if form == "bytes" else {"bytes": encoded(image), "path": None} for image in images]
    feature = datasets.Value("binary") if form == "bytes" else {"bytes": datasets.Value("binary"), "path": TEXT}
    folder = write(
        tmp_path / "hub", {"train": vqa_columns(answers=[["red"]] * 3) | {"image": values}}, image=feature,
        question_id=datasets.Value("int64"), question=TEXT, answers=datasets.List(TEXT),
    )  # fmt: skip
    questions = vqa.load_hub_questions(folder, "train")
    assert all(np.array_equal(read_source(q.picture), i) for q, i in zip(questions, images, strict=True))
    captions = {"image": values, "caption": ["a", "b", "c"]}
    split = read_hub(write(tmp_path / "captions", {"test": captions}, image=feature, caption=TEXT), ("test",))
    assert np.array_equal(read_source(split.images[2]), images[2])
    labels = datasets.ClassLabel(names=["a", "b"])
    classes = {split: {"image": values, "label": [0, 1, 0]} for split in ("train", "test")}
    data = read_classes(write(tmp_path / "classes", classes, image=feature, label=labels))
    assert np.array_equal(read_source(data.train[1][0]), images[1])


def test_rows_of_one_caption_each_are_pictures_with_several(tmp_path):
    """What a picture is, its content says, not its row: a perfect model then has a recall of 1."""
    count, each = 4, 5
    images = [image for image in pictures(count) for _ in range(each)]
    texts = [f"picture {row // each} caption {row % each}" for row in range(count * each)]
    order = np.random.default_rng(0).permutation(count * each)
    rows = {"image": [images[i] for i in order], "caption": [texts[i] for i in order]}
    split = read_hub(write(tmp_path / "rows", {"test": rows}, image=IMAGE, caption=TEXT), ("test",))
    assert len(split.images) == count and len(split.captions) == count * each
    for index, image in enumerate(split.images):
        own = {text.split()[1] for text in split.captions_of(index)}
        assert len(own) == 1 and len(split.captions_of(index)) == each
        assert np.array_equal(read_source(image), pictures(count)[int(own.pop())])
    told_apart = torch.zeros(count, count * each)
    told_apart[split.image_of, torch.arange(count * each)] = 1
    found = recall(told_apart, split.image_of)
    assert found["text_recall@1"] == found["image_recall@1"] == 1


def test_karpathys_rows_of_one_file_are_one_picture(tmp_path):
    picture("red", 0).save(tmp_path / "a.jpg")
    picture("blue", 1).save(tmp_path / "b.jpg")
    rows = [
        {"filename": name, "split": "test", "sentences": [{"raw": text}]}
        for name, text in (("a.jpg", "one"), ("b.jpg", "two"), ("a.jpg", "three"))
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": rows}))
    split = read_karpathy(tmp_path / "dataset_coco.json", tmp_path, ("test",))
    assert split.images == [tmp_path / "a.jpg", tmp_path / "b.jpg"] and split.captions_of(0) == ["one", "three"]


# Answers that are filtered


def answered(number, *answers):
    return vqa.Question(number, "?", None, answers, answers[0])


def test_both_sides_are_normalised(caplog):
    caplog.set_level("INFO")
    questions = [answered(0, *["Yes"] * 9, "yes"), answered(1, *["No."] * 10), answered(2, *["Two"] * 10)]
    vocabulary = vqa_answers.make_vocabulary(questions, 1)
    assert vocabulary == ["yes", "no", "2"]
    examples = vqa_answers.training_examples(questions, vocabulary)
    assert [dict(e.target) for e in examples] == [{0: 1.0}, {1: 1.0}, {2: 1.0}]
    assert "3 of 3 questions to train on have an answer in the vocabulary" in caplog.text
    assert vqa_answers.vqa_accuracy(questions, vocabulary)["accuracy"] == 1
    assert vqa_answers.vqa_accuracy(questions, ["no", "yes", "3"])["accuracy"] == 0
    # As they are written where that is in the vocabulary: the official training code.
    assert vqa_answers.soft_targets(answered(3, *["2"] * 3, *["two"] * 7), {"2": 0}) == ((0, 0.9),)


def test_data_that_the_vocabulary_does_not_answer_are_refused():
    questions = [answered(0, *["rot"] * 10), answered(1, *["blau"] * 10)]
    message = (
        r"None of the 2 questions to {} has an answer among the 2 of the vocabulary \('red', 'blue', \.\.\.\).*'rot'"
    )
    with pytest.raises(ValueError, match=message.format("train on")):
        vqa_answers.training_examples(questions, ["red", "blue"])
    with pytest.raises(ValueError, match=message.format("evaluate on")):
        vqa_answers.check_answerable(questions, ["red", "blue"])
    with pytest.raises(ValueError, match="--min_answer_count is too high"):
        vqa_answers.make_vocabulary(questions, 2)
