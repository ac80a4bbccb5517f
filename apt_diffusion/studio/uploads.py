"""Uploaded pictures: checked before decoding, then re-encoded and stored under names that the studio chooses."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..data.reading import check_size, read_picture

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PICTURES = 30
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000  # a decoded picture of this size takes 150 MB
MIN_SIDE = 16
MAX_CAPTION = 1000  # characters


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
    check_header(name, width, height)
    try:
        return read_picture(path, MAX_PIXELS, FORMATS)
    except ValueError as error:
        raise ValueError(f"{name} is damaged: it looks like a picture, but cannot be decoded.") from error


def check_header(name: str, width: int, height: int, most: int = MAX_PIXELS) -> None:
    """`ValueError` for a picture that is not decoded: too large, too small, or far too long for its width."""
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"{name} has {width} × {height} pixels: each side must have at least {MIN_SIDE}.")
    try:
        check_size(width, height, most)
    except ValueError as error:
        raise ValueError(f"{name} cannot be used: {error}") from error


def check_count(count: int) -> None:
    """`ValueError` for too many pictures, or none."""
    if not 1 <= count <= MAX_PICTURES:
        raise ValueError(f"Give from 1 to {MAX_PICTURES} pictures, not {count}. Between 3 and 10 work best.")


def split_captions(paths: Sequence[str | Path]) -> tuple[list[str], list[str]]:
    """Uploads as `(pictures, captions)`: a `.txt` file is the caption of the picture of the same name.

    Raises:
        ValueError: for a `.txt` file without its picture, or one that is no short text.
    """
    pictures = [str(path) for path in paths if Path(path).suffix.lower() != ".txt"]
    texts = {Path(path).stem: Path(path) for path in paths if Path(path).suffix.lower() == ".txt"}
    alone = sorted(set(texts) - {Path(path).stem for path in pictures})
    if alone:
        raise ValueError(f"{shown(alone[0] + '.txt')} belongs to no picture: a caption has the name of its picture.")
    return pictures, [_caption(texts[stem]) if (stem := Path(path).stem) in texts else "" for path in pictures]


def _caption(file: Path) -> str:
    try:
        text = file.read_bytes()[: MAX_CAPTION + 1].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(file.name)} is no text in UTF-8.") from error
    if len(text) > MAX_CAPTION:
        raise ValueError(f"{shown(file.name)} is too long: a caption may have {MAX_CAPTION} characters.")
    return " ".join(text.split())


def framed(image: Image.Image, place: float | None) -> Image.Image:
    """The square of a picture at a place of its long side, from 0 (left or top) to 1; all of it for `None`."""
    if place is None:
        return image
    side = min(image.size)
    left, top = round((image.width - side) * place), round((image.height - side) * place)
    return image.crop((left, top, left + side, top + side))


def keep_pictures(
    paths: Sequence[str | Path], captions: Sequence[str], folder: Path, frames: Sequence[float | None] = ()
) -> list[Path]:
    """Writes checked pictures as `picture-01.png`, ..., with a caption in a `.txt` file beside those that have one.

    Args:
        paths: uploads.
        captions: one per picture, or fewer.
        folder: where they are kept.
        frames: the places of the squares to keep, as for `framed`; one per picture, or fewer.

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
            place = frames[number - 1] if number <= len(frames) else None
            framed(open_picture(path), place).save(
                kept[-1]
            )  # one at a time: all of them decoded may be more than the memory
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
