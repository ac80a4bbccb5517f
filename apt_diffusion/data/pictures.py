"""Crops of training pictures: chooses the crop and returns its pixels."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .captions import UNCHANGED, CaptionOptions
from .reading import PictureFile

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Picture:
    """A readable picture: where it is, what it shows, and its size as a viewer shows it (EXIF rotation done).

    `mask` is the file that says what counts in the loss, the picture itself for its transparency; see `masks`.
    `weight` is what its error is multiplied by.
    """

    path: PictureFile
    caption: str
    width: int
    height: int
    caption_options: CaptionOptions = UNCHANGED
    mask: PictureFile | None = None
    weight: float = 1.0

    @property
    def prompt(self) -> str:
        """The caption between its prefix and suffix."""
        return self.caption_options.whole(self.caption)

    @property
    def longest_prompts(self) -> list[str]:
        """One for each line among which samples choose."""
        return self.caption_options.longest(self.caption)


@dataclass(frozen=True, order=True)
class View:
    """A rectangle of a picture that was scaled until it just covers it, perhaps mirrored. A square has no `height`."""

    path: PictureFile
    width: int
    left: int = 0
    top: int = 0
    flipped: bool = False
    height: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "height", self.height or self.width)


def cut(image: Image.Image, view: View, interpolation: str = "lanczos") -> Tensor:
    """The pixels of a view of a picture, `(3, height, width)` in [-1, 1].

    It is cut before it is scaled: the rest of a long picture costs nothing.
    """
    part = image.resize((view.width, view.height), INTERPOLATIONS[interpolation], box=crop_box(image, view))
    if view.flipped:
        part = ImageOps.mirror(part)
    pixels = torch.from_numpy(np.array(part))  # (H, W, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def crop_box(image: Image.Image, view: View) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a view, in pixels of its picture before it is scaled."""
    width, height = scaled_size(*image.size, view.width, view.height)
    across, down = image.width / width, image.height / height  # pixels of the picture per pixel of the view
    right, bottom = (view.left + view.width) * across, (view.top + view.height) * down
    return view.left * across, view.top * down, min(right, image.width), min(bottom, image.height)  # rounding


def choose_view(
    picture: Picture,
    size: int | tuple[int, int],
    stride: int,
    center_crop: bool,
    random_flip: bool,
    draws: tuple[float, float],
) -> View:
    """The view that two uniform draws choose: a square, or a rectangle of `(height, width)`.

    Random cuts start at places spread evenly over the side that is too long, both ends included, at most `stride`
    pixels (one latent cell) apart: few enough that each can be encoded once and kept.
    """
    down, across = (size, size) if isinstance(size, int) else size
    width, height = scaled_size(picture.width, picture.height, across, down)
    slack = max(width - across, height - down)
    places = math.ceil(slack / stride) + 1
    offset = round(slack / 2) if center_crop else round(int(draws[0] * places) * slack / max(places - 1, 1))
    flipped = random_flip and draws[1] < 0.5
    left, top = offset if width > across else 0, offset if height > down else 0
    return View(picture.path, across, left, top, flipped, down)


def time_ids(picture: Picture, view: View) -> tuple[int, int, int, int, int, int]:
    """SDXL's size conditioning for a view (arXiv 2307.01952, section 2.2), pairs of vertical and horizontal pixels.

    They are the picture's size, where the view begins in the resized (and mirrored) picture, and the view's size.
    """
    width, _ = scaled_size(picture.width, picture.height, view.width, view.height)
    left = width - view.width - view.left if view.flipped else view.left
    return picture.height, picture.width, view.top, left, view.height, view.width


def scaled_size(width: int, height: int, across: int, down: int | None = None) -> tuple[int, int]:
    """A picture's width and height once it is scaled until it just covers `across` x `down`, a square if `None`."""
    down = across if down is None else down
    if width * down >= height * across:  # the picture is the wider one
        return max(across, width * down // height), down
    return across, max(down, height * across // width)
