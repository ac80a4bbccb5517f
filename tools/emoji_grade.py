"""Grades the emoji model: compares the judge's labels with the captions, for drawn and for real pictures."""

from pathlib import Path
from typing import Any

import torch
from emoji_scenes import COLORS, Captions, Scenes, World
from torch import Tensor, nn

from apt_diffusion.miniature.emoji.judge import WINDOWS, Judge, look_at
from apt_diffusion.miniature.pictures import save_picture_grid, to_images

COLUMNS = ("thing", "style", "second thing", "ground", "pattern", "layout")
# Of the world's layouts: the judge's (left of and right of are one), and the place of the first object in it.
JUDGED_LAYOUT = torch.tensor([0, 1, 2, 2, 3, 3])
FIRST_PLACE = torch.tensor([0, 0, 0, 1, 0, 1])


def whole_targets(scenes: Scenes) -> dict[str, Tensor]:
    """What the judge should read from whole pictures."""
    second = torch.where(scenes.ground[:, 1] < 0, len(COLORS), scenes.ground[:, 1])
    layout = JUDGED_LAYOUT.to(scenes.layout.device)[scenes.layout]
    return {"layout": layout, "pattern": scenes.pattern, "ground": scenes.ground[:, 0], "second_ground": second}


def windows_on(pictures: Tensor, scenes: Scenes, slot: Tensor, jitter: Tensor | None = None) -> Tensor:
    """Where object `slot` (B,) of each picture should be. `jitter` (B, 3) in [-1, 1] moves and scales the windows."""
    device = pictures.device
    layout = JUDGED_LAYOUT.to(device)[scenes.layout]
    place = (slot + FIRST_PLACE.to(device)[scenes.layout]) % 2 * scenes.has_two
    both = [(centers[0], centers[-1]) for centers, _ in WINDOWS.values()]
    centers = torch.tensor(both, device=device, dtype=torch.float32)[layout, place]
    sides = torch.tensor([side for _, side in WINDOWS.values()], device=device, dtype=torch.float32)[layout]
    if jitter is not None:
        centers, sides = centers + 2 * jitter[:, :2], sides * (1 + 0.08 * jitter[:, 2])
    return look_at(pictures, centers, sides)


def graded_scenes(world: World, count: int, seed: int = 0) -> dict[str, Scenes]:
    """The rows of the table: every seen pair of thing and style once, then `count` scenes of each other kind."""
    generator = torch.Generator(world.device).manual_seed(seed)
    pairs = torch.cartesian_prod(world.shown, torch.arange(len(world.styles), device=world.device))
    every = world.sample(len(pairs), generator, layouts=(0, 1, 0, 0, 0, 0))
    every.concept[:, 0], every.style[:, 0] = pairs.unbind(1)
    return {
        "large, every pair": every,
        "large, plain": world.sample(count, generator, layouts=(0, 1, 0, 0, 0, 0), patterns=(1, 0, 0, 0)),
        "small": world.sample(count, generator, layouts=(1, 0, 0, 0, 0, 0)),
        "two": world.sample(count, generator, layouts=(0, 0, 1, 1, 1, 1)),
    }


@torch.no_grad()
def grade(judge: Judge, pictures: Tensor, scenes: Scenes) -> dict[str, Tensor]:
    """For each picture whether a column of the table is right `(B,)`; what does not apply counts as right."""
    first = torch.zeros(len(scenes), dtype=torch.long, device=pictures.device)
    read = judge.read_windows(windows_on(pictures, scenes, first))
    second = judge.read_windows(windows_on(pictures, scenes, first + 1))
    whole, targets = judge.read_whole(pictures), whole_targets(scenes)
    right = {name: whole[name].argmax(1) == targets[name] for name in targets}
    return {
        "thing": read["concept"].argmax(1) == scenes.concept[:, 0],
        "style": read["style"].argmax(1) == scenes.style[:, 0],
        "second thing": (second["concept"].argmax(1) == scenes.concept[:, 1]) | ~scenes.has_two,
        "ground": right["ground"] & right["second_ground"],
        "pattern": right["pattern"],
        "layout": right["layout"],
    }


def draw(
    pipeline: Any, prompts: list[str], seed: int = 0, steps: int = 20, guidance_scale: float = 3.0, batch: int = 16
) -> Tensor:
    """`(B, 3, 64, 64)` in [-1, 1]."""
    device = pipeline.unet.device
    parts = []
    for start in range(0, len(prompts), batch):
        chosen = prompts[start : start + batch]
        generator = torch.Generator(device).manual_seed(seed + start)
        images = pipeline(
            chosen,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generator,
            output_type="pt",
        ).images
        parts.append(images.float() * 2 - 1)
    return torch.cat(parts)


def grade_model(
    pipeline: Any, judge: Judge, world: World, count: int, batch: int = 16, limit: int | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """`{"drawn" | "real": {row: {column: share right}}}`; real pictures went through the autoencoder."""
    captions = Captions(world, pipeline.tokenizer)
    tables: dict[str, dict[str, dict[str, float]]] = {"drawn": {}, "real": {}}
    for row, scenes in graded_scenes(world, count).items():
        if limit is not None:
            scenes = scenes.take(torch.randperm(len(scenes), generator=torch.Generator().manual_seed(0))[:limit])
        pictures = draw(pipeline, captions.text(scenes), batch=batch)
        real = through(pipeline.vae, world.render(scenes, torch.Generator(world.device).manual_seed(0)))
        for kind, judged in (("drawn", pictures), ("real", real)):
            shares = {name: right.float().mean().item() for name, right in grade(judge, judged, scenes).items()}
            tables[kind][row] = shares
    return tables


@torch.no_grad()
def through(vae: nn.Module, pictures: Tensor) -> Tensor:
    """Pictures after the autoencoder."""
    parts = [vae.decode(vae.encode(part).latent_dist.mean).sample for part in pictures.split(256)]
    return torch.cat(parts).clamp(-1, 1)


def format_table(table: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = ["| prompts | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row, values in table.items():
        cells = [" " if name == "second thing" and row != "two" else f"{values[name]:.2f}" for name in COLUMNS]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save_sheet(pipeline: Any, world: World, file: Path, count: int = 48, seed: int = 7, **settings: Any) -> None:
    """Unselected pictures with their captions: scenes of one seed, as training draws them."""
    generator = torch.Generator(world.device).manual_seed(seed)
    scenes = world.sample(count, generator)
    prompts = Captions(world, pipeline.tokenizer).text(scenes)
    save_picture_grid(to_images(draw(pipeline, prompts, seed, **settings)), prompts, file)
