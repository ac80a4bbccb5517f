"""Stores each visitor's drawn pictures on disk, bounded by age, number and bytes."""

import contextlib
import re
import secrets
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..io.atomic import replacing
from .library import VISITORS, Library
from .recipe import Settings, png_with, settings_in, telling_name
from .server.sweep import Bound, sweep

DAY = 24 * 3600
PER_VISITOR = Bound(seconds=7 * DAY, count=100, size=200 * 2**20)
OF_ALL = Bound(seconds=7 * DAY, count=20_000, size=4 * 2**30)
NAME = re.compile(r"(\d{20})-(adapted|base)-(\d{20})-[0-9a-f]{16}")


@dataclass(frozen=True)
class Drawing:
    """A picture that was drawn, on disk with its settings."""

    id: str
    file: Path

    @property
    def part(self) -> str:
        """`"adapted"`, or `"base"` for the base model's."""
        return self.id.split("-")[1]

    @property
    def batch(self) -> int:
        """What was drawn by one click has one number; 0 for the cells of a grid."""
        return int(self.id.split("-")[2])

    @property
    def settings(self) -> Settings:
        """What it was drawn with; `ValueError` for a file that is gone or damaged."""
        try:
            with Image.open(self.file, formats=["PNG"]) as picture:
                return settings_in(picture)
        except OSError as error:
            raise ValueError("This picture is not there any more.") from error

    @property
    def download_name(self) -> str:
        """A name that says what it shows."""
        return telling_name(self.settings) if self.part == "adapted" else f"base-{telling_name(self.settings)}"


class Drawings:
    """Everybody's pictures, each visitor's in a folder of their own.

    Args:
        library: knows the visitors' folders.
        per_visitor: what one visitor may keep.
        of_all: what all together may keep.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        library: Library,
        per_visitor: Bound = PER_VISITOR,
        of_all: Bound = OF_ALL,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.library = library
        self.per_visitor = per_visitor
        self.of_all = of_all
        self.clock = clock

    @staticmethod
    def new_batch(is_shown: bool = True) -> int:
        """A number for what one click draws; `is_shown` after a reload, too."""
        return time.time_ns() if is_shown else 0

    def keep(
        self, visitor: str, part: str, pictures: Sequence[Image.Image], settings: Sequence[Settings], batch: int = 0
    ) -> list[Drawing]:
        """Writes finished pictures, the last of them newest; the oldest ones go where there are too many."""
        folder = self._folder(visitor)
        folder.mkdir(parents=True, exist_ok=True)
        kept = []
        for picture, setting in zip(pictures, settings, strict=True):
            name = f"{time.time_ns():020d}-{part}-{batch:020d}-{secrets.token_hex(8)}"
            file = folder / f"{name}.png"
            with replacing(file) as unfinished:
                unfinished.write_bytes(png_with(picture, setting))
            kept.append(Drawing(name, file))
        sweep(folder, self.per_visitor, self.clock(), "*.png")
        return kept

    def of(self, visitor: str) -> list[Drawing]:
        """A visitor's pictures, the newest first."""
        files = sorted(self._folder(visitor).glob("*.png"), reverse=True)
        return [Drawing(file.stem, file) for file in files if NAME.fullmatch(file.stem)]

    def get(self, visitor: str, name: str) -> Drawing:
        """One of them; `ValueError` for any other name. Names are looked up, and never become part of a path."""
        for drawing in self.of(visitor):
            if drawing.id == name:
                return drawing
        raise ValueError("This picture is not there any more.")

    def delete(self, visitor: str, name: str) -> None:
        """Deletes one; `ValueError` where there is none."""
        self.get(visitor, name).file.unlink(missing_ok=True)

    def clear(self, visitor: str) -> int:
        """Deletes all of a visitor's pictures; says how many."""
        drawings = self.of(visitor)
        for drawing in drawings:
            drawing.file.unlink(missing_ok=True)
        return len(drawings)

    def write_zip(self, visitor: str, file: Path) -> Path:
        """All of a visitor's pictures in one file, under telling names."""
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for number, drawing in enumerate(reversed(self.of(visitor)), start=1):
                with contextlib.suppress(ValueError, FileNotFoundError):  # deleted meanwhile
                    archive.write(drawing.file, f"{number:03d}-{drawing.download_name}")
        return file

    def sweep(self) -> None:
        """Deletes what is too old or too much, of each visitor and of all together."""
        root = self.library.folder / VISITORS
        for folder in root.glob("*/drawn"):
            sweep(folder, self.per_visitor, self.clock(), "*.png")
        sweep(root, self.of_all, self.clock(), "*/drawn/*.png")

    def _folder(self, visitor: str) -> Path:
        return self.library.visitor_folder(visitor) / "drawn"
