"""What a run's data was, in short: a resumed run is exact only with the same pictures, masks and captions."""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from .pictures import Picture
from .reading import PictureFile

# By the name of a picture: hashes of its file, its mask and its caption; empty where it has none of its own.
# Where several folders hold it, those of the last, and a hash of all.
Prints = dict[str, list[str]]
KINDS = ("content", "mask", "caption", "mask or caption in another folder")
LENGTH = 16  # digits of a hash


def fingerprint(pictures: Iterable[Picture], roots: Sequence[Path], prompts: Collection[str | None]) -> Prints:
    """The prints of pictures, each once.

    Args:
        pictures: any, also repeated.
        roots: the folders that they are in; names are within them, so that the data may move to another place.
        prompts: captions that come from the command line, whose changes are not those of the data.
    """
    found: Prints = {}
    for picture in dict.fromkeys(pictures):
        own_mask = picture.mask not in (None, picture.path)
        caption = "" if picture.caption in prompts else _hash(picture.caption.encode())
        mask = hash_file(picture.mask) if picture.mask is not None and own_mask else ""
        name, prints = _name(picture.path, roots), [hash_file(picture.path), mask, caption]
        before = found.get(name)
        found[name] = prints if before is None else [*prints, _hash(" ".join([*before, *prints]).encode())]
    return found


def hash_file(file: PictureFile) -> str:
    """A hash of a file's or row's content."""
    if not isinstance(file, Path):
        return _hash(file.content())
    return _hash(file.read_bytes())


def changes(before: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]]) -> list[str]:
    """What differs, a phrase for each picture, by name."""
    found = []
    for name in sorted({*before, *now}):
        if name not in now:
            found.append(f"{name} is gone")
        elif name not in before:
            found.append(f"{name} is new")
        else:
            other = [kind for kind, a, b in zip(KINDS, before[name], now[name], strict=False) if a != b]
            found += [f"{name} has another {' and another '.join(other)}"] if other else []
    return found


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:LENGTH]


def _name(path: PictureFile, roots: Sequence[Path]) -> str:
    if not isinstance(path, Path):
        return path.name
    for number, root in enumerate(roots, start=1):
        if path.is_relative_to(root):
            place = path.relative_to(root).as_posix()
            return place if len(roots) == 1 else f"{place} of folder {number} ({root.name})"
    return path.name
