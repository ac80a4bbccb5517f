"""VQAv2: normalisation, vocabulary, soft scores and accuracy by brute force, files of both kinds, and clear errors."""

import itertools
import json
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from support.vl_helpers import results, rows, train

from apt_diffusion import load_apt_weights
from apt_diffusion.data import vqa, vqa_answers
from apt_diffusion.data.processors import load_processor
from apt_diffusion.data.sources import read_source
from apt_diffusion.data.vqa import Question

# Answers


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Red car.", "red car"),
        ("two", "2"),
        ("Ten dogs", "10 dogs"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("they couldnt've", "they couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("'ows'at", "'ow's'at"),
        ("it's", "it's"),
        ("shed", "shed"),
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("yes, it is!", "yes it is"),
        ("really?", "really"),
        ("3.5", "3.5"),
        ("u.s.", "us"),
        (".5", ".5"),
        ("an apple a day", "apple day"),
        ("a", ""),
        ("  many   spaces\tand tabs ", "many spaces and tabs"),
        ("100%", "100%"),
        ("5:30", "5:30"),
    ],
)
def test_normalisation(answer, normal):
    assert vqa_answers.normalize_answer(answer) == normal


def test_the_table_of_contractions_has_the_official_number_of_entries_that_can_ever_match():
    """Without its upper case entries, which are looked up after lowering, and without those that change nothing."""
    assert len(vqa_answers.MENDED) == 114
    assert all(len(wrong) + 1 == len(right) for wrong, right in vqa_answers.MENDED.items() if wrong != "somebody'd")


def question(answers, number=1, kind=None):
    return Question(number, "?", None, tuple(answers), Counter(answers).most_common(1)[0][0], kind)


def official_accuracy(answers, guess) -> float:
    """The evaluation tool: the mean, over the people, of min(1, others who gave it / 3)."""
    shares = []
    for place in range(len(answers)):
        others = answers[:place] + answers[place + 1 :]
        shares.append(min(1.0, sum(other == guess for other in others) / 3))
    return sum(shares) / len(shares)


def test_soft_scores_are_the_official_accuracy():
    for count in range(11):
        answers = ["red"] * count + [f"other {n}" for n in range(10 - count)]
        expected = official_accuracy(answers, "red")
        assert vqa_answers.soft_scores(answers).get("red", 0.0) == pytest.approx(expected, abs=1e-12)


def test_the_vocabulary_by_brute_force():
    generator = random.Random(0)
    raw = ["Red", "red.", "the red", "blue", "two", "2", "rare", "none", "0", "green/blue", "green blue"]
    questions = [question([generator.choice(raw)] * 10, n) for n in range(150)]
    normal = [vqa_answers.normalize_answer(q.answer) for q in questions]
    expected = []
    for answer in normal:  # the order of the released models: first come, first
        if answer not in expected and sum(other == answer for other in normal) >= 9:
            expected.append(answer)
    assert vqa_answers.make_vocabulary(questions) == expected and len(expected) >= 4
    with pytest.raises(ValueError, match="at least 500 questions"):
        vqa_answers.make_vocabulary(questions, 500)


def test_targets_leave_out_what_the_vocabulary_does_not_have():
    vocabulary = ["red", "blue", "2"]
    questions = [
        question(["red"] * 7 + ["blue"] * 2 + ["Blue"]),
        question([f"odd {n}" for n in range(10)]),
        question(["2"] * 3 + ["two"] * 7),
    ]
    examples = vqa_answers.training_examples(questions, vocabulary)
    assert [dict(e.target) for e in examples] == [{0: 1.0, 1: 0.9}, {2: 0.9}]  # "Blue" is blue, "two" stays apart
    labels = vqa_answers.SoftLabels(3)([e.target for e in examples])
    assert torch.equal(labels, torch.tensor([[1, 0.9, 0], [0, 0, 0.9]]))


def test_accuracy_counts_every_question():
    generator = random.Random(1)
    words = ["red", "blue", "yes", "no", "3"]
    questions = [
        question(generator.choices(words, k=10), n, generator.choice(["yes/no", "number", "other"])) for n in range(60)
    ]
    guesses = [generator.choice([*words, "unheard of"]) for _ in questions]
    scores = [official_accuracy(list(q.answers), g) for q, g in zip(questions, guesses, strict=True)]
    found = vqa_answers.vqa_accuracy(questions, guesses)
    assert found["accuracy"] == pytest.approx(np.mean(scores))
    for kind in ("yes/no", "number", "other"):
        own = [score for score, q in zip(scores, questions, strict=True) if q.kind == kind]
        assert found[f"accuracy_{kind}"] == pytest.approx(np.mean(own))


# Files


def test_reading_the_official_files(vqa_dir):
    questions = vqa.load_questions(vqa_dir, "train")
    assert len(questions) == 12 and questions[1].picture.name == "COCO_train2014_000000000001.jpg"
    assert questions[3].answers == ("red",) * 7 + ("yellow",) * 3 and questions[3].answer == "red"
    assert [q.kind for q in questions[:2]] == ["other", "number"]
    unknown = vqa.load_questions(vqa_dir, "test-dev")
    assert [q.answers for q in unknown] == [()] * 3 and unknown[0].picture.parent.name == "test2015"


def break_folder(vqa_dir, tmp_path, how):
    folder = tmp_path / "broken"
    shutil.copytree(vqa_dir, folder)
    annotations = folder / "v2_mscoco_train2014_annotations.json"
    if how == "pictures":
        for number in (1, 2, 4, 7):
            (folder / "train2014" / f"COCO_train2014_{number:012d}.jpg").unlink()
    elif how == "annotations":
        content = json.loads(annotations.read_text())
        annotations.write_text(json.dumps({"annotations": content["annotations"][:10]}))
    elif how == "json":
        annotations.write_text('{"annotations": [')
    elif how == "list":
        annotations.write_text('{"images": []}')
    else:
        annotations.unlink()
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("pictures", r"4 of 12 pictures are missing: .*0001\.jpg, .*0002\.jpg, .*0004\.jpg, \.\.\..*train2014\.zip"),
        ("annotations", r"2 of 12 questions have no annotation in .*train2014_annotations\.json: 11, 12\."),
        ("json", r"annotations\.json is not JSON .*the answers of VQAv2's train split"),
        ("list", r"annotations\.json has no list 'annotations'"),
        ("no file", r"There is no file .*v2_mscoco_train2014_annotations\.json"),
    ],
)
def test_errors_come_before_a_model_is_loaded(vqa_dir, tiny_vl, tmp_path, how, message, monkeypatch):
    import train_apt_vqa

    monkeypatch.setattr(train_apt_vqa, "load_model", lambda *args, **kwargs: pytest.fail("too late"))
    folder = break_folder(vqa_dir, tmp_path, how)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train("vqa", tiny_vl["vilt"], folder, tmp_path / "out")


def write_hub_folder(vqa_dir, folder):
    """As a data set of the hub: parquet files with the pictures inside."""
    import datasets

    folder.mkdir()
    for split, name in (("train", "train"), ("val", "validation")):
        questions = vqa.load_questions(vqa_dir, split)
        columns = {
            "question_id": [q.question_id for q in questions],
            "question": [q.text for q in questions],
            "answers": [[{"answer": a, "answer_id": n} for n, a in enumerate(q.answers)] for q in questions],
            "multiple_choice_answer": [q.answer for q in questions],
            "answer_type": [q.kind for q in questions],
            "image": [{"bytes": q.picture.read_bytes(), "path": None} for q in questions],
        }
        table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        table.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


def test_a_data_set_of_the_hub_is_the_same_data_set(vqa_dir, tiny_vl, tmp_path):
    folder = write_hub_folder(vqa_dir, tmp_path / "hub")
    for split in ("train", "val"):
        ours, theirs = vqa.load_questions(vqa_dir, split), vqa.load_hub_questions(str(folder), split)
        for a, b in zip(ours, theirs, strict=True):
            assert (a.question_id, a.text, a.answers, a.answer, a.kind) == (
                b.question_id, b.text, b.answers, b.answer, b.kind,
            )  # fmt: skip
            assert np.array_equal(read_source(a.picture), read_source(b.picture))
    with pytest.raises(ValueError, match=r"no split 'test-dev': its splits are \['train', 'validation'\]"):
        vqa.load_hub_questions(str(folder), "test-dev")
    flags = {"min_answer_count": 3, "max_train_steps": 1}
    files = train("vqa", tiny_vl["vilt"], vqa_dir, tmp_path / "files", **flags)
    hub = train("vqa", tiny_vl["vilt"], None, tmp_path / "table", dataset_name=folder, **flags)
    assert rows(files) == rows(hub) and results(files)["metrics"] == results(hub)["metrics"]


# The trained model


@pytest.mark.parametrize("kind", ["vilt", "meter"])
def test_evaluation_and_submission_by_brute_force(vqa_dir, tiny_vl, tmp_path, kind):
    """One question at a time, through the model's own processor, scored as the official tool scores."""
    out = train(
        "vqa", tiny_vl[kind], vqa_dir, tmp_path, min_answer_count=3, predict_splits=["test-dev"], num_prompts=3
    )
    answers = json.loads((out / "answers.json").read_text())
    assert answers == vqa_answers.make_vocabulary(
        vqa.load_questions(vqa_dir, "train") + vqa.load_questions(vqa_dir, "val"), 3
    )
    import train_apt_vqa

    model = train_apt_vqa.MODELS[kind].from_pretrained(
        tiny_vl[kind], num_labels=len(answers), ignore_mismatched_sizes=True
    )
    load_apt_weights(model.eval(), out)
    processor = load_processor(kind, tiny_vl[kind])

    @torch.no_grad()
    def ask(q):
        inputs = processor(Image.open(q.picture), q.text, return_tensors="pt")
        return answers[int(model(**inputs).logits[0].argmax())]

    scores = [official_accuracy(list(q.answers), ask(q)) for q in vqa.load_questions(vqa_dir, "val")]
    assert results(out)["metrics"]["accuracy"] == pytest.approx(np.mean(scores))
    submitted = json.loads((out / "vqa_OpenEnded_mscoco_test-dev2015_apt_results.json").read_text())
    expected = [{"question_id": q.question_id, "answer": ask(q)} for q in vqa.load_questions(vqa_dir, "test-dev")]
    assert submitted == expected


def test_a_model_that_was_tuned_for_the_task_keeps_its_own_answers(vqa_dir, tiny_vl, tmp_path):
    from transformers import AutoTokenizer, ViltForQuestionAnswering

    answers = ["blue", "red", "green"]
    torch.manual_seed(0)
    model = ViltForQuestionAnswering.from_pretrained(
        tiny_vl["vilt"],
        num_labels=3,
        id2label=dict(enumerate(answers)),
        label2id={a: i for i, a in enumerate(answers)},
    )
    model.save_pretrained(tmp_path / "tuned")
    load_processor("vilt", tiny_vl["vilt"]).save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(tiny_vl["vilt"]).save_pretrained(tmp_path / "tuned")
    out = train("vqa", tmp_path / "tuned", vqa_dir, tmp_path / "out", eval_only=True)
    assert json.loads((out / "answers.json").read_text()) == answers and results(out)["method"] is None
    with pytest.raises(ValueError, match="not tuned to answer questions: --eval_only needs --adapter"):
        train("vqa", tiny_vl["vilt"], vqa_dir, tmp_path / "other", eval_only=True)


def test_the_loss_is_the_sum_over_answers_and_the_mean_over_questions():
    import train_apt_vqa

    class Model(torch.nn.Module):
        def forward(self, x):
            return type("Output", (), {"logits": x})

    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    scores = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)).double()
    found = train_apt_vqa.loss(Model(), {"x": logits, "labels": scores})
    expected = 0.0
    for row, column in itertools.product(range(3), range(5)):
        p = 1 / (1 + np.exp(-logits[row, column].item()))
        y = scores[row, column].item()
        expected -= y * np.log(p) + (1 - y) * np.log(1 - p)
    assert found.item() == pytest.approx(expected / 3)
