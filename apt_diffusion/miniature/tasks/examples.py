"""One sheet with examples of every task: `python -m apt_diffusion.miniature.tasks.examples tasks.png`."""

import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image

from ..pictures import to_images
from .captions import captions_of
from .classes import CLASSES, NUM_BASE, class_name, draw_classes
from .draw import CHUNK, drawn_chunks
from .pairs import statement_with_pairs
from .questions import questions_of

COLUMNS = 4
Example = tuple[Image.Image, list[str]]


def examples() -> dict[str, list[Example]]:
    """A row per task, from its validation split: pictures and what is said or asked about them."""
    pictures, drawn, rng = next(drawn_chunks("vqa", "val", CHUNK, 0))
    asked = [questions_of(picture, rng, 3) for picture in pictures[:COLUMNS]]
    questions = [
        (image, [f"{question.text} {question.answer}" for question in three])
        for image, three in zip(drawn, asked, strict=False)
    ]
    pictures, drawn, rng = next(drawn_chunks("nlvr2", "val", CHUNK, 0))
    statements: list[Example] = []
    while len(statements) < COLUMNS:
        statement, *pairs = statement_with_pairs(pictures, rng)
        for (left, right), label in zip(pairs, (True, False), strict=True):
            statements.append((side_by_side(drawn[left], drawn[right]), [f"{statement.text}: {label}"]))
    pictures, drawn, _ = next(drawn_chunks("retrieval", "val", CHUNK, 0))
    captions = [(image, captions_of(picture)[:3]) for picture, image in zip(pictures[:COLUMNS], drawn, strict=False)]
    labels = [0, 1, 2, NUM_BASE]
    images = to_images(draw_classes(torch.tensor(labels), torch.Generator().manual_seed(1)))
    classes = [(image, [class_name(label)]) for image, label in zip(images, labels, strict=True)]
    return {"questions": questions, "pairs": statements, "captions": captions, f"{len(CLASSES)} classes": classes}


def side_by_side(left: Image.Image, right: Image.Image, gap: int = 6) -> Image.Image:
    """Two pictures as one, with a white gap of so many pixels."""
    sheet = Image.new("RGB", (left.width + gap + right.width, left.height), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + gap, 0))
    return sheet


def save_examples(file: Path) -> None:
    """Some items of every task as one picture."""
    from matplotlib.figure import Figure

    rows = examples()
    figure = Figure(figsize=(3.1 * COLUMNS, 3.1 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), COLUMNS)
    for cells, (task, row) in zip(axes, rows.items(), strict=True):
        for axis, (image, lines) in zip(cells, row, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel("\n".join(textwrap.fill(line, 46) for line in lines), fontsize=8)
        cells[0].set_ylabel(task)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)


if __name__ == "__main__":
    save_examples(Path(sys.argv[1] if len(sys.argv) > 1 else "tasks.png"))
