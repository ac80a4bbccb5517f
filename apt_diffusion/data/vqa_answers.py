"""VQAv2's answers: normalisation, vocabulary, soft targets, the official accuracy, submission files."""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .image_text import Example
from .sources import SHOWN
from .vqa import Question

logger = logging.getLogger(__name__)

ANSWER_KINDS = ("yes/no", "number", "other")
MIN_COUNT = 9  # how often an answer must be the most common one of a question: gives VQAv2's 3,129
# Of how many of the ten people gave an answer. The mean, over all choices of nine of the ten, of min(1, count / 3).
SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)


# Vocabulary and targets


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
    """The list that the evaluation server takes as JSON."""
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

    Punctuation next to a space, or all of it where a comma stands within a number, vanishes; other punctuation becomes
    a space. Periods stay only before digits.
    """
    text = answer
    for mark in PUNCTUATION:
        vanishes = f"{mark} " in answer or f" {mark}" in answer or COMMA_IN_NUMBER.search(answer)
        text = text.replace(mark, "" if vanishes else " ")
    words = [WORDS.get(word, word) for word in PERIOD.sub("", text).lower().split()]
    return " ".join(MENDED.get(word, word) for word in words if word not in ARTICLES)
