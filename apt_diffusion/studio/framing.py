"""Previews the crops that the trainer will use, computed by the trainer's own code."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.dreambooth import DreamBoothData, Framing, View
from ..data.folders import find_pictures
from ..data.reading import PictureFile, read_picture
from .uploads import keep_pictures

THUMBNAIL = 256  # pixels of the long side


@dataclass(frozen=True)
class Seen:
    """A picture and the square of it that is trained on first.

    Args:
        whole: all of it, small.
        square: the pixels of the trainer.
        place: of the square on the long side, from 0 (left or top) to 1; `None` for a square picture.
    """

    whole: Image.Image
    square: Image.Image
    place: float | None


def as_trained(paths: Sequence[str | Path], size: int, stride: int, class_count: int, seed: int = 0) -> list[Seen]:
    """Each picture as it is first seen in a training with this seed; later ones may be cut elsewhere.

    Args:
        paths: uploads.
        size: of the training squares.
        stride: pixels per latent cell.
        class_count: pictures of the class, which are seen in turn with these.
        seed: of the training.

    Raises:
        ValueError: as `keep_pictures`.
    """
    with tempfile.TemporaryDirectory() as folder:
        keep_pictures(paths, [], Path(folder))
        instance = find_pictures(folder, "")
        framing = Framing(size, stride=stride)
        data = DreamBoothData(instance, instance[:1] * class_count, framing, (1, 1, 1), seed)
        views: dict[PictureFile, View] = {}
        for position in range(data.epoch_length):
            view = data.views_at(position)[0]
            views.setdefault(view.path, view)
        pixels = data.pixels(list(views.values()))
        seen = []
        for picture in instance:
            view = views[picture.path]
            slack = max(picture.width, picture.height) * size // min(picture.width, picture.height) - size
            whole = read_picture(picture.path)
            whole.thumbnail((THUMBNAIL, THUMBNAIL))
            place = (view.left + view.top) / slack if slack > 0 else None
            seen.append(Seen(whole, _to_image(pixels[view].numpy()), place))
        return seen


def _to_image(pixels: np.ndarray) -> Image.Image:
    """`(3, size, size)` in [-1, 1]."""
    return Image.fromarray(((pixels.transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8))
