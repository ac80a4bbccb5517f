"""Sample images as one labelled PNG."""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..io.atomic import replacing

_MARGIN = 8
_SMALLEST_CELL = 192  # small pictures are enlarged, so that their labels fit and people can see them


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
