"""The one reader of pictures, for trainers, data sets and the studio: whatever PIL can read, as upright RGB.

Two limits are checked in the file's header before pixels are decoded. `MAX_PIXELS` bounds the cost of decoding;
`MAX_ASPECT` bounds the cost of scaling the short side to a model's fixed size.
"""

import functools
import importlib.util
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps

MAX_PIXELS = 128_000_000  # 0.4 GB as RGB; the largest cameras have 100 million
MAX_ASPECT = 50  # the long side by the short one

# EPS is run by Ghostscript; PIL recognises the others and cannot decode them.
NOT_READ = ("EPS", "BUFR", "GRIB", "HDF5", "WMF", "MPEG", "IPTC")
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
T = TypeVar("T")


@dataclass(frozen=True)
class RowPicture:
    """An encoded picture in a row of a `datasets` data set; it stands where a path can.

    Args:
        data_set: its name.
        row, column: where it is.
        rows: the `datasets.Dataset`, whose column holds bytes, or dicts of `bytes` and `path`.
        roots: a row may name a file instead, in one of these folders.
    """

    data_set: str
    row: int
    column: str
    rows: Any = field(compare=False, repr=False)
    roots: tuple[Path, ...] = field(default=(), compare=False, repr=False)

    @property
    def name(self) -> str:
        """Its place, as a file has a name."""
        return f"row {self.row}"

    def __str__(self) -> str:
        return f"in row {self.row} of {self.data_set!r}"

    def __lt__(self, other: object) -> bool:
        """By row, behind all files."""
        return isinstance(other, RowPicture) and self._place < other._place

    def __gt__(self, other: object) -> bool:
        return not isinstance(other, RowPicture) or self._place > other._place

    @property
    def _place(self) -> tuple[str, str, int]:
        return self.data_set, self.column, self.row

    def content(self) -> bytes:
        """The encoded picture; `ValueError` for a row without one, or with a file outside of the data set."""
        value = self.rows[self.row][self.column]
        encoded = value.get("bytes") if isinstance(value, dict) else value
        if encoded is not None:
            return encoded
        name = value.get("path") if isinstance(value, dict) else None
        if name is None:
            raise ValueError("the row holds none")
        file = Path(name).resolve()
        if "://" in name:
            raise ValueError(f"it should be {name}: unpack the archive first")
        if not any(file.is_relative_to(root) for root in self.roots):
            raise ValueError(f"it should be the file {file}, which is outside of the data set")
        return file.read_bytes()


PictureFile = Path | RowPicture


@functools.cache
def readable_formats() -> dict[str, str]:
    """`{file suffix: PIL's format}` of pictures that can be read here; HEIC is among them with `pillow-heif`."""
    if importlib.util.find_spec("pillow_heif") is not None:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return {
        suffix: name
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in NOT_READ
    }


def is_picture(path: Path) -> bool:
    """Whether this is a file, not hidden, with a suffix of a picture; HEIC counts even where it cannot be read."""
    suffix = path.suffix.lower()
    return (suffix in readable_formats() or suffix in HEIF_SUFFIXES) and path.name[0] != "." and path.is_file()


def read_picture(
    path: PictureFile, max_pixels: int = MAX_PIXELS, formats: Sequence[str] | None = None, background: str = "white"
) -> Image.Image:
    """A picture as RGB, upright, on white where it is transparent; of an animation the first frame.

    Args:
        path: the file, or the row; its content decides, not its suffix.
        max_pixels: a limit of the decoded size.
        formats: PIL's names of those that are accepted; all of `readable_formats` if `None`.
        background: another colour than white.

    Raises:
        ValueError: where it cannot be read, or is too large or too narrow; the message names the file.
    """
    return _read(path, max_pixels, formats, lambda image: as_rgb(image, background))


def picture_size(path: PictureFile) -> tuple[int, int]:
    """Width and height of a picture as a viewer shows it, having read the file to its end; else as `read_picture`.

    Of a JPEG an eighth of the pixels across are computed: that finds what is missing, too, in a fraction of the time.
    """
    return _read(path, MAX_PIXELS, None, _size)


def _size(image: Image.Image) -> tuple[int, int]:
    if image.format != "JPEG":
        return as_rgb(image).size
    width, height = image.size
    turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
    image.load()
    return (height, width) if turned else (width, height)


def read_alpha(path: PictureFile) -> Image.Image | None:
    """How opaque a picture is, of mode L and upright; `None` where it has no transparency. Else as `read_picture`."""
    return _read(path, MAX_PIXELS, None, _alpha)


def _alpha(image: Image.Image) -> Image.Image | None:
    image = ImageOps.exif_transpose(image)
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None


def _read(path: PictureFile, max_pixels: int, formats: Sequence[str] | None, convert: Callable[[Image.Image], T]) -> T:
    known = readable_formats()
    if isinstance(path, Path) and path.suffix.lower() in HEIF_SUFFIXES and path.suffix.lower() not in known:
        raise ValueError(f"The picture {path} is HEIC: `pip install pillow-heif`, or convert it to JPEG or PNG.")
    try:
        content = path if isinstance(path, Path) else io.BytesIO(path.content())
        with Image.open(content, formats=sorted(set(known.values())) if formats is None else list(formats)) as image:
            check_size(*image.size, max_pixels)
            return convert(image)
    except Exception as error:  # PIL's decoders raise anything from OSError to struct.error
        raise ValueError(f"The picture {path} cannot be read: {_text(error)}. Repair it or take it out.") from error


def _text(error: Exception) -> str:
    return str(error).rstrip(".")


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """`ValueError` for a picture that would take too much to decode or to scale."""
    if width * height > max_pixels:
        raise ValueError(
            f"it has {width} x {height} pixels, more than {max_pixels / 10**6:g} million: make it smaller first."
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"it has {width} x {height} pixels, a long side of more than {MAX_ASPECT} times the short one: cut it."
        )


def as_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """An opened picture as RGB, upright, on white or another colour where it is transparent.

    Raises:
        ValueError: for numbers whose range says nothing of black and white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_bytes(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def _to_bytes(grey: np.ndarray) -> np.ndarray:
    """Grey of 16 bits, or as numbers with a point, in eight bits; PIL would clip, not scale."""
    lowest, highest = float(grey.min()), float(grey.max())
    if not (lowest >= 0 and highest <= 65535):  # a NaN is neither
        raise ValueError(
            f"its values go from {lowest:g} to {highest:g}, so what is white? Save it with 8 bits, or from 0 to 1."
        )
    white = 65535
    if grey.dtype.kind == "f":
        white = next(limit for limit in (1, 255, 65535) if highest <= limit)
    return (grey.astype(np.float64) * (255 / white)).round().astype(np.uint8)
