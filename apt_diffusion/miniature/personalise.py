"""Helpers to train a subject on the miniature model: pictures for prior preservation, and a judge of the results."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .emoji.prompts import random_prompts
from .grade import draw
from .pictures import to_images
from .subjects import OTHER_PROMPTS, RECOGNISED, Subject, prompt_on, subject_score
from .world import caption, sample_scenes


@dataclass(frozen=True)
class Judgement:
    """How well a subject was learnt, over prompts that ask for it and prompts that do not."""

    subject: float  # mean `subject_score` where it was asked for, on backgrounds that no training picture has
    recognised: float  # share of these pictures in which it can be recognised
    bleeding: float  # mean `subject_score` where it was not asked for
    drift: float  # root mean square difference from the base model's pictures there, of pixels in [0, 1]


def class_captions(model: str, count: int = 64, seed: int = 0) -> list[str]:
    """Captions that the embedded text-to-image model of this name knows.

    Raises:
        ValueError: the name is unknown.
    """
    known = {"miniature": random_captions, "miniature-sd3": random_captions, "miniature-emoji": random_prompts}
    if model not in known:
        raise ValueError(f"{model!r} is no embedded Stable Diffusion: {', '.join(known)} are.")
    return known[model](count, seed)


def random_captions(count: int, seed: int = 0) -> list[str]:
    """Captions of scenes of the drawn world."""
    scenes = sample_scenes(count, torch.Generator().manual_seed(seed), two=0.4)
    return [caption(scenes, index) for index in range(count)]


def save_class_pictures(
    pipeline: Any, folder: str | Path, captions: Sequence[str], seed: int = 0, **settings: Any
) -> None:
    """The base model's own pictures of captions that it knows, with the caption in a `.txt` file beside each.

    The model knows no word for "any shape", so that its pictures of many captions are its class pictures. `settings`
    go to the pipeline.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = to_images(draw(pipeline, list(captions), seed, **settings))
    for index, (text, picture) in enumerate(zip(captions, pictures, strict=True)):
        picture.save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(f"{text}\n")


def draw_test(
    pipeline: Any, subject: Subject, per_prompt: int, seed: int = 1000, **settings: Any
) -> tuple[Tensor, Tensor]:
    """`(asked for, not asked for)`: `per_prompt` pictures of every test prompt, `(B, 3, 64, 64)` in [-1, 1].

    `settings` go to the pipeline.
    """
    asked = [prompt_on(ground) for ground in subject.unseen_grounds for _ in range(per_prompt)]
    others = [prompt for prompt in OTHER_PROMPTS for _ in range(per_prompt)]
    return draw(pipeline, asked, seed, **settings), draw(pipeline, others, seed, **settings)


def judge(asked: Tensor, others: Tensor, base_others: Tensor, subject: Subject) -> Judgement:
    """Judges the pictures of `draw_test`; `base_others` are the base model's from the same noise."""
    scores = subject_score(asked, subject)
    return Judgement(
        subject=scores.mean().item(),
        recognised=(scores > RECOGNISED).float().mean().item(),
        bleeding=subject_score(others, subject).mean().item(),
        drift=((others - base_others) / 2).square().mean().sqrt().item(),
    )
