"""Sample images as one labelled PNG: a grid of equal ones, and a sheet of those of a whole run."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..io.atomic import replacing

_MARGIN = 8
_SMALLEST_CELL = 192  # small pictures are enlarged, so that their labels fit and people can see them
_LARGEST_CELL = 384  # pixels of a picture's long side on a sheet
_WIDEST_SHEET = 8192


def save_grid(images: list[Image.Image], labels: list[str], title: str, path: str | Path) -> Path:
    """Writes the images in rows of at most four, a label under each and a title above."""
    scale = max(1, -(-_SMALLEST_CELL // images[0].width))
    cells = [image.convert("RGB").resize((image.width * scale, image.height * scale), 0) for image in images]
    columns = min(4, len(cells))
    rows = -(-len(cells) // columns)
    font = ImageFont.load_default(14)
    cell_width, cell_height = cells[0].width + _MARGIN, cells[0].height + 20 + _MARGIN
    width = columns * cell_width + _MARGIN
    title_lines = textwrap.wrap(title, max(20, width // 8))
    top = 18 * len(title_lines) + 2 * _MARGIN
    grid = Image.new("RGB", (width, top + rows * cell_height), "white")
    draw = ImageDraw.Draw(grid)
    draw.multiline_text((_MARGIN, _MARGIN), "\n".join(title_lines), fill="black", font=font)
    for index, (cell, label) in enumerate(zip(cells, labels, strict=True)):
        left, upper = _MARGIN + index % columns * cell_width, top + index // columns * cell_height
        grid.paste(cell, (left, upper))
        draw.text((left, upper + cell.height + 2), label, fill="dimgray", font=font)
    path = Path(path)
    with replacing(path) as temporary:  # whoever watches the folder sees whole pictures only
        grid.save(temporary, format="PNG")
    return path


def save_sheet(rows: Sequence[tuple[str, Sequence[Path | None]]], columns: Sequence[str], path: str | Path) -> Path:
    """Writes pictures of unequal sizes as a table; each keeps its shape.

    Args:
        rows: what a row shows, and its pictures, one for each column; `None` leaves a place empty.
        columns: what stands above each.
        path: of the sheet.
    """
    side = max(1, min(_LARGEST_CELL, _WIDEST_SHEET // max(1, len(columns)) - _MARGIN))
    cells = [[None if picture is None else _cell(picture, side) for picture in pictures] for _, pictures in rows]
    sizes = [[(0, 0) if cell is None else cell.size for cell in row] for row in cells]
    widths = [max((row[index][0] for row in sizes), default=0) for index in range(len(columns))]
    heights = [max((height for _, height in row), default=0) for row in sizes]
    total = sum(width + _MARGIN for width in widths) + _MARGIN
    texts = [textwrap.wrap(text, max(20, total // 8)) for text, _ in rows]
    font, line = ImageFont.load_default(14), 18
    height = line + 2 * _MARGIN + sum(line * len(text) for text in texts) + sum(one + 2 * _MARGIN for one in heights)
    sheet = Image.new("RGB", (total, height), "white")
    draw = ImageDraw.Draw(sheet)
    lefts = [_MARGIN + sum(width + _MARGIN for width in widths[:index]) for index in range(len(columns))]
    for left, label in zip(lefts, columns, strict=True):
        draw.text((left, _MARGIN), label, fill="dimgray", font=font)
    upper = line + 2 * _MARGIN
    for text, row, tallest in zip(texts, cells, heights, strict=True):
        draw.multiline_text((_MARGIN, upper), "\n".join(text), fill="black", font=font)
        upper += line * len(text) + _MARGIN
        for left, cell in zip(lefts, row, strict=True):
            if cell is not None:
                sheet.paste(cell, (left, upper))
        upper += tallest + _MARGIN
    path = Path(path)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def _cell(picture: Path, side: int) -> Image.Image:
    """A picture, enlarged by a whole factor or made smaller so that its long side has at most `side` pixels."""
    with Image.open(picture) as opened:
        image = opened.convert("RGB")
    longest = max(image.size)
    if longest > side:
        width, height = (max(1, round(length * side / longest)) for length in image.size)
        return image.resize((width, height))
    scale = max(1, min(side, _SMALLEST_CELL) // longest)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
