"""Pictures and captions of a `datasets` data set: on the hub, or a folder of parquet files or pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .folders import FolderOptions, Scan
from .masks import check_mask
from .pictures import Picture
from .reading import RowPicture, picture_size
from .sources import check_columns, load_hub_splits

SPLIT = "train"
IMAGE_COLUMN = "image"
CAPTION_COLUMN = "text"


def scan_rows(
    name: str, config: str | None, image_column: str, caption_column: str | None, prompt: str, options: FolderOptions
) -> Scan:
    """The pictures of a data set's split "train" (or of its only one), each read once to be sure that it can be.

    Args:
        name: on the hub, or a folder.
        config: which of its configurations, if it has several.
        image_column: where the pictures are.
        caption_column: where the captions are; "text", if there is such a column, if `None`.
        prompt: of rows without a caption.
        options: as for a folder; a mask is the transparency of a picture.

    Raises:
        ImportError: where `datasets` is not installed.
        ValueError: where the data set, its split or a column is not there, or a column holds something else.
    """
    rows = _split(load_hub_splits(name, config), name)
    check_columns(rows, [image_column], name, "Name the one with the pictures by --image_column.")
    if caption_column is not None:
        check_columns(rows, [caption_column], name, "Name the one with the captions by --caption_column.")
    elif CAPTION_COLUMN in rows.column_names:
        caption_column = CAPTION_COLUMN
    captions = [None] * len(rows) if caption_column is None else _texts(rows, caption_column, name)
    encoded = _encoded(rows, image_column, name)
    scan = Scan(Path(name))
    roots = _roots(name)
    for row, text in enumerate(captions):
        path = RowPicture(name, row, image_column, encoded, roots)
        caption = (text or "").strip()
        try:
            options.captions.check(caption, f"{path.name} of {name}")
            picture = Picture(path, caption or prompt, *picture_size(path), options.captions, weight=options.weight)
            mask = check_mask(picture, []) if options.masked else None
        except ValueError as error:
            scan.problems.append(str(error))
            continue
        scan.captions_from[path] = f"column {caption_column}" if caption else options.prompt_from
        scan.pictures.append(Picture(**vars(picture) | {"mask": mask}))
    if not scan.pictures and not scan.problems:
        scan.problems.append(f"The data set {name!r} has no rows.")
    return scan


def _split(splits: dict[str, Any], name: str) -> Any:
    if SPLIT in splits:
        return splits[SPLIT]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise ValueError(f"The data set {name!r} has no split {SPLIT!r}: its splits are {sorted(splits)}.")


def _texts(rows: Any, column: str, name: str) -> Sequence[str | None]:
    dtype = getattr(rows.features[column], "dtype", None)
    if dtype not in ("string", "large_string", "null"):
        raise ValueError(
            f"The column {column!r} of {name!r} holds {rows.features[column]}, and should hold texts: name another "
            "one with --caption_column."
        )
    return rows[column]


def _encoded(rows: Any, column: str, name: str) -> Any:
    """The rows with their pictures as they are encoded: our own reader decodes them, within its limits."""
    from datasets import Image

    feature = rows.features[column]
    is_encoded = getattr(feature, "dtype", "") in ("binary", "large_binary")
    if not (isinstance(feature, Image) or is_encoded or (isinstance(feature, dict) and "bytes" in feature)):
        raise ValueError(
            f"The column {column!r} of {name!r} holds {feature}, and should hold pictures: name another one with "
            "--image_column."
        )
    if not is_encoded:
        rows = rows.cast_column(column, Image(decode=False))
    return rows.select_columns([column])


def _roots(name: str) -> tuple[Path, ...]:
    """The folders in which a row may name files: that of the data set, or the caches of the hub."""
    if Path(name).is_dir():
        return (Path(name).resolve(),)
    from datasets import config
    from huggingface_hub import constants

    return Path(config.HF_DATASETS_CACHE).resolve(), Path(constants.HF_HUB_CACHE).resolve()
