"""Pictures beyond the captioned world, and grids to look at."""

import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .world import COLORS, RGB, SHAPES, background, coverage, jitter_colors, paint


def composition(count: int, generator: torch.Generator) -> Tensor:
    """Up to three overlapping shapes of any size `(B, 3, 64, 64)` in [-1, 1]: subjects that no caption describes."""

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    def random_color(*size: int) -> Tensor:
        return jitter_colors(RGB[torch.randint(len(COLORS), size, generator=generator)], generator)

    pattern = torch.randint(3, (count,), generator=generator) * (uniform(count) < 0.5)
    image = background(pattern, random_color(count, 2))
    for spread, size, share in ((10, 28, 0.95), (24, 16, 0.5), (24, 16, 0.3)):
        shape = torch.randint(len(SHAPES), (count,), generator=generator)
        mask = coverage(shape, (uniform(count, 2) - 0.5) * spread, size * (0.35 + 0.65 * uniform(count)))
        image = paint(image, mask * (uniform(count) < share)[:, None, None], random_color(count))
    return image * 2 - 1


def to_tensor(image: Image.Image) -> Tensor:
    """A PIL image as `(3, H, W)` in [-1, 1]."""
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).float().div(127.5).sub(1)


def to_images(pictures: Tensor) -> list[Image.Image]:
    """`(B, 3, H, W)` in [-1, 1] as PIL images."""
    array = pictures.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def save_picture_grid(pictures: list[Image.Image], labels: list[str], file: Path, columns: int = 8) -> None:
    """Labelled pictures as one PNG, twice enlarged."""
    side, header = 2 * pictures[0].width, 36 if any(labels) else 0
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + header)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = index % columns * side, index // columns * (side + header)
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y + header))
        lines = "\n".join(textwrap.wrap(label, side // 5)[:3])
        draw.text((x + 2, y + 1), lines, fill="black", font_size=9, spacing=2)
    sheet.save(file)
