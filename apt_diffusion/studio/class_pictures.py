"""Class pictures for prior preservation, drawn by an embedded model a few at a time between visitors' drawings."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from ..miniature.personalise import class_captions, save_class_pictures
from .background import Watcher, in_background
from .generation import Painter, Waiting
from .turns import Who

AT_ONCE = 8
_FINISHING = threading.Lock()


def draw_class_pictures(painter: Painter, folder: Path, count: int, who: Who) -> Iterator[int | Waiting]:
    """Fills the folder, if it is not there, and yields how many pictures there are; goes on where it was stopped.

    Its words are few: pictures of many captions keep the model from forgetting, not those of one class prompt.

    Args:
        painter: draws.
        folder: appears once it is complete.
        count: of pictures.
        who: waits, anew for every few pictures.
    """
    captions = class_captions(painter.model, count)
    unfinished = folder.with_name(f"{folder.name}-unfinished")
    for first in range(0, count, AT_ONCE):
        if folder.is_dir():
            return

        def work(watcher: Watcher, first: int = first) -> None:
            turn = painter.turns.turn(
                who, AT_ONCE * painter.default_steps, lambda *ahead: watcher.emit(Waiting(*ahead))
            )
            with turn:
                if folder.is_dir() or (unfinished / f"{first:03d}.done").is_file():
                    return  # somebody else's training has drawn them meanwhile
                some = unfinished / f"{first:03d}"
                shutil.rmtree(some, ignore_errors=True)
                save_class_pictures(painter.pipe, some, captions[first : first + AT_ONCE], seed=first)
                for file in some.iterdir():
                    file.rename(unfinished / f"{first:03d}-{file.name}")
                some.rmdir()
                (unfinished / f"{first:03d}.done").touch()

        yield from in_background(work)
        yield min(first + AT_ONCE, count)
    with _FINISHING:  # trainings of several visitors come here at once
        if not folder.is_dir():
            for mark in unfinished.glob("*.done"):
                mark.unlink()
            unfinished.rename(folder)
