"""Pictures of the drawn world, for visitors who have none at hand. Each function writes them to `folder` once."""

import contextlib
from pathlib import Path

import torch

from ..io.atomic import new_folder, replacing
from ..miniature.pictures import to_images
from ..miniature.tasks.classes import class_name, draw_classes
from ..miniature.tasks.draw import CHUNK, drawn_chunks
from ..miniature.tasks.questions import questions_of
from .embedded import Embedded

COUNT = 4
CLASSES_SHOWN = (0, 1, 2, 9, 10, 11)  # two things, each plain, striped and checkered
CLASS_LABELS = [class_name(label) for label in CLASSES_SHOWN]


def subject_pictures(embedded: Embedded, name: str, folder: Path) -> list[Path]:
    """Pictures of a subject, to train on."""
    folder = folder / name
    try:
        with contextlib.ExitStack() as stack:
            if not folder.is_dir():
                embedded.save(name, stack.enter_context(new_folder(folder)))
    except OSError:
        if not folder.is_dir():  # else another visitor was faster
            raise
    return sorted(folder.glob("*.png"))


def question_pictures(folder: Path) -> list[tuple[Path, str]]:
    """Pictures, and a question about each."""
    pictures, drawn, rng = next(drawn_chunks("vqa", "val", CHUNK, 0))
    questions = [questions_of(picture, rng, 1)[0].text for picture in pictures[:COUNT]]
    return list(zip(_saved(drawn[:COUNT], folder / "questions"), questions, strict=True))


def class_pictures(folder: Path) -> list[Path]:
    """A picture of each of `CLASS_LABELS`."""
    labels = torch.tensor(CLASSES_SHOWN)
    return _saved(to_images(draw_classes(labels, torch.Generator().manual_seed(0))), folder / "classes")


def _saved(images: list, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{index}.png" for index in range(1, len(images) + 1)]
    for image, file in zip(images, files, strict=True):
        with replacing(file) as unfinished:  # another visitor may be reading it
            image.save(unfinished)
    return files
