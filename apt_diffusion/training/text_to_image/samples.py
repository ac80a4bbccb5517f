"""Samples of the adapter as it is now: a grid of one prompt, and the pictures of a file of prompts.

Both are drawn as the APT pipeline draws them with the same settings, and do not disturb the training.
"""

import argparse
import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import nn

from ... import set_apt_scale
from ...data.reading import read_picture
from ...io.atomic import replacing
from ..grids import save_grid, save_sheet
from ..session import Session
from ..trackers import log_images
from .kept_prompts import KeptPrompts
from .prompts import Prompts
from .sample_prompts import SamplePrompt, read_sample_prompts
from .stable_diffusion import Embeddings, StableDiffusionBase

FOLDER = "samples"
SHEET_NAME = "contact-sheet.png"


class Drawer(Protocol):
    """What draws: the models as they are, without the wrappers of several processes."""

    base: StableDiffusionBase
    prompts: Prompts | KeptPrompts
    denoiser: nn.Module
    text_encoders: dict[str, nn.Module]
    adapted: dict[str, nn.Module]


def grid_prompt(args: argparse.Namespace) -> str:
    """What the grid shows."""
    return args.validation_prompt or args.instance_prompt


def wanted_prompts(args: argparse.Namespace, base: StableDiffusionBase) -> list[SamplePrompt]:
    """The prompts of `--sample_prompts`; see `read_sample_prompts` for what is raised."""
    if args.sample_prompts is None:
        return []
    return read_sample_prompts(args.sample_prompts, base.check_resolution, base.takes_negative_prompts)


def draws_grid(args: argparse.Namespace) -> bool:
    """Whether there is a grid at all: a file of prompts alone takes its place."""
    return args.num_validation_images > 0 and (args.validation_prompt is not None or args.sample_prompts is None)


def draws_while_training(args: argparse.Namespace) -> bool:
    """Whether samples are drawn before the end, too."""
    asked = args.validation_prompt is not None and args.num_validation_images > 0
    return asked or args.sample_prompts is not None


def draw_grid(session: Session, drawer: Drawer) -> dict[Path, str]:
    """Draws `--num_validation_images` of one prompt: a labelled grid in `samples/`, and the images to the trackers.

    Returns:
        The grid and its prompt, in the process that writes files.
    """
    args, step, prompt = session.args, session.steps_done, grid_prompt(session.args)
    start_images = [read_picture(Path(path)) for path in args.validation_images or ()] or None
    seeds = [session.seed + index for index in range(len(start_images or range(args.num_validation_images)))]
    settings = drawer.base.drawing_settings(args)
    images = drawer.base.draw(
        drawer.denoiser, _conditioning(drawer, prompt, None), seeds, args.resolution, start_images, **settings
    )
    if not session.is_main:
        return {}
    log_images(session.accelerator.trackers, "validation", images, prompt, step)
    labels = [f"seed {seed}" for seed in seeds]
    path = session.output_dir / FOLDER / f"step-{step:06d}.png"
    return {save_grid(images, labels, f"step {step}: {prompt}", path): prompt}


def draw_prompts(session: Session, drawer: Drawer, prompts: Sequence[SamplePrompt]) -> dict[Path, str]:
    """Draws each prompt of `--sample_prompts` with its own settings, into a file of its own in `samples/`.

    Returns:
        The pictures and their prompts, in the process that writes files.
    """
    drawn = {}
    for number, sample in enumerate(prompts, start=1):
        image = _draw(session, drawer, sample)
        if session.is_main:
            log_images(session.accelerator.trackers, f"sample {number}", [image], sample.prompt, session.steps_done)
            path = session.output_dir / FOLDER / f"step-{session.steps_done:06d}-{number:02d}.png"
            with replacing(path) as temporary:  # whoever watches the folder sees whole pictures only
                image.save(temporary, format="PNG")
            drawn[path] = sample.prompt
    return drawn


def _draw(session: Session, drawer: Drawer, sample: SamplePrompt) -> Image.Image:
    args, base = session.args, drawer.base
    own = {"num_inference_steps": sample.steps, "guidance_scale": sample.guidance}
    given = vars(args) | {name: value for name, value in own.items() if value is not None}
    seed = session.seed if sample.seed is None else sample.seed
    size = sample.height or args.resolution, sample.width or args.resolution
    with _weighted(drawer.adapted, sample.weight):
        conditioning = _conditioning(drawer, sample.prompt, sample.negative)
        settings = base.drawing_settings(argparse.Namespace(**given))
        (image,) = base.draw(drawer.denoiser, conditioning, [seed], size, **settings)
    return image


@torch.no_grad()
def _conditioning(drawer: Drawer, prompt: str, negative: str | None) -> tuple[Embeddings, Embeddings]:
    texts = [drawer.prompts([text], drawer.text_encoders) for text in (prompt, negative or "")]
    return texts[0], texts[1] if negative else drawer.base.without_negative(texts[1])


@contextlib.contextmanager
def _weighted(adapted: dict[str, nn.Module], weight: float) -> Iterator[None]:
    """The adapter acts with this weight inside; in training its weight is 1."""
    set_apt_scale(adapted, weight)
    try:
        yield
    finally:
        set_apt_scale(adapted, 1.0)


def draw_sheet(session: Session, prompts: Sequence[SamplePrompt]) -> Path:
    """The contact sheet of a run: a row for each prompt, a column for each step at which samples were drawn.

    Pictures that the run had left before it was resumed are on it, too; those of later steps are of one given up.
    """
    folder, last_step = session.output_dir / FOLDER, session.steps_done
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.glob("step-*-*.png")):
        match = re.fullmatch(r"step-(\d+)-(\d+)", path.stem)
        if match and int(match[1]) <= last_step:
            found.setdefault(int(match[1]), {})[int(match[2])] = path
    rows: list[tuple[str, list[Path | None]]] = [
        (sample.prompt, [pictures.get(number) for pictures in found.values()])
        for number, sample in enumerate(prompts, start=1)
    ]
    return save_sheet(rows, [f"step {step}" for step in found], folder / SHEET_NAME)


def texts_of(prompts: Sequence[SamplePrompt]) -> list[tuple[str, str]]:
    """Where each text of the file stands, and the text."""
    texts = [(f"--sample_prompts, line {one.line}", one.prompt) for one in prompts]
    return texts + [(f"--sample_prompts, line {one.line}, --n", one.negative) for one in prompts if one.negative]
