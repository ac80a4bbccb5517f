"""Pictures from strangers: checked before they are decoded, re-encoded, and kept under names of our own."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..data.reading import read_picture

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PICTURES = 30
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000  # a decoded picture of this size takes 150 MB
MIN_SIDE = 16


def open_picture(path: str | Path) -> Image.Image:
    """A picture as RGB, upright.

    Raises:
        ValueError: for a file that is too large, no picture, damaged, or a decompression bomb.
    """
    path = Path(path)
    name = shown(path.name)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{name} has {size / 2**20:.0f} MB; a picture may have {MAX_BYTES // 2**20} MB.")
    try:
        with Image.open(path, formats=FORMATS) as image:  # reads the header only
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has far too many pixels: at most {MAX_PIXELS // 10**6} million.") from error
    except Exception as error:  # PIL's parsers raise anything from OSError to struct.error
        raise ValueError(f"{name} is no picture that can be read here (PNG, JPEG, WebP, BMP, GIF or TIFF).") from error
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{name} has {width} × {height} pixels, more than {MAX_PIXELS // 10**6} million: make it smaller first."
        )
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"{name} has {width} × {height} pixels: each side must have at least {MIN_SIDE}.")
    try:
        return read_picture(path)
    except Exception as error:
        raise ValueError(f"{name} is damaged: it looks like a picture, but cannot be decoded.") from error


def check_count(count: int) -> None:
    """`ValueError` for too many pictures, or none."""
    if not 1 <= count <= MAX_PICTURES:
        raise ValueError(f"Give from 1 to {MAX_PICTURES} pictures, not {count}. Between 3 and 10 work best.")


def keep_pictures(paths: Sequence[str | Path], captions: Sequence[str], folder: Path) -> list[Path]:
    """Writes checked pictures as `picture-01.png`, ..., with a caption in a `.txt` file beside those that have one.

    Raises:
        ValueError: as `open_picture`, for too many pictures, or for more captions than pictures; nothing is kept then.
    """
    check_count(len(paths))
    captions = [caption.strip() for caption in captions]
    if len(captions) > len(paths):
        raise ValueError(f"There are {len(captions)} captions for {len(paths)} pictures: give one line to each.")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    kept: list[Path] = []
    try:
        for number, path in enumerate(paths, start=1):
            kept.append(folder / f"picture-{number:02d}.png")
            open_picture(path).save(kept[-1])  # one at a time: all of them decoded may be more than the memory
            if number <= len(captions) and captions[number - 1]:
                kept[-1].with_suffix(".txt").write_text(f"{captions[number - 1]}\n", encoding="utf-8")
    except BaseException:
        for file in kept:
            file.unlink(missing_ok=True)
            file.with_suffix(".txt").unlink(missing_ok=True)
        if is_new:
            folder.rmdir()
        raise
    return kept


def lines_of(text: str) -> list[str]:
    """One entry per line; empty lines at the end are none."""
    return [line.strip() for line in (text or "").rstrip().splitlines()]


def shown(name: str) -> str:
    """A file's name as it may stand in a sentence: printable and short."""
    printable = "".join(character for character in name if character.isprintable())
    return f"“{printable if len(printable) <= 40 else printable[:37] + '…'}”"
