"""Grades pictures of the drawn world: a small classifier names their content, which is compared with the caption."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .world import COLORS, LAYOUTS, PATTERNS, SHAPES, Scenes, caption, render, sample_scenes

GRADER_FILE = Path(__file__).parent / "grader.safetensors"
# What is told apart, and into how many kinds. "A left of B" and "B right of A" are one picture: see `attributes`.
ATTRIBUTES = {
    "layout": len(LAYOUTS),
    "shape": len(SHAPES),
    "color": len(COLORS),
    "second_shape": len(SHAPES),
    "second_color": len(COLORS),
    "pattern": len(PATTERNS),
    "ground": len(COLORS),
    "second_ground": len(COLORS),
}
COLUMNS = {
    "background": ("ground", "second_ground"),
    "pattern": ("pattern",),
    "layout": ("layout",),
    "shape": ("shape", "second_shape"),
    "color": ("color", "second_color"),
    "all right": tuple(ATTRIBUTES),
}


def attributes(scenes: Scenes) -> dict[str, tuple[Tensor, Tensor]]:
    """`{name: (class (B,), 1 where it applies (B,))}`; pictures that look alike have the same classes."""
    swapped = (scenes.layout == LAYOUTS.index("right of")) | (scenes.layout == LAYOUTS.index("below"))
    layout = scenes.layout - swapped.long()
    shape = torch.where(swapped[:, None], scenes.shape.flip(1), scenes.shape)
    color = torch.where(swapped[:, None], scenes.color.flip(1), scenes.color)
    always, two = torch.ones(len(scenes)), scenes.has_two.float()
    return {
        "layout": (layout, always),
        "shape": (shape[:, 0], always),
        "color": (color[:, 0], always),
        "second_shape": (shape[:, 1], two),
        "second_color": (color[:, 1], two),
        "pattern": (scenes.pattern, always),
        "ground": (scenes.ground[:, 0], always),
        "second_ground": (scenes.ground[:, 1], always),
    }


class Grader(nn.Module):
    """`(B, 3, 64, 64)` in [-1, 1] -> logits per attribute."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 64), (64, 96)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, 128), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, size) for name, size in ATTRIBUTES.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits `(B, classes)` of every attribute, from pictures `(B, 3, 64, 64)` in [-1, 1]."""
        features = self.trunk(pictures)
        return {name: head(features) for name, head in self.heads.items()}


def load_grader(file: Path = GRADER_FILE) -> Grader:
    """The trained classifier of the drawn world, frozen and on the CPU."""
    from safetensors.torch import load_file

    grader = Grader()
    grader.load_state_dict({key: value.float() for key, value in load_file(file).items()})
    return grader.eval()


def row_scenes(count: int, seed: int) -> dict[str, Scenes]:
    """The rows of the table: fixed test scenes for a seed."""

    def scenes(**settings: Any) -> Scenes:
        return sample_scenes(count, torch.Generator().manual_seed(seed), **settings)

    def sized(layout: int) -> Scenes:
        one = scenes(two=0.0, patterned=0.0)
        return Scenes(torch.full_like(one.layout, layout), one.shape, one.color, one.pattern, one.ground)

    return {
        "one shape, plain, small": sized(0),
        "one shape, plain, large": sized(1),
        "one shape, patterned": scenes(two=0.0, patterned=1.0),
        "one shape, held-out colour": scenes(two=0.0, held_out=True),
        "two shapes, plain": scenes(two=1.0, patterned=0.0),
    }


@torch.no_grad()
def grade(grader: Grader, pictures: Tensor, scenes: Scenes) -> dict[str, float]:
    """Share of pictures in which each column of the table is right."""
    logits = grader(pictures)
    right = {
        name: (logits[name].argmax(1) == target) | (known == 0) for name, (target, known) in attributes(scenes).items()
    }
    return {
        column: torch.stack([right[name] for name in names]).all(0).float().mean().item()
        for column, names in COLUMNS.items()
    }


def grade_real(grader: Grader, vae: nn.Module, count: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """The ceiling: drawn pictures of the same scenes that have gone through the autoencoder."""
    table = {}
    for row, scenes in row_scenes(count, seed).items():
        with torch.no_grad():
            pictures = render(scenes, torch.Generator().manual_seed(seed))
            table[row] = grade(grader, vae.decode(vae.encode(pictures).latent_dist.mean).sample, scenes)
    return table


def grade_pipeline(
    pipeline: Any,
    grader: Grader,
    count: int,
    seed: int = 0,
    steps: int = 15,
    guidance_scale: float = 3.0,
    **settings: Any,
) -> tuple[dict[str, dict[str, float]], dict[str, tuple[list[str], Tensor]]]:
    """`(table, {row: (captions, pictures)})` of pictures that the pipeline draws from the rows' captions."""
    table, drawn = {}, {}
    for row, scenes in row_scenes(count, seed).items():
        captions = [caption(scenes, index) for index in range(count)]
        pictures = draw(pipeline, captions, seed, steps, guidance_scale, **settings)
        table[row], drawn[row] = grade(grader, pictures, scenes), (captions, pictures)
    return table, drawn


def draw(
    pipeline: Any, prompts: list[str], seed: int = 0, steps: int = 15, guidance_scale: float = 3.0, **settings: Any
) -> Tensor:
    """`(B, 3, 64, 64)` in [-1, 1], in batches of 16; picture i starts from the noise of seed + i."""
    parts = []
    for start in range(0, len(prompts), 16):
        batch = prompts[start : start + 16]
        images = pipeline(
            batch,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))],
            output_type="pt",
            **settings,
        ).images
        parts.append(images * 2 - 1)
    return torch.cat(parts)


def format_table(table: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = ["| prompts | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row, values in table.items():
        lines.append(f"| {row} | " + " | ".join(f"{values[column]:.2f}" for column in COLUMNS) + " |")
    return "\n".join(lines)


def grader_loss(grader: Grader, pictures: Tensor, scenes: Scenes) -> Tensor:
    """Mean cross-entropy of the attributes that apply."""
    logits = grader(pictures)
    losses = [
        (F.cross_entropy(logits[name], target, reduction="none") * known).mean()
        for name, (target, known) in attributes(scenes).items()
    ]
    return torch.stack(losses).mean()
