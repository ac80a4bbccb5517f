"""VQAv2: questions about COCO pictures with ten people's answers; vocabulary, soft scores, submission file.

Official files: `v2_OpenEnded_mscoco_<subset>_questions.json`, `v2_mscoco_<subset>_annotations.json`, and folders
`train2014`, `val2014`, `test2015` with `COCO_<subset>_<12 digits>.jpg`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .image_text import Example
from .sources import SHOWN, HubPicture, PictureSource, check_columns, check_pictures, load_hub_splits, read_json

# Split: (subset in the questions' file name, subset of the pictures).
SPLITS = {
    "train": ("train2014", "train2014"),
    "val": ("val2014", "val2014"),
    "test": ("test2015", "test2015"),
    "test-dev": ("test-dev2015", "test2015"),
}
ANNOTATED = ("train", "val")
HUB_SPLITS = {
    "train": ("train",),
    "val": ("validation", "val"),
    "test": ("test",),
    "test-dev": ("testdev", "test-dev"),
}

ANSWER_KINDS = ("yes/no", "number", "other")
MIN_COUNT = 9  # how often an answer must be the most common one of a question: gives VQAv2's 3,129
# Of how many of the ten people gave an answer. The mean, over all choices of nine of the ten, of min(1, count / 3).
SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)


@dataclass(frozen=True)
class Question:
    """A question about a picture; `answers` is empty where they are not public."""

    question_id: int
    text: str
    picture: PictureSource
    answers: tuple[str, ...] = ()
    answer: str | None = None  # the most common one, `multiple_choice_answer`
    kind: str | None = None


# Reading


def load_questions(folder: str | Path, split: str) -> list[Question]:
    """The questions of a split, in the official files' order.

    Raises:
        FileNotFoundError: for files that are not there; for pictures, with their number and the first few.
        ValueError: for files of another kind, or questions without annotation.
    """
    folder = Path(folder).expanduser()
    subset, pictures = SPLITS[split]
    file = folder / f"v2_OpenEnded_mscoco_{subset}_questions.json"
    questions = _entries(file, "questions", f"the questions of VQAv2's {split} split")
    annotations: dict[int, dict[str, Any]] = {}
    if split in ANNOTATED:
        source = folder / f"v2_mscoco_{subset}_annotations.json"
        entries = _entries(source, "annotations", f"the answers of VQAv2's {split} split")
        annotations = {entry["question_id"]: entry for entry in entries}
        _check_annotated([question["question_id"] for question in questions], annotations, source)
    found = {path.stem: path for path in (folder / pictures).glob("COCO_*")}
    result = [
        _question(entry, annotations.get(entry["question_id"]), _picture(folder, pictures, entry["image_id"], found))
        for entry in questions
    ]
    check_pictures((q.picture for q in result), f"COCO's archive {pictures}.zip holds them; unpack it in {folder}.")
    return result


def _entries(file: Path, key: str, what: str) -> list[dict[str, Any]]:
    content = read_json(file, what)
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise ValueError(f"{file} has no list {key!r}: it should hold {what}.")
    return content[key]


def _check_annotated(ids: Sequence[int], annotations: dict[int, Any], file: Path) -> None:
    missing = [question_id for question_id in ids if question_id not in annotations]
    if missing:
        some = ", ".join(map(str, missing[:SHOWN])) + (", ..." if len(missing) > SHOWN else "")
        raise ValueError(f"{len(missing)} of {len(ids)} questions have no annotation in {file}: {some}.")


def _picture(folder: Path, subset: str, image_id: int, found: dict[str, Path]) -> Path:
    stem = f"COCO_{subset}_{image_id:012d}"
    return found.get(stem, folder / subset / f"{stem}.jpg")


def _question(entry: dict[str, Any], annotation: dict[str, Any] | None, picture: PictureSource) -> Question:
    if annotation is None:
        return Question(entry["question_id"], entry["question"], picture)
    answers = tuple(a["answer"] if isinstance(a, dict) else a for a in annotation.get("answers") or ())
    common = annotation.get("multiple_choice_answer")
    if common is None and answers:
        common = Counter(answers).most_common(1)[0][0]
    return Question(entry["question_id"], entry["question"], picture, answers, common, annotation.get("answer_type"))


def load_hub_questions(name: str, split: str) -> list[Question]:
    """As `load_questions`, from a data set of the hub with the columns `question_id`, `question`, `image`, `answers`.

    Raises:
        ValueError: for a data set that cannot be loaded, or lacks the split or a column.
    """
    splits = load_hub_splits(name)
    present = next((key for key in HUB_SPLITS[split] if key in splits), None)
    if present is None:
        raise ValueError(f"The data set {name!r} has no split {split!r}: its splits are {sorted(splits)}.")
    rows = splits[present]
    columns = ("question_id", "question", "image") + (("answers",) if split in ANNOTATED else ())
    check_columns(rows, columns, name)
    texts = rows.remove_columns([column for column in rows.column_names if column == "image"])
    return [
        _question(entry, entry if split in ANNOTATED else None, HubPicture(rows, index, "image"))
        for index, entry in enumerate(texts)
    ]


# Answers


def make_vocabulary(questions: Iterable[Question], min_count: int = MIN_COUNT) -> list[str]:
    """The answers to choose from: normalised most common answers of at least `min_count` questions, first come first.

    Over train and val, in the order of the files, these are the published 3,129.

    Raises:
        ValueError: where no answer is that common.
    """
    counts = Counter(normalize_answer(question.answer) for question in questions if question.answer is not None)
    vocabulary = [answer for answer, count in counts.items() if count >= min_count]
    if not vocabulary:
        raise ValueError(f"No answer is that of at least {min_count} questions: the annotations are too few to learn.")
    return vocabulary


def soft_scores(answers: Sequence[str]) -> dict[str, float]:
    """What each answer that somebody gave is worth, from how many gave it."""
    return {answer: SCORES[min(count, len(SCORES) - 1)] for answer, count in Counter(answers).items()}


def soft_targets(question: Question, index: dict[str, int]) -> tuple[tuple[int, float], ...]:
    """`(place in the vocabulary, score)` of the answers that are in it."""
    return tuple((index[answer], score) for answer, score in soft_scores(question.answers).items() if answer in index)


def training_examples(questions: Sequence[Question], vocabulary: Sequence[str]) -> list[Example]:
    """Examples with soft targets; questions that no answer of the vocabulary answers are left out, as officially."""
    index = {answer: place for place, answer in enumerate(vocabulary)}
    examples = [Example(q.text, (q.picture,), soft_targets(q, index)) for q in questions]
    return [example for example in examples if example.target]


class SoftLabels:
    """Targets of a batch as `(B, num_answers)` scores."""

    def __init__(self, num_answers: int) -> None:
        self.num_answers = num_answers

    def __call__(self, targets: list[tuple[tuple[int, float], ...]]) -> Tensor:
        labels = torch.zeros(len(targets), self.num_answers)
        for row, target in zip(labels, targets, strict=True):
            for place, score in target:
                row[place] = score
        return labels


# Metric


def vqa_accuracy(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """The mean soft score, over all questions and by kind of answer.

    It is the official tool's accuracy, a mean over people of `min(1, others who gave it / 3)`, of answers as they are
    written in the annotations. Questions that no answer of the vocabulary answers count, with 0.
    """
    by_kind: dict[str, list[float]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        by_kind[question.kind or "other"].append(soft_scores(question.answers).get(answer, 0.0))
    every = [score for scores in by_kind.values() for score in scores]
    kinds = {kind: sum(by_kind[kind]) / len(by_kind[kind]) for kind in ANSWER_KINDS if kind in by_kind}
    return {"accuracy": sum(every) / len(every), **{f"accuracy_{kind}": value for kind, value in kinds.items()}}


def submission(questions: Sequence[Question], answers: Sequence[str]) -> list[dict[str, Any]]:
    """What the evaluation server takes."""
    return [{"question_id": q.question_id, "answer": answer} for q, answer in zip(questions, answers, strict=True)]


# Normalisation of the official evaluation tool

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WORDS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
COMMA_IN_NUMBER = re.compile(r"\d,\d")
# Right forms; the tool mends words that lack one of these apostrophes.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905 (a table to be read)
MENDED = {
    right[:place] + right[place + 1 :]: right
    for right in CONTRACTIONS
    for place, letter in enumerate(right)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def normalize_answer(answer: str) -> str:
    """Lower case, digits for small numbers, no articles, no punctuation, apostrophes where they belong.

    Punctuation beside a space, or all of it where a comma stands within a number, vanishes; other punctuation becomes
    a space. Periods stay only before digits.
    """
    text = answer
    for mark in PUNCTUATION:
        vanishes = f"{mark} " in answer or f" {mark}" in answer or COMMA_IN_NUMBER.search(answer)
        text = text.replace(mark, "" if vanishes else " ")
    words = [WORDS.get(word, word) for word in PERIOD.sub("", text).lower().split()]
    return " ".join(MENDED.get(word, word) for word in words if word not in ARTICLES)
