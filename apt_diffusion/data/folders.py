"""Reads image folders in the common layouts: finds the pictures and the caption of each."""

import dataclasses
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from .captions import UNCHANGED, CaptionOptions
from .masks import check_mask, mask_files, masks_in
from .pictures import Picture
from .reading import PictureFile, is_picture, picture_size

logger = logging.getLogger(__name__)

CAPTIONS_FILE = "metadata.jsonl"
SIDECARS = (".txt", ".caption")
REPEATED = re.compile(r"(\d+)_(.+)")  # kohya's name of a folder
NO_OTHERS: Mapping[Path, str] = MappingProxyType({})
MAX_REPEATS = 10_000
SUBFOLDER = "a subfolder with pictures, which --recursive reads"


@dataclass
class Scan:
    """What a folder holds.

    Attributes:
        folder: the one that was read.
        pictures: those that can be trained on, each as often as an epoch shows it.
        captions_from: where the caption of each picture stands.
        left_out: files and folders that are not used, by their path within the folder, and why.
        problems: sentences on what stops a run; each names a file.
    """

    folder: Path
    pictures: list[Picture] = field(default_factory=list)
    captions_from: dict[PictureFile, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def checked(self) -> list[Picture]:
        """The pictures, after one warning that names what is left out; `ValueError` where something stops the run."""
        if self.left_out:
            hint = " (--recursive reads subfolders)" if SUBFOLDER in self.left_out.values() else ""
            logger.warning(
                "Ignored in %s, as they are no pictures%s: %s", self.folder, hint, ", ".join(sorted(self.left_out))
            )
        if self.problems:
            others = len(self.problems) - 1
            raise ValueError(self.problems[0] + (f" (And {others} more: --check_data lists all.)" if others else ""))
        return self.pictures


@dataclass(frozen=True)
class FolderOptions:
    """How a folder is read.

    Args:
        caption_column: key of the caption in `metadata.jsonl`.
        recursive: read all subfolders.
        prompt_from: what gave the prompt of pictures without a caption, for reports.
        captions: what becomes of captions.
        masked: look for masks, see `masks`.
        mask_folder: where masks are, by the names of their pictures; also beside the pictures.
        repeats: how often an epoch shows each picture.
        weight: what its error is multiplied by.
        sidecars: endings of the files beside pictures that hold their captions.
        of_class: whether the pictures show the class.
    """

    caption_column: str = "text"
    recursive: bool = False
    prompt_from: str = "prompt"
    captions: CaptionOptions = UNCHANGED
    masked: bool = False
    mask_folder: Path | None = None
    repeats: int = 1
    weight: float = 1.0
    sidecars: tuple[str, ...] = SIDECARS
    of_class: bool = False


AS_IT_IS = FolderOptions()


@dataclass(frozen=True)
class _Place:
    """One of the folders that are read."""

    path: Path
    repeats: int
    prompt: str
    prompt_from: str


def find_pictures(
    folder: str | Path, prompt: str, caption_column: str = "text", recursive: bool = False
) -> list[Picture]:
    """All pictures of a folder, sorted by name, each read once to be sure that it can be: see `scan_pictures`.

    Raises:
        ValueError: for a folder that is missing or holds no picture, a picture that cannot be read, or captions that
            make no sense; the message names the file.
    """
    return scan_pictures(folder, prompt, FolderOptions(caption_column, recursive)).checked()


def scan_pictures(
    folder: str | Path, prompt: str, options: FolderOptions = AS_IT_IS, others: Mapping[Path, str] = NO_OTHERS
) -> Scan:
    """What a folder holds, and everything that is wrong with it.

    Captions come from `<name>.txt` or `<name>.caption` next to a picture, else from `metadata.jsonl`, else they are
    `prompt`. In a folder of kohya's layout, the subfolder `10_sks dog` holds pictures of "sks dog", each of which is
    there ten times. Other subfolders are read where the options say so, those of a repeated folder with its repeats;
    hidden ones and links to folders never are. A `metadata.jsonl` may name pictures in subfolders that are read.

    Args:
        folder: where the pictures are.
        prompt: of pictures without a caption.
        options: how it is read.
        others: folders that hold something else, as the run's class or masks, and what; they are not read.
    """
    scan = Scan(Path(folder))
    others = {path.resolve(): what for path, what in others.items()}
    if options.mask_folder is not None:
        others[options.mask_folder.resolve()] = "the folder of masks"
    if not scan.folder.is_dir():
        scan.problems.append(f"There is no folder {folder} with pictures.")
        return scan
    places = list(_places(_Place(scan.folder, 1, prompt, options.prompt_from), options.recursive, scan, others))
    read = {place.path for place in places}
    masks_of: dict[Path, list[Path]] = {}
    paths_in = {place: _pictures_in(place, read, options, masks_of, scan, others) for place in places}
    if options.masked and options.mask_folder is not None:
        _add_masks(options.mask_folder, paths_in, masks_of, scan)
    captions = _listed_captions(paths_in, options.caption_column, scan)
    for place, paths in paths_in.items():
        found = []
        for path in paths:
            try:
                own = _own_caption(path, options.sidecars) or captions.get(path)
                caption, source = own or (place.prompt, place.prompt_from)
                options.captions.check(caption, f"{source} of {path}", options.of_class)
                picture = Picture(path, caption, *picture_size(path), options.captions, weight=options.weight)
                if options.masked:
                    picture = dataclasses.replace(picture, mask=check_mask(picture, masks_of.get(path, [])))
            except ValueError as error:
                scan.problems.append(str(error))
                continue
            scan.captions_from[path] = source
            found.append(picture)
        scan.pictures += found * (place.repeats * options.repeats)
    if not scan.pictures and not scan.problems:
        hint = " Its subfolders have some: --recursive reads them." if SUBFOLDER in scan.left_out.values() else ""
        scan.problems.append(f"There are no pictures in {folder} (JPEG, PNG, WebP, AVIF, TIFF, ...).{hint}")
    return scan


def has_pictures(folder: str | Path, recursive: bool = False, others: Mapping[Path, str] = NO_OTHERS) -> bool:
    """Whether `scan_pictures` would find any."""
    folder = Path(folder)
    top, others = _Place(folder, 1, "", ""), {path.resolve(): what for path, what in others.items()}
    places = _places(top, recursive, Scan(folder), others) if folder.is_dir() else ()
    return any(_holds_pictures(place.path) for place in places)


def check_picture(path: Path, prompt: str) -> Picture:
    """The picture, read once; `ValueError` with its name where it cannot be."""
    return Picture(path, prompt, *picture_size(path))


def _holds_pictures(folder: Path) -> bool:
    return any(map(is_picture, folder.iterdir()))


def _places(place: _Place, recursive: bool, scan: Scan, others: Collection[Path]) -> Iterator[_Place]:
    """A folder, then those of its subfolders that are read, by name."""
    yield place
    for subfolder in sorted(path for path in place.path.iterdir() if path.is_dir()):
        name = REPEATED.fullmatch(subfolder.name)
        if subfolder.resolve() in others:
            continue
        if name and _holds_pictures(subfolder):
            try:
                child = _Place(subfolder, _repeats(subfolder, int(name[1])), name[2].strip(), "the folder's name")
            except ValueError as error:
                scan.problems.append(str(error))
                continue
        elif recursive and subfolder.name[0] != "." and not subfolder.is_symlink():
            child = dataclasses.replace(place, path=subfolder)
        else:
            continue
        if recursive and not subfolder.is_symlink():  # a link may lead back up
            yield from _places(child, recursive, scan, others)
        else:
            yield child


def _repeats(folder: Path, number: int) -> int:
    if not 1 <= number <= MAX_REPEATS:
        raise ValueError(f"{folder} has {number} repeats in its name: expected a number from 1 to {MAX_REPEATS}.")
    return number


def _pictures_in(
    place: _Place,
    read: set[Path],
    options: FolderOptions,
    masks_of: dict[Path, list[Path]],
    scan: Scan,
    others: Mapping[Path, str],
) -> list[Path]:
    """The pictures of one folder; notes their masks, and all that is not used."""
    entries = sorted(place.path.iterdir())
    paths = [path for path in entries if is_picture(path)]
    masks_of |= (found := mask_files(paths))
    is_mask_of = {mask: picture for picture, masks in found.items() for mask in masks}
    paths = [path for path in paths if path not in is_mask_of]
    if options.masked:
        read = {*read, *is_mask_of}
    captions = {file for path in paths for file in _sidecars(path, SIDECARS)}
    used = {file for file in captions if file.suffix in options.sidecars}
    known = {*paths, *read, place.path / CAPTIONS_FILE, *used}
    for path in entries:
        if path not in known:
            if path in is_mask_of:
                reason = f"the mask of {is_mask_of[path].name}, for --masked_loss"
            elif path in captions:
                reason = f"a caption, where {options.sidecars[0]} files are read"
            else:
                reason = _reason(path, others)
            scan.left_out[path.relative_to(scan.folder).as_posix()] = reason
    return paths


def _add_masks(folder: Path, paths_in: dict[_Place, list[Path]], masks_of: dict[Path, list[Path]], scan: Scan) -> None:
    """Notes the masks in a folder of masks, which has the subfolders that the pictures have."""
    if not folder.is_dir():
        scan.problems.append(f"There is no folder {folder} with masks.")
    for place, paths in paths_in.items():
        found, unused = masks_in(folder / place.path.relative_to(scan.folder), paths)
        for path, masks in found.items():
            masks_of[path] = [*masks_of.get(path, []), *masks]
        scan.left_out |= {str(path): "a mask without a picture" for path in unused}


def _reason(path: Path, others: Mapping[Path, str]) -> str:
    if path.name[0] == ".":
        return "hidden"
    if path.is_dir():
        if path.resolve() in others:
            return others[path.resolve()]
        if path.is_symlink():
            return "a link to a folder"
        if REPEATED.fullmatch(path.name) and _holds_pictures(path):
            return "a folder with a number of repeats that cannot be"  # else it were read
        return SUBFOLDER if has_pictures(path, True, others) else "a folder without pictures"
    return "a caption without a picture" if path.suffix in SIDECARS else "no picture"


def _sidecars(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return [path.with_suffix(suffix) for suffix in suffixes if path.with_suffix(suffix).is_file()]


def _own_caption(path: Path, suffixes: tuple[str, ...]) -> tuple[str, str] | None:
    """The text beside a picture and its file's name; `None` where there is none, or an empty one."""
    sidecars = _sidecars(path, suffixes)
    if len(sidecars) > 1:
        raise ValueError(f"{path} has two captions, {' and '.join(file.name for file in sidecars)}: remove one.")
    text = _read_text(sidecars[0]).strip() if sidecars else ""
    return (text, sidecars[0].name) if text else None


def _listed_captions(paths_in: dict[_Place, list[Path]], column: str, scan: Scan) -> dict[Path, tuple[str, str]]:
    """`{picture: (caption, file)}` of every `metadata.jsonl`; one nearer to a picture says more than one above it."""
    every = {path for paths in paths_in.values() for path in paths}
    captions: dict[Path, tuple[str, str]] = {}
    for place in paths_in:  # a folder stands before its subfolders
        file = place.path / CAPTIONS_FILE
        try:
            lines = _read_text(file).split("\n") if file.is_file() else []
        except ValueError as error:
            scan.problems.append(str(error))
            continue
        of_file: dict[Path, str] = {}
        for number, line in enumerate(lines, start=1):
            try:
                path, caption = _row(file, number, line, column, every) if line.strip() else (file, "")
                before = of_file.get(path) or caption
                of_file[path] = before
                if caption and caption != before:
                    raise ValueError(f"{file}, line {number}: {path.name} has another caption above: remove one.")
            except ValueError as error:
                scan.problems.append(str(error))
        captions |= {path: (caption, CAPTIONS_FILE) for path, caption in of_file.items() if caption}
    return captions


def _row(file: Path, number: int, line: str, column: str, every: set[Path]) -> tuple[Path, str]:
    """Picture and caption of one line of `metadata.jsonl`; no caption where it is null."""
    try:
        row = json.loads(line)
        name, caption = row["file_name"], row[column]
        if not isinstance(name, str) or not isinstance(caption, str | None):
            raise TypeError("texts were expected")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        hint = "" if f'"{column}"' in line else " (--caption_column names another key)"
        raise ValueError(
            f'{file}, line {number}: expected {{"file_name": "...", "{column}": "..."}}{hint}, got {line[:200]!r}.'
        ) from error
    path = file.parent / name
    if path not in every or file.parent not in path.parents:
        below = " Pictures in subfolders are read with --recursive." if "/" in name else ""
        raise ValueError(f"{file}, line {number}: there is no picture {name!r} in this folder.{below}")
    return path, (caption or "").strip()


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"The captions in {file} are not UTF-8 text ({error}): save them as UTF-8.") from error
