"""NLVR2: sentences about two photographs, true or false.

Official files: JSON lines `train.json`, `dev.json`, `test1.json` (in the folder, in `data/` or in `nlvr2/data/`), and
pictures `<identifier without its last part>-img0.png`, `-img1.png` in `images/train/<directory>/`, `dev/`, `test1/`.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .columns import one_text, with_pictures
from .image_text import Example
from .sources import HubPicture, PictureSource, check_columns, check_pictures, load_hub_splits, read_lines

SPLITS = ("train", "dev", "test1")  # test1 is the public test set, test-P
ANNOTATION_FOLDERS = ("", "data", "nlvr2/data")
PICTURE_FOLDERS = ("{split}", "images/{split}", "images")
HUB_SPLITS = {
    "train": ("train",),
    "dev": ("dev", "validation", "balanced_dev"),
    "test1": ("test1", "test", "test_public", "balanced_test_public"),
}
# The released code of APT for ViLT puts it before every sentence; see docs/vision_language.md.
OFFICIAL_PROMPT = "Does the images satisfy the description: "


@dataclass(frozen=True)
class Statement:
    """A sentence about two pictures, and whether it is true; `set_id` is shared by the pairs of one sentence."""

    identifier: str
    sentence: str
    left: PictureSource
    right: PictureSource
    label: bool

    @property
    def sentence_id(self) -> tuple[str, str]:
        """Identifier of a picture set and sentence: the same for all pairs that a sentence was judged on."""
        parts = self.identifier.split("-")
        return "-".join(parts[:-2]), parts[-1]


def load_statements(folder: str | Path, split: str) -> list[Statement]:
    """The statements of a split, in the file's order.

    Raises:
        FileNotFoundError: for a file that is not there; for pictures, with their number and the first few.
        ValueError: for a line that is no statement, with its number.
    """
    folder = Path(folder).expanduser()
    files = [folder / place / f"{split}.json" for place in ANNOTATION_FOLDERS]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        looked = ", ".join(map(str, files))
        raise FileNotFoundError(f"There is no file with the statements of NLVR2's {split} split; looked for {looked}.")
    places = [folder / place.format(split=split) for place in PICTURE_FOLDERS]
    place = next((place for place in places if place.is_dir()), places[0])
    result = []
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
        try:
            result.append(_statement(json.loads(line), place))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}, line {number} is no statement of NLVR2: {error!r}.") from error
    if not result:
        raise ValueError(f"{file} holds no statements.")
    pictures = (picture for statement in result for picture in (statement.left, statement.right))
    check_pictures(pictures, f"They should be in {place}, as the official archives unpack.")
    return result


def _statement(line: dict[str, Any], place: Path) -> Statement:
    identifier = line["identifier"]
    stem, _, sentence_number = identifier.rpartition("-")
    if not stem or not sentence_number.isdigit() or "/" in stem or "\\" in stem:
        raise ValueError(f"the identifier {identifier!r}")
    directory = place / str(int(line["directory"])) if "directory" in line else place
    left, right = (directory / f"{stem}-img{side}.png" for side in (0, 1))
    sentence, label = one_text(line["sentence"], "'sentence'"), _truth(line["label"], "the label")
    return Statement(identifier, sentence, left, right, label)


def _truth(label: Any, where: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if str(label).strip().lower() not in words:
        raise ValueError(f"{where} {label!r} is neither true nor false: has this split no labels?")
    return words[str(label).strip().lower()]


def load_hub_statements(name: str, split: str) -> list[Statement]:
    """As `load_statements`, from a data set of the hub.

    Raises:
        ValueError: for a data set that cannot be loaded, or lacks the split or a column, or has one of another kind.
    """
    splits = load_hub_splits(name)
    present = next((key for key in HUB_SPLITS[split] if key in splits), None)
    if present is None:
        raise ValueError(f"The data set {name!r} has no split {split!r}: its splits are {sorted(splits)}.")
    rows = splits[present]
    sentence = "sentence" if "sentence" in rows.column_names else "question"
    label = "label" if "label" in rows.column_names else "answer"
    check_columns(rows, (sentence, label, "left_image", "right_image"), name)
    texts = rows.select_columns([c for c in (sentence, label, "identifier") if c in rows.column_names])
    rows = with_pictures(rows, ("left_image", "right_image"), name)
    if not len(rows):
        raise ValueError(f"The split {present!r} of {name!r} is empty.")
    return [
        Statement(
            str(row.get("identifier", f"{split}-{index}-0-0")),
            one_text(row[sentence], f"{name!r}, split {present!r}, row {index}: {sentence!r}"),
            HubPicture(rows, index, "left_image"),
            HubPicture(rows, index, "right_image"),
            _truth(row[label], f"{name!r}, split {present!r}, row {index}: the label"),
        )
        for index, row in enumerate(texts)
    ]


def make_examples(statements: Sequence[Statement], prompt: str = "") -> list[Example]:
    """Examples with class 1 for true, 0 for false."""
    return [Example(prompt + s.sentence, (s.left, s.right), int(s.label)) for s in statements]


def nlvr2_accuracy(statements: Sequence[Statement], classes: Sequence[int]) -> dict[str, float]:
    """`accuracy`, and the official `consistency`: the share of sentences judged right on all of their pairs."""
    right = [bool(guess) == statement.label for statement, guess in zip(statements, classes, strict=True)]
    by_sentence: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for statement, correct in zip(statements, right, strict=True):
        by_sentence[statement.sentence_id].append(correct)
    consistent = [all(judgements) for judgements in by_sentence.values()]
    return {"accuracy": sum(right) / len(right), "consistency": sum(consistent) / len(consistent)}
