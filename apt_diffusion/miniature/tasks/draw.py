"""Draws the tasks' pictures in seeded chunks, so the first N pictures of a split do not depend on the split's size."""

import zlib
from collections.abc import Iterator
from random import Random

import torch
from PIL import Image

from ..pictures import to_images
from ..world import HELD_OUT_COLOR, INSIDE, Scenes, render, sample_scenes
from .picture import Picture, read_picture

CHUNK = 100
MATCHING = 0.3  # share of scenes whose two things get the same shape, for questions that count and compare
FIXED_SEED = 0


def split_seed(task: str, split: str, seed: int, chunk: int = 0) -> int:
    """The seed of one chunk. Only training splits use `seed`: validation and test splits are always the same."""
    return zlib.crc32(f"{task}/{split}/{seed if split == 'train' else FIXED_SEED}/{chunk}".encode())


def task_scenes(count: int, generator: torch.Generator) -> Scenes:
    """Random scenes as in pre-training, except that more scenes have two things of the same shape."""
    scenes = sample_scenes(count, generator)
    alike = torch.rand(count, generator=generator) < MATCHING
    allowed = (HELD_OUT_COLOR[scenes.shape[:, 1]] != scenes.color[:, 0]) & (scenes.layout != INSIDE)
    scenes.shape[:, 0] = torch.where(alike & allowed & scenes.has_two, scenes.shape[:, 1], scenes.shape[:, 0])
    return scenes


def drawn_chunks(
    task: str, split: str, count: int, seed: int
) -> Iterator[tuple[list[Picture], list[Image.Image], Random]]:
    """Chunks of up to 100 pictures: what each shows, each drawn, and a generator for the chunk's texts."""
    for chunk in range(-(-count // CHUNK)):
        value = split_seed(task, split, seed, chunk)
        generator = torch.Generator().manual_seed(value)
        scenes = task_scenes(CHUNK, generator)
        images = to_images(render(scenes, generator))
        size = min(CHUNK, count - chunk * CHUNK)
        yield [read_picture(scenes, index) for index in range(CHUNK)][:size], images[:size], Random(value)
