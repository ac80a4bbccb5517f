"""Square crops for CLIP with PIL: random crops in training, centre crops in evaluation."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from .classification import Item
from .order import Purpose, entry_at, random_at
from .sources import name_of, read_source


class TrainingPictures(Dataset):
    """position -> `(picture and its label, draws)`; an epoch, whose length this has, shows each once.

    Args:
        items: to train on.
        seed: every random choice follows from it.
        augment: whether pictures are cut at random; else `draws` is `None`.
    """

    def __init__(self, items: list[Item], seed: int, augment: bool = True) -> None:
        self.items = items
        self.seed = seed
        self.augment = augment

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> tuple[Item, np.random.Generator | None]:
        item = self.items[entry_at(self.seed, position, len(self))]
        return item, random_at(self.seed, position, Purpose.SAMPLE) if self.augment else None

    def describe(self, position: int) -> str:
        """The picture at a position, for errors."""
        return name_of(self.items[entry_at(self.seed, position, len(self))][0])


class ClipPictures:
    """Collates `(picture and its label, draws)` to `pixel_values` (B, 3, S, S) and `labels` (B,).

    Args:
        image_processor: CLIP's; says S, and how pixels become numbers.
    """

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def __call__(self, samples: Sequence[tuple[Item, np.random.Generator | None]]) -> dict[str, Tensor]:
        pixels = [self.pixels(read_source(picture), draws) for (picture, _), draws in samples]
        return {"pixel_values": torch.stack(pixels), "labels": torch.tensor([label for (_, label), _ in samples])}

    def pixels(self, image: Image.Image, draws: np.random.Generator | None = None) -> Tensor:
        """`(3, S, S)`: with draws a random cut, in half of the cases mirrored; else the processor's own."""
        if draws is None:
            return self.image_processor(image, return_tensors="pt")["pixel_values"][0]
        square = random_resized_crop(image, self.image_processor.crop_size["height"], draws)
        square = ImageOps.mirror(square) if draws.random() < 0.5 else square
        done = {"do_resize": False, "do_center_crop": False}
        return self.image_processor(square, return_tensors="pt", **done)["pixel_values"][0]


def random_resized_crop(
    image: Image.Image,
    size: int,
    draws: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """A rectangle of random area and shape, as a square: torchvision's `RandomResizedCrop`, bicubic, with PIL.

    Args:
        image: any size.
        size: of the square in pixels.
        draws: where the choices come from.
        scale: the rectangle's share of the picture's area.
        ratio: its width by its height, uniform in the logarithm.
    """
    box = random_box(*image.size, draws, scale, ratio)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def random_box(
    width: int, height: int, draws: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a crop, as in torchvision: ten draws, then the largest middle box."""
    for _ in range(10):
        area = width * height * draws.uniform(*scale)
        shape = math.exp(draws.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draws.integers(width - w + 1)), int(draws.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))  # a long picture: its middle
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
