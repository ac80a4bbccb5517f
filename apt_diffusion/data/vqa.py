"""VQAv2: questions about COCO pictures with ten people's answers; vocabulary, soft scores, submission file.

Official files: `v2_OpenEnded_mscoco_<subset>_questions.json`, `v2_mscoco_<subset>_annotations.json`, and folders
`train2014`, `val2014`, `test2015` with `COCO_<subset>_<12 digits>.jpg`.
"""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .columns import kind_of, one_text, several_texts, with_pictures
from .image_text import Example
from .sources import SHOWN, HubPicture, PictureSource, check_columns, check_pictures, load_hub_splits, read_json

logger = logging.getLogger(__name__)

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


def load_questions(folder: str | Path, split: str, pictures_needed: bool = True) -> list[Question]:
    """The questions of a split, in the official files' order.

    Args:
        folder: of the official files.
        split: one of `SPLITS`.
        pictures_needed: whether they must be there; a vocabulary needs the annotations only.

    Raises:
        FileNotFoundError: for files that are not there; for pictures, with their number and the first few.
        ValueError: for files of another kind, or questions without annotation.
    """
    folder = Path(folder).expanduser()
    subset, pictures = SPLITS[split]
    file = folder / f"v2_OpenEnded_mscoco_{subset}_questions.json"
    what = f"the questions of VQAv2's {split} split"
    questions = _entries(file, "questions", what, ("question_id", "question", "image_id"))
    annotations: dict[int, dict[str, Any]] = {}
    if split in ANNOTATED:
        source = folder / f"v2_mscoco_{subset}_annotations.json"
        entries = _entries(source, "annotations", f"the answers of VQAv2's {split} split", ("question_id", "answers"))
        annotations = {entry["question_id"]: entry for entry in entries}
        _check_annotated([question["question_id"] for question in questions], annotations, source)
    found = {path.stem: path for path in (folder / pictures).glob("COCO_*")}
    result = []
    for entry in questions:
        annotation = annotations.get(entry["question_id"])
        picture = _picture(folder, pictures, entry["image_id"], found)
        result.append(_question(entry, annotation, picture, f"{file}, question {entry['question_id']}"))
    if not result:
        raise ValueError(f"{file} holds no questions.")
    if not pictures_needed:
        return result
    check_pictures((q.picture for q in result), f"COCO's archive {pictures}.zip holds them; unpack it in {folder}.")
    return result


def _entries(file: Path, key: str, what: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    content = read_json(file, what)
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise ValueError(f"{file} has no list {key!r}: it should hold {what}.")
    for number, entry in enumerate(content[key]):
        if not isinstance(entry, dict) or not all(field in entry for field in fields):
            raise ValueError(f"{file}, {key} {number}: {kind_of(entry)}, and should be a dict with {list(fields)}.")
    return content[key]


def _check_annotated(ids: Sequence[int], annotations: dict[int, Any], file: Path) -> None:
    missing = [question_id for question_id in ids if question_id not in annotations]
    if missing:
        some = ", ".join(map(str, missing[:SHOWN])) + (", ..." if len(missing) > SHOWN else "")
        raise ValueError(f"{len(missing)} of {len(ids)} questions have no annotation in {file}: {some}.")


def _picture(folder: Path, subset: str, image_id: int, found: dict[str, Path]) -> Path:
    stem = f"COCO_{subset}_{image_id:012d}"
    return found.get(stem, folder / subset / f"{stem}.jpg")


def _question(
    entry: dict[str, Any], annotation: dict[str, Any] | None, picture: PictureSource, where: str
) -> Question:
    text = one_text(entry["question"], f"{where}: 'question'")
    if annotation is None:
        return Question(entry["question_id"], text, picture)
    stored = annotation.get("answers")
    answers = tuple(several_texts(stored, ("answer",), f"{where}: 'answers'")) if stored is not None else ()
    common = annotation.get("multiple_choice_answer")
    if common is None and answers:
        common = Counter(answers).most_common(1)[0][0]
    if common is not None:
        one_text(common, f"{where}: 'multiple_choice_answer'")
    return Question(entry["question_id"], text, picture, answers, common, annotation.get("answer_type"))


def load_hub_questions(name: str, split: str) -> list[Question]:
    """As `load_questions`, from a data set of the hub with the columns `question_id`, `question`, `image`, `answers`.

    `answers` may be a list of texts, a list of dicts with `answer`, or a dict of lists.

    Raises:
        ValueError: for a data set that cannot be loaded, or lacks the split or a column, or has one of another kind.
    """
    splits = load_hub_splits(name)
    present = next((key for key in HUB_SPLITS[split] if key in splits), None)
    if present is None:
        raise ValueError(f"The data set {name!r} has no split {split!r}: its splits are {sorted(splits)}.")
    rows = splits[present]
    columns = ("question_id", "question", "image") + (("answers",) if split in ANNOTATED else ())
    check_columns(rows, columns, name)
    texts, rows = rows.remove_columns("image"), with_pictures(rows, ["image"], name)
    if not len(rows):
        raise ValueError(f"The split {present!r} of {name!r} is empty.")
    return [
        _question(
            entry,
            entry if split in ANNOTATED else None,
            HubPicture(rows, index, "image"),
            f"{name!r}, split {present!r}, row {index}",
        )
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
        raise ValueError(
            f"No answer is that of at least {min_count} questions: the annotations are too few to learn, or "
            "--min_answer_count is too high for them."
        )
    return vocabulary


def soft_scores(answers: Sequence[str]) -> dict[str, float]:
    """Scores of the answers that somebody gave, by how many gave it; case and spaces around an answer do not count."""
    counts = Counter(answer.strip().lower() for answer in answers)
    return {answer: SCORES[min(count, len(SCORES) - 1)] for answer, count in counts.items()}


def normalized_scores(answers: Sequence[str]) -> dict[str, float]:
    """The same, of the answers as the official evaluation tool normalises them ("Yes." and "yes" are one)."""
    return soft_scores([normalize_answer(answer) for answer in answers])


def soft_targets(question: Question, index: dict[str, int]) -> tuple[tuple[int, float], ...]:
    """`(place in the vocabulary, score)` of the answers that are in it.

    Answers count as they are written, as in the official training code. Only where none of them is in the vocabulary
    are they normalised, as the vocabulary is: the official files hardly need that, other data do.
    """
    for scores in (soft_scores(question.answers), normalized_scores(question.answers)):
        target = tuple((index[answer], score) for answer, score in scores.items() if answer in index)
        if target:
            return target
    return ()


def training_examples(questions: Sequence[Question], vocabulary: Sequence[str], prompt: str = "") -> list[Example]:
    """Examples with soft targets; questions that no answer of the vocabulary answers are left out, as officially.

    Args:
        questions: with their answers.
        vocabulary: in the order of the model's outputs.
        prompt: put before every question.

    Raises:
        ValueError: where that leaves none.
    """
    index = {answer: place for place, answer in enumerate(vocabulary)}
    examples = [Example(prompt + q.text, (q.picture,), soft_targets(q, index)) for q in questions]
    usable = [example for example in examples if example.target]
    _report_usable(questions, len(usable), vocabulary, "to train on")
    return usable


def check_answerable(questions: Sequence[Question], vocabulary: Sequence[str]) -> None:
    """Logs how many questions of an evaluation the vocabulary can answer; `ValueError` where it is none."""
    index = {answer: place for place, answer in enumerate(vocabulary)}
    _report_usable(questions, sum(bool(soft_targets(q, index)) for q in questions), vocabulary, "to evaluate on")


def _report_usable(questions: Sequence[Question], usable: int, vocabulary: Sequence[str], purpose: str) -> None:
    if questions and not usable:
        given = ", ".join(repr(question.answer) for question in questions[:SHOWN])
        raise ValueError(
            f"None of the {len(questions)} questions {purpose} has an answer among the {len(vocabulary)} of the "
            f"vocabulary ({', '.join(map(repr, vocabulary[:SHOWN]))}, ...): they are answered {given}, ... "
            "--new_vocabulary makes a vocabulary from these data."
        )
    logger.info("%d of %d questions %s have an answer in the vocabulary.", usable, len(questions), purpose)


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
    written in the annotations, or where none is written so, of the normalised ones. Questions that no answer of the
    vocabulary answers count, with 0.
    """
    by_kind: dict[str, list[float]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        by_kind[question.kind or "other"].append(_score(question, answer))
    every = [score for scores in by_kind.values() for score in scores]
    kinds = {kind: sum(by_kind[kind]) / len(by_kind[kind]) for kind in ANSWER_KINDS if kind in by_kind}
    return {"accuracy": sum(every) / len(every), **{f"accuracy_{kind}": value for kind, value in kinds.items()}}


def _score(question: Question, answer: str) -> float:
    written = soft_scores(question.answers)
    guess = answer.strip().lower()
    return written[guess] if guess in written else normalized_scores(question.answers).get(guess, 0.0)


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
