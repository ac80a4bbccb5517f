"""Few-shot classification: textured things, in classes that a zero-shot model recognises in part.

Pre-training draws stripes and checks on backgrounds only; here the thing itself has them. Twelve base classes and
twelve new ones share the textures, not the colours.
"""

import torch
from torch import Tensor

from ..world import COLORS, RGB, SHAPES, SIZE, background, coverage, jitter_colors, paint, pixel_grid

TEXTURES = ("", "striped", "checkered")
BASE = (("red", "circle"), ("red", "heart"), ("blue", "circle"), ("blue", "star"))
NEW = (("green", "star"), ("green", "square"), ("yellow", "moon"), ("yellow", "square"))
CLASSES = tuple((texture, color, shape) for color, shape in (*BASE, *NEW) for texture in TEXTURES)
NUM_BASE = len(BASE) * len(TEXTURES)
TEXTURE_TILE = 8  # pixels
DARK = 0.4  # of the thing's colour, for every other stripe


def class_name(label: int) -> str:
    """`red circle`, `striped red circle`, `checkered red circle`, ...; labels below `NUM_BASE` are base classes."""
    return " ".join(filter(None, CLASSES[label]))


def draw_classes(labels: Tensor, generator: torch.Generator) -> Tensor:
    """`(B, 3, 64, 64)` in [-1, 1] of labels `(B,)`; size, place and background vary freely."""
    count = len(labels)
    texture, color, shape = (
        torch.tensor([names.index(CLASSES[label][part]) for label in labels.tolist()])
        for part, names in ((0, TEXTURES), (1, COLORS), (2, SHAPES))
    )
    # Backgrounds in any two other colours.
    others = torch.rand(count, len(COLORS), generator=generator).scatter(1, color[:, None], -1).argsort(1)
    ground = others.flip(1)[:, :2]
    pattern = torch.randint(3, (count,), generator=generator) * (torch.rand(count, generator=generator) < 0.5)
    image = background(pattern, jitter_colors(RGB[ground], generator))
    center = (torch.rand(count, 2, generator=generator) * 2 - 1) * 5
    radius = 17 + 10 * torch.rand(count, generator=generator)
    mask = coverage(shape, center, radius)
    rgb = jitter_colors(RGB[color], generator)
    image = paint(image, mask, rgb)
    return paint(image, mask * texture_mask(texture), rgb * DARK) * 2 - 1


def texture_mask(texture: Tensor) -> Tensor:
    """`(B, H, W)`, 1 where the texture is dark."""
    x, y = pixel_grid()
    columns, rows = (((axis + SIZE / 2) // TEXTURE_TILE) % 2 for axis in (x, y))
    return torch.stack([torch.zeros_like(columns), columns, (columns + rows) % 2])[texture]
