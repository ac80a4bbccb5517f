"""Test beds for personalisation: embedded models, things that they do not know, and a judge for each model."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _families import TRANSFORMER, UNET, Family
from torch import Tensor

from apt_diffusion.miniature import personalise, subjects
from apt_diffusion.miniature.emoji import subjects as emoji
from apt_diffusion.miniature.emoji.judge import load_judge


@dataclass(frozen=True)
class World:
    """See the module.

    Args:
        model: name of an embedded model.
        things: what is taught.
        name: the words that stand for it.
        columns: of the table; the first is how well the thing is learnt.
        own_prompts: whether the test prompts differ from thing to thing.
        save: writes the training pictures of a thing, with captions, to a new folder.
        draw: test pictures `(B, 3, 64, 64)` of a pipeline: as many as given of each prompt.
        judge: the columns' values of a thing's test pictures, beside the base model's from the same noise.
        family: of the model.
        settings: of every call of the pipeline.
    """

    model: str
    things: tuple[str, ...]
    name: str
    columns: tuple[str, ...]
    own_prompts: bool
    save: Callable[[str, Path], None]
    draw: Callable[..., Tensor]
    judge: Callable[[str, Tensor, Tensor], dict[str, float]]
    family: Family = UNET
    settings: dict[str, Any] = field(default_factory=dict)


def save_shape(thing: str, folder: Path) -> None:
    """The training pictures of a subject of the drawn world."""
    subjects.save_subject(subjects.SUBJECTS[thing], folder)


def draw_shapes(pipeline: Any, thing: str, images: int, **settings: Any) -> Tensor:
    """Pictures that ask for the subject, then those that do not."""
    return torch.cat(personalise.draw_test(pipeline, subjects.SUBJECTS[thing], images, **settings))


def judge_shapes(thing: str, pictures: Tensor, base: Tensor) -> dict[str, float]:
    """By the fit of outline and colours."""
    subject = subjects.SUBJECTS[thing]
    asked = len(pictures) * len(subject.unseen_grounds) // (len(subject.unseen_grounds) + len(subjects.OTHER_PROMPTS))
    return dataclasses.asdict(personalise.judge(pictures[:asked], pictures[asked:], base[asked:], subject))


def draw_emoji(pipeline: Any, thing: str, images: int) -> Tensor:
    """The prompts are the same for all things."""
    return emoji.draw_test(pipeline, images)


def judge_emoji(thing: str, pictures: Tensor, base: Tensor) -> dict[str, float]:
    """By the judge that was trained apart."""
    taught = emoji.read_pictures(emoji.folder_of(thing))
    judgement = emoji.judge_pictures(load_judge(), pictures, base, thing, taught)
    similar = {f"similar, {kind}": value for kind, value in judgement.similarity.items()}
    recognised = {f"recognised, {kind}": value for kind, value in judgement.recognised.items()}
    mean = {"similar": sum(similar.values()) / len(similar)}
    others = {name: getattr(judgement, name) for name in ("fidelity", "bleeding", "kept", "drift")}
    return mean | similar | recognised | others


WORLDS = {
    "emoji": World(
        model="miniature-emoji",
        things=tuple(emoji.SUBJECTS),
        name="sks toy",
        columns=(
            "similar",  # the mean of the three kinds
            *(f"{what}, {kind}" for what in ("similar", "recognised") for kind in ("ground", "small", "beside")),
            *("fidelity", "bleeding", "kept", "drift"),
        ),
        own_prompts=False,
        save=emoji.save_subject,
        draw=draw_emoji,
        judge=judge_emoji,
    ),
    "shapes": World(
        model="miniature",
        things=tuple(subjects.SUBJECTS),
        name="sks glyph",
        columns=("subject", "recognised", "bleeding", "drift"),
        own_prompts=True,
        save=save_shape,
        draw=draw_shapes,
        judge=judge_shapes,
    ),
}
WORLDS["shapes-sd3"] = dataclasses.replace(
    WORLDS["shapes"], model="miniature-sd3", family=TRANSFORMER, settings={"max_sequence_length": 16}
)
