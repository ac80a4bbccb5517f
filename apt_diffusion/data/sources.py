"""Where the pictures and annotations of a data set come from: files in the folder given, or rows of a hub data set.

All files are checked before the first step, so a missing picture does not stop a training half way.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from .reading import as_rgb, check_size, read_picture

SHOWN = 3  # how many examples a message names


@dataclass(frozen=True)
class HubPicture:
    """A picture in a row of a `datasets.Dataset`, decoded when it is read."""

    rows: Any
    row: int
    column: str = "image"


PictureSource = Path | HubPicture


def read_source(source: PictureSource) -> Image.Image:
    """The picture as RGB, upright; `ValueError` with its name, or its row, where it cannot be read."""
    if isinstance(source, Path):
        return read_picture(source)
    try:
        image = source.rows[source.row][source.column]
        check_size(*image.size)
        return as_rgb(image)
    except Exception as error:  # PIL's decoders raise anything from OSError to struct.error
        raise ValueError(f"{name_of(source)} cannot be read: {error}") from error


def name_of(source: PictureSource) -> str:
    """A picture in an error: "The picture data/1.jpg", or its place in a data set of the hub."""
    if isinstance(source, Path):
        return f"The picture {source}"
    return f"The picture in row {source.row}, {source.column!r},"


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, where `name` comes from a file; `ValueError` where it leads out of the folder."""
    parts = PurePosixPath(str(name).replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"The annotations name the picture {name!r}, which leads out of {folder}.")
    return folder / parts


def check_pictures(sources: Iterable[PictureSource], remedy: str) -> None:
    """`FileNotFoundError` that counts the files that are not there and names the first few.

    Args:
        sources: pictures; those of hub data sets are there by definition.
        remedy: a sentence on where they should be.
    """
    paths = list(dict.fromkeys(source for source in sources if isinstance(source, Path)))
    missing = [path for path in paths if not path.is_file()]
    if missing:
        names = ", ".join(map(str, missing[:SHOWN]))
        more = ", ..." if len(missing) > SHOWN else ""
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} pictures are missing: {names}{more}. {remedy}")


def read_json(file: str | Path, what: str) -> Any:
    """The content of a JSON file; an error says what the file should have been."""
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}: it should hold {what}.")
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}): it should hold {what}. Download it again.") from error


def read_lines(file: Path) -> list[str]:
    """The lines of a text file, with or without a byte order mark; `ValueError` with its name where it is no UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig").split("\n")  # not at the other separators that a text may hold
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}): save it as such, or download it again.") from error


def load_hub_splits(name: str, config: str | None = None) -> dict[str, Any]:
    """`{split: datasets.Dataset}` of a data set on the hub, in the local cache, or in a folder of parquet files.

    Raises:
        ImportError: where `datasets` is not installed.
        ValueError: where the data set cannot be loaded, with the cause.
    """
    try:
        from datasets import load_dataset, load_from_disk
    except ImportError as error:
        raise ImportError("Data sets of the hub need `pip install datasets`.") from error
    try:
        if (Path(name) / "state.json").is_file():  # as `Dataset.save_to_disk` leaves it
            return {"train": load_from_disk(name)}
        return dict(load_dataset(name, config))
    except Exception as error:  # the hub, the cache and every format fail with classes of their own
        raise ValueError(f"The data set {name!r} cannot be loaded: {error}") from error


def check_columns(rows: Any, names: Iterable[str], data_set: str, remedy: str = "") -> None:
    """`ValueError` where a split of a hub data set lacks a column; `remedy` is a sentence on what to do."""
    missing = [name for name in names if name not in rows.column_names]
    if missing:
        known = f"its columns are {rows.column_names}."
        raise ValueError(f"The data set {data_set!r} has no column {missing}: {known} {remedy}".rstrip())
