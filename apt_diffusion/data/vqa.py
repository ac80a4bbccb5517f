"""VQAv2: questions about COCO pictures with ten people's answers, from the official files or the hub.

Official files: `v2_OpenEnded_mscoco_<subset>_questions.json`, `v2_mscoco_<subset>_annotations.json`, and folders
`train2014`, `val2014`, `test2015` with `COCO_<subset>_<12 digits>.jpg`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .columns import kind_of, one_text, several_texts, with_pictures
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


@dataclass(frozen=True)
class Question:
    """A question about a picture; `answers` is empty where they are not public."""

    question_id: int
    text: str
    picture: PictureSource
    answers: tuple[str, ...] = ()
    answer: str | None = None  # the most common one, `multiple_choice_answer`
    kind: str | None = None


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
