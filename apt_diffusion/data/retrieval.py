"""Image-text retrieval data: Flickr30K and COCO as Karpathy split them, or a data set of the hub.

`read_karpathy` and `read_hub` give a `RetrievalSplit`; `RetrievalData` maps a position of the endless training stream
to a picture, one of its captions and captions of other pictures, by the seed and the position alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .columns import first_rows, several_texts, with_pictures
from .image_text import Batch, ModelInputs
from .nlvr2 import OFFICIAL_PROMPT
from .order import Purpose, entry_at, random_at
from .sources import (
    HubPicture,
    PictureSource,
    check_columns,
    check_pictures,
    inside,
    load_hub_splits,
    name_of,
    read_json,
)

# Karpathy's splits, by what they serve. COCO's `restval` is what is left of its validation pictures. Both official
# codes train on train + val (COCO: train + restval) and look at the test split only.
TRAIN_SPLITS = ("train", "restval")
EVALUATION_SPLITS = ("val", "test")
CAPTION_KEYS = ("raw", "caption", "sentence", "text")
PICTURE_FOLDERS = ("flickr30k-images", "flickr30k_images", "images")


@dataclass(frozen=True)
class RetrievalSplit:
    """Pictures, each once, and their captions: those of picture i are `captions[firsts[i]:firsts[i + 1]]`."""

    images: list[PictureSource]
    captions: list[str]
    image_of: list[int]  # of every caption
    firsts: list[int] = field(repr=False)

    @classmethod
    def of(cls, items: Iterable[tuple[PictureSource, Iterable[str]]], what: str) -> "RetrievalSplit":
        """From `(picture, captions)` pairs; a caption that a picture has twice counts once, as in the official code.

        Pairs of the same picture are one picture with the captions of all, where it came first: a data set may have a
        row for each caption.

        Raises:
            ValueError: where there is no picture at all, or one without a caption.
        """
        grouped: dict[PictureSource, list[str]] = {}
        for picture, of_picture in items:
            grouped.setdefault(picture, []).extend(of_picture)
        images: list[PictureSource] = []
        captions: list[str] = []
        image_of: list[int] = []
        firsts = [0]
        for picture, of_picture in grouped.items():
            distinct = list(dict.fromkeys(text.strip() for text in of_picture if text.strip()))
            if not distinct:
                raise ValueError(f"The picture {picture} of {what} has no caption.")
            captions += distinct
            image_of += [len(images)] * len(distinct)
            images.append(picture)
            firsts.append(len(captions))
        if not images:
            raise ValueError(f"There are no pictures in {what}.")
        return cls(images, captions, image_of, firsts)

    @classmethod
    def empty(cls) -> "RetrievalSplit":
        """A split without pictures."""
        return cls([], [], [], [0])

    def captions_of(self, image: int) -> list[str]:
        """The captions of the picture of that number."""
        return self.captions[self.firsts[image] : self.firsts[image + 1]]


def find_karpathy(folder: str | Path, image_dir: str | Path | None = None) -> tuple[Path, Path]:
    """Annotations and pictures of a data set's folder: its `dataset_*.json`, and `image_dir`, else
    `flickr30k-images` where there is one, else the folder itself (COCO's `train2014` and `val2014` lie there).

    Raises:
        FileNotFoundError, ValueError: where there is not exactly one such file.
    """
    folder = Path(folder).expanduser()
    files = sorted(folder.glob("dataset_*.json"))
    if not files:
        raise FileNotFoundError(f"There is no dataset_flickr30k.json or dataset_coco.json in {folder}.")
    if len(files) > 1:
        raise ValueError(f"{folder} has several data sets: {[file.name for file in files]}. Give each its own folder.")
    inner = next((folder / name for name in PICTURE_FOLDERS if (folder / name).is_dir()), folder)
    return files[0], inner if image_dir is None else Path(image_dir).expanduser()


def read_karpathy(annotations: str | Path, image_dir: str | Path, splits: Iterable[str]) -> RetrievalSplit:
    """Pictures and captions of some splits of a Karpathy JSON (`dataset_flickr30k.json`, `dataset_coco.json`).

    A picture is `image_dir / filepath / filename`, where COCO's `filepath` is `train2014` or `val2014` and Flickr30K
    has none; `image_dir / filename` is taken where all pictures lie in one folder.

    Raises:
        FileNotFoundError: for a missing file or folder, or pictures: their number and the first few.
        ValueError: for a file of another format, a split that it does not have, or a picture without a caption.
    """
    image_dir, splits = Path(image_dir).expanduser(), tuple(splits)
    content = read_json(annotations, "Karpathy's captions and splits (dataset_flickr30k.json, dataset_coco.json)")
    if not image_dir.is_dir():
        raise FileNotFoundError(f"There is no folder {image_dir} with the pictures.")
    try:
        rows = content["images"]
        items = [
            (_picture(row, image_dir), [sentence["raw"] for sentence in row["sentences"]])
            for row in rows
            if row["split"] in splits
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f'{annotations} has not the format {{"images": [{{"filename": ..., "split": ..., "sentences": '
            f'[{{"raw": ...}}]}}]}}: {error!r}.'
        ) from error
    _check_splits(splits, {row["split"] for row in rows}, str(annotations))
    check_pictures((picture for picture, _ in items), f"They are looked for in {image_dir} (--image_dir).")
    return RetrievalSplit.of(items, f"{annotations}, splits {'+'.join(splits)}")


def _picture(row: dict[str, Any], image_dir: Path) -> Path:
    filed = inside(image_dir, f"{row['filepath']}/{row['filename']}") if row.get("filepath") else None
    flat = inside(image_dir, row["filename"])
    return filed if filed is not None and (filed.is_file() or not flat.is_file()) else flat


def _check_splits(splits: tuple[str, ...], present: set[str], where: str) -> None:
    # Flickr30K has no `restval`: to name it together with `train` is no mistake.
    if not set(splits) & present:
        raise ValueError(f"{where} has none of the splits {list(splits)}: there are {sorted(present)}.")


def read_hub(
    name: str, splits: Iterable[str], image_column: str = "image", caption_column: str = "caption"
) -> RetrievalSplit:
    """The same from the hub: rows of a picture with its captions, all in one row or one row for each.

    Captions are a text, a list of texts, a list of dicts, or a dict of lists. Rows whose pictures have the same
    content are one picture. Karpathy's split is read from the column `split` where there is one (`nlphuji/flickr30k`
    has all rows in one split of the hub), else the splits of the hub are meant; `validation` is `val`.

    Raises:
        ImportError, ValueError: where it cannot be loaded, or has other columns or splits, or columns of another kind.
    """
    splits = tuple(splits)
    items, present = [], set()
    for hub_split, rows in load_hub_splits(name).items():
        check_columns(rows, (image_column, caption_column), name)
        by_row = rows["split"] if "split" in rows.column_names else [hub_split] * len(rows)
        by_row = ["val" if split == "validation" else split for split in by_row]
        present |= set(by_row)
        chosen = [row for row, split in enumerate(by_row) if split in splits]
        if not chosen:
            continue
        rows = with_pictures(rows, [image_column], name)
        first_of = first_rows(rows, set(chosen), image_column)
        captions = rows[caption_column]
        for row in chosen:
            where = f"The column {caption_column!r} of {name!r}, row {row},"
            texts = several_texts(captions[row], CAPTION_KEYS, where)
            items.append((HubPicture(rows, first_of[row], image_column), texts))
    _check_splits(splits, present, f"The data set {name!r}")
    # HubPictures of the same row are equal, wherever they come from: `of` puts their captions together.
    return RetrievalSplit.of(items, f"{name!r}, splits {'+'.join(splits)}")


@dataclass(frozen=True)
class RetrievalSample:
    """One picture of a training batch."""

    image: PictureSource
    texts: list[str]  # the true caption, then the false ones
    matched: PictureSource  # for the matching loss, with the true caption
    is_match: bool  # whether it is the caption's own picture


class RetrievalData(Dataset):
    """position -> `(RetrievalSample, draws)`: a picture, one of its captions, and captions that are not true of it.

    `draws` is what to augment the pictures with, `None` where they are left as they are. The length is an epoch, which
    shows every caption once.

    Args:
        split: what to train on.
        seed: every random choice follows from it.
        augment: whether pictures are changed at random.
        num_false: false captions per picture (15 in the official code of ViLT and METER).
        official_false_captions: draw them from all captions, the picture's own included, as that code does.
        official_prefix: put `OFFICIAL_PROMPT` before the true caption and not before the false ones, as APT's released
            code for ViLT does: the prefix gives the true one away.

    Raises:
        ValueError: where there are too few different captions.
    """

    def __init__(
        self,
        split: RetrievalSplit,
        seed: int,
        augment: bool = False,
        num_false: int = 15,
        official_false_captions: bool = False,
        official_prefix: bool = False,
    ) -> None:
        most = max(last - first for first, last in zip(split.firsts, split.firsts[1:], strict=False))
        distinct = len(set(split.captions))
        if distinct - most < num_false or len(split.images) < 2:
            raise ValueError(
                f"{num_false} false captions per picture need at least as many different captions of other pictures: "
                f"there are {distinct} captions of {len(split.images)} pictures."
            )
        self.split = split
        self.seed = seed
        self.augment = augment
        self.num_false = num_false
        self.official_false_captions = official_false_captions
        self.prefix = OFFICIAL_PROMPT if official_prefix else ""

    def __len__(self) -> int:
        return len(self.split.captions)

    def __getitem__(self, position: int) -> tuple[RetrievalSample, np.random.Generator | None]:
        draws = random_at(self.seed, position, Purpose.SAMPLE)
        caption = entry_at(self.seed, position, len(self))
        image = self.split.image_of[caption]
        true = self.prefix + self.split.captions[caption]
        texts = [true, *self._false_captions(image, draws)]
        is_match = position % 2 == 0
        matched = image if is_match else self._other_image(image, draws)
        sample = RetrievalSample(self.split.images[image], texts, self.split.images[matched], is_match)
        return sample, draws if self.augment else None

    def describe(self, position: int) -> str:
        """The picture and the caption at a position, for errors."""
        caption = entry_at(self.seed, position, len(self))
        return f"{self.split.captions[caption]!r} ({name_of(self.split.images[self.split.image_of[caption]])})"

    def _false_captions(self, image: int, draws: np.random.Generator) -> list[str]:
        """Uniform over the captions; ours are distinct, and none reads as a caption of the picture."""
        captions = self.split.captions
        if self.official_false_captions:
            return [captions[index] for index in draws.integers(len(captions), size=self.num_false)]
        taken = set(self.split.captions_of(image))
        chosen: list[str] = []
        while len(chosen) < self.num_false:
            text = captions[draws.integers(len(captions))]
            if text not in taken:
                taken.add(text)
                chosen.append(text)
        return chosen

    def _other_image(self, image: int, draws: np.random.Generator) -> int:
        other = int(draws.integers(len(self.split.images) - 1))
        return other + (other >= image)


class RetrievalInputs:
    """Collates samples of B pictures to model inputs, with B (1 + k) texts, those of one picture together.

    Args:
        inputs: for the model.
        with_matched: also `matched.*`, inputs of the pictures for the matching loss, and `is_match` (B,).
    """

    def __init__(self, inputs: ModelInputs, with_matched: bool = False) -> None:
        self.inputs = inputs
        self.with_matched = with_matched

    def __call__(self, samples: Sequence[tuple[RetrievalSample, np.random.Generator | None]]) -> Batch:
        batch = self.inputs.texts([text for sample, _ in samples for text in sample.texts])
        batch |= self.inputs.pictures([(sample.image, draws) for sample, draws in samples])
        if self.with_matched:
            matched = self.inputs.pictures([(sample.matched, draws) for sample, draws in samples])
            batch |= {f"matched.{name}": tensor for name, tensor in matched.items()}
            batch["is_match"] = torch.tensor([sample.is_match for sample, _ in samples])
        return batch


def first_images(split: RetrievalSplit, count: int | None) -> RetrievalSplit:
    """The first so many pictures of a split, and their captions."""
    if count is None or count >= len(split.images):
        return split
    last = split.firsts[count]
    return RetrievalSplit(
        split.images[:count], split.captions[:last], split.image_of[:last], split.firsts[: count + 1]
    )
