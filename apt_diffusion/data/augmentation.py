"""RandAugment (arXiv 1909.13719) in PIL, with the operations and ranges of ViLT's and METER's training code."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Operation = Callable[[Image.Image, float], Image.Image]


def rand_augment(
    image: Image.Image, draws: np.random.Generator, operations: int = 2, magnitude: int = 9
) -> Image.Image:
    """Applies random operations at one strength.

    Args:
        image: RGB.
        draws: decides everything.
        operations: how many, drawn with replacement.
        magnitude: 0 to 30, the place in each operation's range.
    """
    for index in draws.integers(len(OPERATIONS), size=operations):
        operation, low, high, signed = OPERATIONS[index]
        value = low + magnitude / 30 * (high - low)
        if signed and draws.random() < 0.5:
            value = -value
        image = operation(image, value)
    return image


def _affine(*matrix: Callable[[float], float] | float) -> Operation:
    def apply(image: Image.Image, value: float) -> Image.Image:
        numbers = tuple(entry(value) if callable(entry) else entry for entry in matrix)
        return image.transform(image.size, Image.Transform.AFFINE, numbers)

    return apply


def _enhance(kind: type) -> Operation:
    return lambda image, value: kind(image).enhance(value)


def _solarize_add(image: Image.Image, value: float) -> Image.Image:
    """Adds to every level, then inverts those of 128 and more."""
    added = [min(255, int(level + value)) for level in range(256)]
    return image.point([level if level < 128 else 255 - level for level in added] * 3)


def _posterize(image: Image.Image, value: float) -> Image.Image:
    return ImageOps.posterize(image, max(1, math.floor(value)))


# Operation, its range from magnitude 0 to 30, and whether it goes either way.
OPERATIONS: tuple[tuple[Operation, float, float, bool], ...] = (
    (lambda image, _: ImageOps.autocontrast(image), 0, 1, False),
    (lambda image, _: ImageOps.equalize(image), 0, 1, False),
    (lambda image, value: image.rotate(value), 0, 30, True),
    (_posterize, 0, 4, False),
    (lambda image, value: ImageOps.solarize(image, math.ceil(value)), 0, 256, False),
    (_solarize_add, 0, 110, False),
    (_enhance(ImageEnhance.Color), 0.1, 1.9, False),
    (_enhance(ImageEnhance.Contrast), 0.1, 1.9, False),
    (_enhance(ImageEnhance.Brightness), 0.1, 1.9, False),
    (_enhance(ImageEnhance.Sharpness), 0.1, 1.9, False),
    (_affine(1, lambda value: value, 0, 0, 1, 0), 0, 0.3, True),  # shear
    (_affine(1, 0, 0, lambda value: value, 1, 0), 0, 0.3, True),
    (_affine(1, 0, lambda value: value, 0, 1, 0), 0, 100, True),  # move, in pixels
    (_affine(1, 0, 0, 0, 1, lambda value: value), 0, 100, True),
)
