"""Masks of training pictures: white counts in the loss, black does not, grey counts in part.

The mask of `dog.jpg` is `dog-mask.png` beside it, or `dog.png` in a folder of masks (any format), of the same size;
where there is none, the transparency of the picture is its mask.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .pictures import Picture, View, crop_box
from .reading import PictureFile, is_picture, read_alpha, read_picture

ENDING = "-mask"


def mask_files(paths: Iterable[Path]) -> dict[Path, list[Path]]:
    """`{picture: its masks}` among the pictures of a folder, by their names."""
    by_stem: dict[str, list[Path]] = {}
    for path in paths:
        by_stem.setdefault(path.stem, []).append(path)
    found: dict[Path, list[Path]] = {}
    for stem, pictures in by_stem.items():
        masks = by_stem.get(stem + ENDING, []) if not _is_mask(stem, by_stem) else []
        found |= {picture: masks for picture in pictures if masks}
    return found


def masks_in(folder: Path, pictures: Iterable[Path]) -> tuple[dict[Path, list[Path]], list[Path]]:
    """`{picture: its masks}` of a folder of masks, by equal names, and the pictures there that are no mask of any.

    Args:
        folder: of masks; nothing is found where there is none.
        pictures: of one folder.
    """
    by_stem: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if is_picture(path):
            by_stem.setdefault(path.stem, []).append(path)
    found = {path: by_stem[path.stem] for path in pictures if path.stem in by_stem}
    used = {mask for masks in found.values() for mask in masks}
    return found, [path for paths in by_stem.values() for path in paths if path not in used]


def _is_mask(stem: str, stems: Iterable[str]) -> bool:
    return stem.endswith(ENDING) and stem.removesuffix(ENDING) in stems


def check_mask(picture: Picture, files: Sequence[Path]) -> PictureFile | None:
    """Where a picture's mask is: one of `files`, or the picture itself for its transparency; `None` without any.

    Raises:
        ValueError: for several masks, one of another size, or one that is black everywhere; with the file's name.
    """
    if len(files) > 1:
        raise ValueError(
            f"{picture.path} has {len(files)} masks, {' and '.join(file.name for file in files)}: remove all but one."
        )
    mask = _read_mask(picture.path, files[0]) if files else read_alpha(picture.path)
    if mask is None:
        return None
    place: PictureFile = files[0] if files else picture.path
    if mask.size != (picture.width, picture.height):
        raise ValueError(
            f"The mask {place} has {mask.width} x {mask.height} pixels, its picture {picture.path.name} has "
            f"{picture.width} x {picture.height}: make them equal."
        )
    if mask.getextrema()[1] == 0:
        what = f"The mask {place} is black" if files else f"The picture {place} is transparent"
        raise ValueError(f"{what} everywhere, so nothing of the picture would count in the loss: take it out.")
    return place


def check_any_mask(pictures: Sequence[Picture], folder: Path, masks: Path | None = None) -> None:
    """`ValueError` where there are pictures, and none has a mask.

    Args:
        pictures: of one folder or data set.
        folder: its name.
        masks: the folder of masks, if there is one.
    """
    is_folder = all(isinstance(picture.path, Path) for picture in pictures)
    if masks is not None:
        remedy = f"In {masks} the mask of dog.jpg is called dog.png, white where it counts."
    elif is_folder:
        remedy = "Put dog-mask.png beside dog.jpg, white where it counts, or make it transparent where it does not."
    else:
        remedy = "In a data set the transparency of a picture is its mask."
    if pictures and all(picture.mask is None for picture in pictures):
        raise ValueError(f"--masked_loss: no picture in {folder} has a mask. {remedy}")


def _read_mask(picture: PictureFile, place: PictureFile) -> Image.Image | None:
    """A mask of mode L; where it is transparent itself, it is black."""
    return read_alpha(picture) if place == picture else read_picture(place, background="black").convert("L")


def cut_mask(picture: Picture, view: View, stride: int) -> Tensor | None:
    """How much each latent cell of a view counts, `(1, h, w)` from 0 to 1: the mean of the mask over the cell.

    Args:
        picture: with the place of its mask; `None` comes back where it has none.
        view: the part of the picture.
        stride: pixels per latent cell.
    """
    mask = None if picture.mask is None else _read_mask(picture.path, picture.mask)
    if mask is None:
        return None
    cells = (view.width // stride, view.height // stride)
    # The mean of all pixels in a cell, and no others: a black cell stays black beside a white one.
    small = mask.convert("F").resize(cells, Image.Resampling.BOX, box=crop_box(mask, view))
    weights = torch.from_numpy(np.array(ImageOps.mirror(small) if view.flipped else small))[None] / 255
    return weights.clamp(0, 1)


class Masks:
    """`cut_mask` of views, each made once.

    Args:
        stride: pixels per latent cell.
    """

    def __init__(self, stride: int) -> None:
        self.stride = stride
        # Two folders may have the same picture with masks of their own.
        self._made: dict[tuple[PictureFile, View], Tensor] = {}

    def __call__(self, picture: Picture, view: View) -> Tensor | None:
        """`(1, h, w)`, or `None` where the picture has no mask."""
        if picture.mask is None:
            return None
        key = picture.mask, view
        if key not in self._made:
            mask = cut_mask(picture, view, self.stride)
            assert mask is not None  # the picture has one
            self._made[key] = mask
        return self._made[key]
