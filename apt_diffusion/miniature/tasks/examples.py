"""One sheet with examples of every task: `python -m apt_diffusion.miniature.tasks.examples tasks.png`."""

import sys
from pathlib import Path

import torch
from PIL import Image

from ..pictures import save_picture_grid, to_images
from .captions import captions_of
from .classes import CLASSES, class_name, draw_classes
from .draw import CHUNK, drawn_chunks
from .pairs import statement_with_pairs
from .questions import questions_of

COLUMNS = 6


def examples() -> tuple[list[Image.Image], list[str]]:
    """Two rows of questions, two of statements, one of captions, two of classes; pictures and labels."""
    images: list[Image.Image] = []
    labels: list[str] = []
    pictures, drawn, rng = next(drawn_chunks("vqa", "val", CHUNK, 0))
    for picture, image in zip(pictures[: 2 * COLUMNS], drawn, strict=False):
        images.append(image)
        labels.append("\n".join(f"{asked.text} {asked.answer}" for asked in questions_of(picture, rng, 2)))
    pictures, drawn, rng = next(drawn_chunks("nlvr2", "val", CHUNK, 0))
    for _ in range(COLUMNS // 2):
        statement, *pairs = statement_with_pairs(pictures, rng)
        for pair, label in zip(pairs, (True, False), strict=True):
            images.append(side_by_side(drawn[pair[0]], drawn[pair[1]]))
            labels.append(f"{statement.text}. {label}")
    pictures, drawn, _ = next(drawn_chunks("retrieval", "val", CHUNK, 0))
    for picture, image in zip(pictures[:COLUMNS], drawn, strict=False):
        images.append(image)
        labels.append(captions_of(picture)[1 + len(images) % 4])
    chosen = torch.arange(len(CLASSES))[: 2 * COLUMNS]
    images += to_images(draw_classes(chosen, torch.Generator().manual_seed(0)))
    labels += [class_name(label) for label in chosen.tolist()]
    return images, labels


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Both in the square of one."""
    sheet = Image.new("RGB", left.size, "white")
    half = (left.width // 2 - 1, left.height // 2 - 1)
    sheet.paste(left.resize(half), (0, left.height // 4))
    sheet.paste(right.resize(half), (left.width // 2 + 1, left.height // 4))
    return sheet


def main() -> None:
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "tasks.png")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_picture_grid(*examples(), file, columns=COLUMNS)


if __name__ == "__main__":
    main()
