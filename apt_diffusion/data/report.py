"""What a data set looks like to the trainer, as text: its pictures, their sizes and captions, and what is left out."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from .folders import Scan
from .pictures import Picture
from .reading import PictureFile

SHOWN_CAPTION = 60  # characters of a caption
COLUMNS = ("picture", "pixels", "trained at", "per epoch", "caption from", "caption")


def report(scan: Scan, title: str, trained_at: Callable[[Picture], tuple[int, int]], notes: Sequence[str] = ()) -> str:
    """A table of a folder's pictures, then totals, what is left out and what stops a run, each with its reason.

    Args:
        scan: of the folder.
        title: what the pictures show.
        trained_at: height and width at which a picture is trained.
        notes: further lines.
    """
    counts = Counter(scan.pictures)
    rows = [_row(scan, picture, count, trained_at(picture)) for picture, count in counts.items()]
    lines = [f"{title}: {scan.folder}", *_aligned([COLUMNS, *rows])] if rows else [f"{title}: {scan.folder}"]
    lines += [_totals(scan, counts)] if rows else []
    masked = [picture for picture in counts if picture.mask is not None]
    if masked:
        own = sum(picture.mask == picture.path for picture in masked)
        whole = len(counts) - len(masked)
        lines.append(f"Masks: {len(masked) - own} files, {own} by transparency; {whole} pictures count as a whole.")
    sizes = Counter(trained_at(picture) for picture in counts)
    if len(sizes) > 1:
        named = ", ".join(f"{width} x {height}: {count}" for (height, width), count in sorted(sizes.items()))
        lines.append(f"Pictures by bucket: {named}.")
    enlarged = sum(_enlarged(picture, trained_at(picture)) for picture in counts)
    lines += [f"Smaller than they are trained at, so that they are enlarged: {enlarged}."] if enlarged else []
    lines += [f"Left out: {name} ({reason})" for name, reason in sorted(scan.left_out.items())]
    lines += [f"Stops the run: {problem}" for problem in scan.problems]
    return "\n".join([*lines, *notes])


def _row(scan: Scan, picture: Picture, count: int, shape: tuple[int, int]) -> tuple[str, ...]:
    caption = " ".join(picture.prompt.split())
    if len(caption) > SHOWN_CAPTION:
        caption = caption[: SHOWN_CAPTION - 3] + "..."
    name = _within(scan.folder, picture.path)
    sizes = f"{picture.width} x {picture.height}", f"{shape[1]} x {shape[0]}"
    return name, *sizes, str(count), scan.captions_from[picture.path], caption


def _within(folder: Path, path: PictureFile) -> str:
    if not isinstance(path, Path):
        return path.name
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _enlarged(picture: Picture, shape: tuple[int, int]) -> bool:
    return picture.height < shape[0] or picture.width < shape[1]


def _totals(scan: Scan, counts: Counter[Picture]) -> str:
    sources = Counter(scan.captions_from[picture.path] for picture in counts)
    files = sum(count for source, count in sources.items() if Path(source).suffix in (".txt", ".caption"))
    others = {source: count for source, count in sources.items() if Path(source).suffix not in (".txt", ".caption")}
    captions = ({"text files": files} if files else {}) | others
    stated = ", ".join(f"{count} from {source}" for source, count in captions.items())
    return f"{len(counts)} pictures, {sum(counts.values())} per epoch. Captions: {stated}."


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines whose columns begin below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
