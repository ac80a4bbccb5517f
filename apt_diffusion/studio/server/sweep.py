"""Deletes old files: bounds what the server keeps on disk by age, count and bytes."""

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bound:
    """What a folder may hold.

    Args:
        seconds: the age at which a file goes.
        count: of files; the oldest go first.
        size: bytes of all files.
    """

    seconds: float
    count: int
    size: int


def sweep(folder: Path, bound: Bound, now: float, pattern: str = "**/*") -> list[Path]:
    """Deletes the oldest files of a folder until it keeps its bound; returns them. Empty folders go, too."""
    files = []
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # gone meanwhile
            if path.is_file() and not path.is_symlink():
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
    files.sort(key=lambda entry: entry[0], reverse=True)
    kept, size, gone = 0, 0, []
    for modified, length, path in files:
        if now - modified <= bound.seconds and kept < bound.count and size + length <= bound.size:
            kept, size = kept + 1, size + length
            continue
        with contextlib.suppress(OSError):
            path.unlink()
            gone.append(path)
    for path in {path.parent for path in gone} - {folder}:
        with contextlib.suppress(OSError):  # not empty
            path.rmdir()
    return gone


def every(seconds: float, work: Callable[[], object]) -> threading.Event:
    """Does `work` in a thread, again and again, until the event that is returned is set."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(seconds):
            try:
                work()
            except Exception:  # the disk goes on being bounded
                logger.exception("Sweeping failed; it is tried again in %g s.", seconds)

    threading.Thread(target=run, daemon=True, name="studio-sweep").start()
    return ended
