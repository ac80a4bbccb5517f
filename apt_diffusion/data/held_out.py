"""Validation pictures: their loss at fixed noise and timesteps can be compared between steps and runs."""

import dataclasses
import math
from itertools import groupby

import numpy as np
import torch
from torch.utils.data import Dataset

from .dreambooth import Framing, LatentCache, Sample, pixels_of
from .masks import Masks
from .order import Purpose, random_at
from .pictures import Picture, View, choose_view, time_ids

TIMESTEPS = 8  # of each picture, spread evenly
SEED = 0  # of the noise: the same in every run


def split_off(pictures: list[Picture], share: float, seed: int) -> tuple[list[Picture], list[Picture]]:
    """Pictures to train on, and those held out: `share` of the distinct files, at least one of either.

    A file that stands in several folders, with captions of their own, is held out of all.

    Raises:
        ValueError: where there are not two pictures.
    """
    files = list(dict.fromkeys(picture.path for picture in pictures))
    if len(files) < 2:
        raise ValueError("--validation_split needs two pictures at least: one to train on, and one to hold out.")
    count = min(max(1, round(share * len(files))), len(files) - 1)
    order = random_at(seed, 2**60, Purpose.ORDER).permutation(len(files))  # a place that no epoch reaches
    held_out = {files[index] for index in order[:count]}
    return (
        [picture for picture in pictures if picture.path not in held_out],
        [picture for picture in dict.fromkeys(pictures) if picture.path in held_out],
    )


class HeldOutData(Dataset):
    """index -> `[sample]`: each picture's middle, at `TIMESTEPS` timesteps.

    Args:
        pictures: those held out.
        framing: how pictures are cropped.
        latent_shape: `(c, h, w)` of a square's latents.
        num_timesteps: of the noise schedule.
    """

    def __init__(
        self, pictures: list[Picture], framing: Framing, latent_shape: tuple[int, int, int], num_timesteps: int
    ) -> None:
        self.pictures = pictures
        self.framing = dataclasses.replace(framing, center_crop=True, random_flip=False)
        self.latent_shape = latent_shape
        self.num_timesteps = num_timesteps
        self.cache: LatentCache = {}
        self.masks = Masks(framing.stride)

    def __len__(self) -> int:
        return len(self.pictures) * TIMESTEPS

    def views_at(self, index: int) -> list[View]:
        """The crop of this sample."""
        picture, framing = self._picture(index), self.framing
        return [choose_view(picture, framing.size_of(picture), framing.stride, True, False, (0.0, 0.0))]

    def batches(self, size: int) -> list[list[int]]:
        """All indices, in batches of at most `size` of which each has crops of one size."""
        of_one_size = groupby(range(len(self)), key=lambda index: self.framing.size_of(self._picture(index)))
        runs = [list(run) for _, run in of_one_size]
        return [run[start : start + size] for run in runs for start in range(0, len(run), size)]

    def _picture(self, index: int) -> Picture:
        return self.pictures[index // TIMESTEPS]

    def pixels(self, views: list[View]) -> dict[View, torch.Tensor]:
        """Pixels `(3, height, width)` of several views."""
        return pixels_of(views, self.framing)

    def __getitem__(self, index: int) -> list[Sample]:
        """`cache` must hold the sample's view."""
        picture, (view,) = self._picture(index), self.views_at(index)
        timestep = math.floor((index % TIMESTEPS + 0.5) / TIMESTEPS * self.num_timesteps)
        draws = random_at(SEED, index, Purpose.SAMPLE)
        shape = self.framing.latents_of((view.height, view.width), self.latent_shape)
        posterior_noise, noise = map(torch.from_numpy, draws.standard_normal((2, *shape), dtype=np.float32))
        place, mask = time_ids(picture, view), self.masks(picture, view)
        return [Sample(picture.prompt, self.cache[view], place, timestep, posterior_noise, noise, mask)]
