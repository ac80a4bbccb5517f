"""Pictures of the tasks, drawn in seeded chunks: the first N of a split are the same however many are asked for."""

import zlib
from collections.abc import Iterator
from random import Random

import torch
from PIL import Image

from ..pictures import to_images
from ..world import HELD_OUT_COLOR, INSIDE, Scenes, render, sample_scenes
from .picture import Picture, read_picture

CHUNK = 100
MATCHING = 0.3  # share of pairs of things that are made alike in shape, to be counted and compared
FIXED_SEED = 0


def split_seed(task: str, split: str, seed: int, chunk: int = 0) -> int:
    """Only training data heed `seed`: validation and test are the same for everybody."""
    return zlib.crc32(f"{task}/{split}/{seed if split == 'train' else FIXED_SEED}/{chunk}".encode())


def task_scenes(count: int, generator: torch.Generator) -> Scenes:
    """As in pre-training, but that more pairs of things are alike in shape."""
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
