"""Reads image folders in the common layouts: finds the pictures and the caption of each."""

import json
import logging
import re
from pathlib import Path

from .pictures import Picture
from .reading import is_picture, read_picture

logger = logging.getLogger(__name__)

CAPTIONS_FILE = "metadata.jsonl"
SIDECARS = (".txt", ".caption")
MAX_REPEATS = 10_000


def find_pictures(folder: str | Path, prompt: str, caption_column: str = "text") -> list[Picture]:
    """All pictures of a folder, sorted by name, each read once to be sure that it can be.

    Captions come from `<name>.txt` or `<name>.caption` next to a picture, else from `metadata.jsonl`, else they are
    `prompt`. In a folder of kohya's layout, the subfolder `10_sks dog` holds pictures of "sks dog", each of which is
    returned ten times. Other folders, hidden files and files that are no pictures are ignored with one warning that
    names them.

    Raises:
        ValueError: for a folder that is missing or holds no picture, a picture that cannot be read, or captions that
            make no sense; the message names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder} with pictures.")
    pictures = []
    ignored = []
    repeated = _repeated_folders(folder)
    for subfolder, (repeats, own_prompt) in repeated.items():
        found, others = _pictures_in(subfolder, own_prompt, caption_column)
        pictures += found * repeats
        ignored += [f"{subfolder.name}/{name}" for name in others]
    found, others = _pictures_in(folder, prompt, caption_column)
    ignored += [name for name in others if folder / name not in repeated]
    if ignored:
        logger.warning("Ignored in %s, as they are no pictures: %s", folder, ", ".join(ignored))
    if not found and not pictures:
        raise ValueError(f"There are no pictures in {folder} (JPEG, PNG, WebP, AVIF, TIFF, ...).")
    return found + pictures


def has_pictures(folder: str | Path) -> bool:
    """Whether `find_pictures` would find any."""
    folder = Path(folder)
    return folder.is_dir() and (any(map(is_picture, folder.iterdir())) or bool(_repeated_folders(folder)))


def check_picture(path: Path, prompt: str) -> Picture:
    """The picture, read once; `ValueError` with its name where it cannot be."""
    return Picture(path, prompt, *read_picture(path).size)


def _repeated_folders(folder: Path) -> dict[Path, tuple[int, str]]:
    """`{subfolder: (repeats, prompt)}` of those named `10_sks dog` that hold pictures."""
    found = {}
    for subfolder in sorted(folder.iterdir()):
        name = re.fullmatch(r"(\d+)_(.+)", subfolder.name)
        if name and subfolder.is_dir() and any(map(is_picture, subfolder.iterdir())):
            if not 1 <= int(name[1]) <= MAX_REPEATS:
                raise ValueError(
                    f"{subfolder} has {name[1]} repeats in its name: expected a number from 1 to {MAX_REPEATS}."
                )
            found[subfolder] = int(name[1]), name[2].strip()
    return found


def _pictures_in(folder: Path, prompt: str, caption_column: str) -> tuple[list[Picture], list[str]]:
    """The pictures, and the names of all that is neither a picture nor a caption."""
    entries = sorted(folder.iterdir())
    paths = [path for path in entries if is_picture(path)]
    captions_of = {path: _sidecars(path) for path in paths}
    known = {*paths, folder / CAPTIONS_FILE, *(file for files in captions_of.values() for file in files)}
    captions = _captions_file(folder, {path.name for path in paths}, caption_column)
    pictures = [
        check_picture(path, _caption(path, captions_of[path]) or captions.get(path.name) or prompt) for path in paths
    ]
    return pictures, [path.name for path in entries if path not in known]


def _sidecars(path: Path) -> list[Path]:
    return [path.with_suffix(suffix) for suffix in SIDECARS if path.with_suffix(suffix).is_file()]


def _caption(path: Path, sidecars: list[Path]) -> str:
    if len(sidecars) > 1:
        raise ValueError(f"{path} has two captions, {' and '.join(file.name for file in sidecars)}: remove one.")
    return _read_text(sidecars[0]).strip() if sidecars else ""


def _captions_file(folder: Path, names: set[str], column: str) -> dict[str, str]:
    """`{file name: caption}` of `metadata.jsonl`."""
    file = folder / CAPTIONS_FILE
    captions: dict[str, str] = {}
    for number, line in enumerate(_read_text(file).split("\n") if file.is_file() else [], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, caption = row["file_name"], row[column]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{file}, line {number}: expected {{"file_name": "...", "{column}": "..."}}, got {line[:200]!r}.'
            ) from error
        if name not in names:
            raise ValueError(f"{file}, line {number}: there is no picture {name!r} in this folder.")
        captions[name] = str(caption).strip()
    return captions


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"The captions in {file} are not UTF-8 text: {error}.") from error
