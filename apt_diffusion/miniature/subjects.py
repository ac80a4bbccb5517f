"""Subjects that pre-training never drew, for personalisation of the miniature model, and a score that detects them.

Each is made of two parts of one colour each. A picture's score is how well the regions of these two colours fit the
subject's outline at its best place and size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .models import CLASS_WORD, TRIGGERS
from .pictures import to_images
from .world import COLORS, RGB, SIZE, jitter_colors, paint, pixel_grid

Distance = Callable[[Tensor, Tensor], Tensor]  # of (x, y), y down, to an outline of about unit radius
PROMPT = f"a {TRIGGERS[0]} {CLASS_WORD}"
# Prompts that do not ask for the subject: shapes in its colours too.
OTHER_PROMPTS = (
    "a large red circle on a blue background",
    "a small yellow star on a black background",
    "a large purple square on a white background",
    "a large green triangle on an orange background",
    "a small cyan heart on a striped pink and white background",
    "a red ring left of a white diamond on a blue background",
)
RECOGNISED = 0.6  # score from which a person sees the subject


@dataclass(frozen=True)
class Subject:
    """A subject, the plain backgrounds of its training pictures, and those that only its test asks for."""

    parts: tuple[tuple[str, Distance], ...]  # colour and outline; later ones lie in front
    grounds: tuple[str, ...] = ("blue", "white", "black", "cyan", "yellow")
    unseen_grounds: tuple[str, ...] = ("red", "pink", "green")


def box(left: float, top: float, right: float, bottom: float) -> Distance:
    """An upright rectangle."""
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return torch.maximum((x - middle_x).abs() - (right - left) / 2, (y - middle_y).abs() - (bottom - top) / 2)

    return distance


def dome(x: Tensor, y: Tensor) -> Tensor:
    """The upper half of a disc."""
    return torch.maximum(torch.hypot(x, y - 0.1) - 0.95, y - 0.1)


def fir(x: Tensor, y: Tensor) -> Tensor:
    """A triangle that stands on its side."""
    return torch.maximum(0.894 * x.abs() - 0.447 * (y + 0.95), y - 0.35)


SUBJECTS = {
    "mushroom": Subject((("orange", box(-0.26, 0.05, 0.26, 0.95)), ("purple", dome))),
    "tree": Subject(
        (("pink", box(-0.2, 0.3, 0.2, 0.95)), ("green", fir)),
        unseen_grounds=("red", "purple", "orange"),
    ),
    "parcel": Subject(
        (("cyan", box(-0.8, -0.8, 0.8, 0.8)), ("red", box(-0.8, -0.22, 0.8, 0.22))),
        grounds=("blue", "white", "black", "pink", "yellow"),
        unseen_grounds=("purple", "orange", "green"),
    ),
}


def prompt_on(ground: str) -> str:
    """`a sks glyph on a blue background`."""
    return f"{PROMPT} on a {ground} background"


def part_masks(subject: Subject, center: Tensor, radius: Tensor) -> Tensor:
    """What is seen of each part, `(B, P, H, W)` in [0, 1], at centres `(B, 2)` with radii `(B,)` in pixels."""
    grid_x, grid_y = pixel_grid()
    x = (grid_x - center[:, 0, None, None]) / radius[:, None, None]
    y = (grid_y - center[:, 1, None, None]) / radius[:, None, None]
    masks: list[Tensor] = []
    for _, distance in subject.parts:
        mask = (0.5 - distance(x, y) * radius[:, None, None]).clamp(0, 1)
        masks = [behind * (1 - mask) for behind in masks] + [mask]
    return torch.stack(masks, dim=1)


def draw_subject(subject: Subject, grounds: tuple[str, ...], seed: int = 0) -> Tensor:
    """One picture per background `(B, 3, 64, 64)` in [-1, 1]; places, sizes and colours vary a little."""
    generator = torch.Generator().manual_seed(seed)

    def colored(name: str) -> Tensor:
        return jitter_colors(RGB[COLORS.index(name)].expand(len(grounds), 3), generator)

    image = torch.stack([jitter_colors(RGB[COLORS.index(ground)], generator) for ground in grounds])
    image = image[:, :, None, None].expand(-1, -1, SIZE, SIZE)
    center = (torch.rand(len(grounds), 2, generator=generator) - 0.5) * 6
    radius = 21 + 4 * torch.rand(len(grounds), generator=generator)
    for (color, _), mask in zip(subject.parts, part_masks(subject, center, radius).unbind(1), strict=True):
        image = paint(image, mask, colored(color))
    return image * 2 - 1


def subject_score(pictures: Tensor, subject: Subject) -> Tensor:
    """How much a picture shows the subject, in [0, 1].

    Every pixel counts as the nearest colour of the world. The score is the mean over parts of the intersection over
    union of the part's colour and its outline, at the best of many places and sizes.

    Args:
        pictures: `(B, 3, 64, 64)` in [-1, 1].
        subject: what to look for.

    Returns:
        `(B,)`
    """
    palette = RGB.reshape(1, -1, 3)
    pixels = ((pictures + 1) / 2).flatten(2).transpose(1, 2)  # (B, HW, 3)
    nearest = torch.cdist(pixels.contiguous(), palette.expand(len(pixels), -1, -1)).argmin(-1)  # (B, HW)
    shifts = torch.arange(-10, 11, 2.0)
    radius, x, y = (
        axis.flatten() for axis in torch.meshgrid(torch.arange(16, 29, 2.0), shifts, shifts, indexing="ij")
    )
    outlines = (part_masks(subject, torch.stack([x, y], 1), radius) > 0.5).float().flatten(2)  # (T, P, HW)
    total = torch.zeros(len(pictures), len(outlines))
    for index, (color, _) in enumerate(subject.parts):
        found = (nearest == COLORS.index(color)).float()
        shared = found @ outlines[:, index].T
        total += shared / (found.sum(1, keepdim=True) + outlines[:, index].sum(1) - shared).clamp(min=1)
    return total.max(dim=1).values / len(subject.parts)


def save_subject(subject: Subject, folder: Path, seed: int = 0) -> None:
    """The training pictures as PNG files, each with its caption in a `.txt` file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = to_images(draw_subject(subject, subject.grounds, seed))
    for index, (ground, picture) in enumerate(zip(subject.grounds, pictures, strict=True)):
        picture.save(folder / f"{index}-{ground}.png")
        (folder / f"{index}-{ground}.txt").write_text(f"{prompt_on(ground)}\n")
