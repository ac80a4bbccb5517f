"""Scenes of sprites over plain and patterned grounds, with captions as token ids: all in batches, on any device."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 64
HELD_OUT = ("teddy bear", "robot", "castle", "octopus", "cherries", "wrapped gift")  # in every style
COLORS = {
    "red": (0.88, 0.20, 0.20),
    "orange": (0.97, 0.56, 0.16),
    "yellow": (0.98, 0.85, 0.25),
    "green": (0.30, 0.68, 0.33),
    "cyan": (0.30, 0.80, 0.86),
    "blue": (0.20, 0.40, 0.88),
    "purple": (0.52, 0.28, 0.72),
    "pink": (0.98, 0.62, 0.76),
    "brown": (0.48, 0.31, 0.20),
    "grey": (0.58, 0.60, 0.63),
    "white": (0.97, 0.97, 0.97),
    "black": (0.08, 0.08, 0.10),
}
PATTERNS = ("plain", "striped", "checkered", "gradient")
LAYOUTS = ("small", "large", "left of", "right of", "above", "below")
ANYTHING = "thing"  # now and then it stands for the name of what is shown
# Centre of both objects of each layout, then the range of their sides, in pixels.
PLACES = torch.tensor(
    [[[32, 32], [32, 32]]] * 2
    + [[[16, 32], [48, 32]], [[48, 32], [16, 32]], [[32, 16], [32, 48]], [[32, 48], [32, 16]]]
)
SIDES = torch.tensor([[27, 32], [46, 56]] + [[27, 31]] * 4)
SHIFTS = torch.tensor([4.0, 3.0] + [1.5] * 4)


@dataclass
class Scenes:
    """What is shown in each of B pictures. The second object counts where there are two."""

    layout: Tensor  # (B,)
    concept: Tensor  # (B, 2)
    style: Tensor  # (B, 2)
    pattern: Tensor  # (B,)
    ground: Tensor  # (B, 2); the second is -1 where it is a shade of the first

    def __len__(self) -> int:
        return len(self.layout)

    @property
    def has_two(self) -> Tensor:
        """`(B,)`, true where two objects are shown."""
        return self.layout >= 2

    def take(self, rows: Tensor) -> "Scenes":
        """Some of the scenes, by index."""
        return Scenes(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})


class World:
    """The sprites, and what can be said about them.

    Args:
        file: what `emoji_sprites.py` wrote.
        device: where scenes are drawn.
    """

    def __init__(self, file: str | Path, device: torch.device | str = "cpu") -> None:
        with np.load(file) as stored:
            self.names, self.styles = stored["names"].tolist(), stored["styles"].tolist()
            sprites = torch.from_numpy(stored["sprites"]).to(device)  # (C, S, 64, 64, 4)
        self.device = torch.device(device)
        sprites = sprites.flatten(0, 1).permute(0, 3, 1, 2).float().div_(255)
        sprites[:, :3] *= sprites[:, 3:]
        self.banks = [sprites.half(), F.avg_pool2d(sprites, 2).half()]  # for large and small objects
        self.colors = torch.tensor(list(COLORS.values()), device=self.device)
        self.held_out = torch.tensor([self.names.index(name) for name in HELD_OUT], device=self.device)
        shown = torch.ones(len(self.names), dtype=torch.bool, device=self.device)
        shown[self.held_out] = False
        self.shown = shown.nonzero()[:, 0]

    def sample(
        self,
        count: int,
        generator: torch.Generator,
        concepts: Tensor | None = None,
        layouts: Sequence[float] = (0.2, 0.5, 0.075, 0.075, 0.075, 0.075),
        patterns: Sequence[float] = (0.55, 0.15, 0.15, 0.15),
    ) -> Scenes:
        """Scenes of `concepts` (default: those that are not held out)."""
        concepts = self.shown if concepts is None else concepts

        def integers(high: int, *size: int) -> Tensor:
            return torch.randint(high, size, generator=generator, device=self.device)

        def choose(weights: Sequence[float]) -> Tensor:
            shares = torch.tensor(weights, device=self.device, dtype=torch.float32)
            return torch.multinomial(shares, count, replacement=True, generator=generator)

        pattern = choose(patterns)
        ground = integers(len(COLORS), count, 2)
        ground[:, 1] = (ground[:, 0] + 1 + integers(len(COLORS) - 1, count)) % len(COLORS)
        shade = (pattern == 0) | (torch.rand(count, generator=generator, device=self.device) < 0.3)
        ground[:, 1] = ground[:, 1].masked_fill(shade, -1)
        chosen = concepts[integers(len(concepts), count, 2)]
        return Scenes(choose(layouts), chosen, integers(len(self.styles), count, 2), pattern, ground)

    def render(self, scenes: Scenes, generator: torch.Generator) -> Tensor:
        """Pictures `(B, 3, 64, 64)` in [-1, 1]; places, sizes and colours vary a little."""
        count = len(scenes)

        def noise(*size: int) -> Tensor:
            return torch.rand(size, generator=generator, device=self.device) * 2 - 1

        first = self.colors[scenes.ground[:, 0]] + 0.03 * noise(count, 3)
        second = self.colors[scenes.ground[:, 1]] + 0.03 * noise(count, 3)
        # A shade: towards white, or towards black where the colour is light already.
        light = first.mean(1, keepdim=True) > 0.75
        shade = torch.where(light, first * 0.8, first + (1 - first) * 0.35)
        second = torch.where(scenes.ground[:, 1:] < 0, shade, second)
        image = background(scenes.pattern, first.clamp(0, 1), second.clamp(0, 1))
        low, high = SIDES.to(self.device)[scenes.layout].unbind(1)
        for slot in (0, 1):
            size = low + (high - low) * (noise(count) + 1) / 2
            center = PLACES.to(self.device)[scenes.layout, slot]
            center = center + SHIFTS.to(self.device)[scenes.layout, None] * noise(count, 2)
            sprite = self.place(scenes.concept[:, slot] * len(self.styles) + scenes.style[:, slot], center, size)
            if slot == 1:
                sprite = sprite * scenes.has_two[:, None, None, None]
            image = image * (1 - sprite[:, 3:]) + sprite[:, :3]
        return image * 2 - 1

    def place(self, sprite: Tensor, center: Tensor, size: Tensor) -> Tensor:
        """Sprites `(B,)` at centres `(B, 2)` with sides `(B,)`, in pixels: premultiplied `(B, 4, 64, 64)`."""
        axis = torch.arange(SIDE, device=self.device) + 0.5
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        grid = torch.stack([x, y], -1) - center[:, None, None]
        grid = grid / (size[:, None, None, None] / 2)
        large, small = (
            F.grid_sample(bank[sprite].float(), grid, mode="bilinear", align_corners=False) for bank in self.banks
        )
        return torch.where((size > 40)[:, None, None, None], large, small)


def background(pattern: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Patterns `(B,)` in two colours `(B, 3)` each: `(B, 3, 64, 64)` in [0, 1]."""
    axis = torch.arange(SIDE, device=first.device) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    wave = torch.remainder((x + y) / 2**0.5, 16)  # diagonal stripes of 8 pixels
    stripes = (4.5 - (wave - 8).abs()).clamp(0, 1)
    checks = ((x // 16 + y // 16) % 2).float()
    mixes = torch.stack([torch.zeros_like(x), stripes, checks, y / SIDE])
    mix = mixes[pattern][:, None]
    return first[:, :, None, None] * (1 - mix) + second[:, :, None, None] * mix


class Captions:
    """Captions of scenes, as text and as token ids."""

    def __init__(self, world: World, tokenizer: Any) -> None:
        self.world, self.tokenizer = world, tokenizer
        self.words = sorted({word for text in self.vocabulary() for word in text.split()})
        encoded = [tokenizer(word, add_special_tokens=False).input_ids for word in self.words]
        if any(len(ids) > 1 for ids in encoded):
            raise ValueError("every word of a caption must be one token")
        device = world.device
        self.ids = {word: ids[0] for word, ids in zip(self.words, encoded, strict=True)}
        self.names = self.table([*world.names, ANYTHING], device)
        self.articles = self.table([article(name) for name in [*world.names, ANYTHING]], device)[:, 0]
        self.styles = self.table(world.styles, device)[:, 0]
        self.colors = self.table(list(COLORS), device)[:, 0]
        self.patterns = self.table(list(PATTERNS), device)[:, 0]
        self.layouts = self.table(list(LAYOUTS), device)
        self.length = tokenizer.model_max_length
        self.empty = torch.tensor(tokenizer("", padding="max_length").input_ids, device=device)

    def vocabulary(self) -> list[str]:
        """Texts with every word of the captions."""
        return [
            *self.world.names,
            *self.world.styles,
            *COLORS,
            *PATTERNS,
            *LAYOUTS,
            "a an and on background",
            ANYTHING,
        ]

    def table(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Token ids `(texts, longest)`; -1 where a text is shorter."""
        rows = [[self.ids[word] for word in text.split()] for text in texts]
        longest = max(map(len, rows))
        return torch.tensor([row + [-1] * (longest - len(row)) for row in rows], device=device)

    def encode(self, scenes: Scenes, generator: torch.Generator | None = None) -> Tensor:
        """Token ids `(B, T)`. With a generator, parts are left out now and then, and some captions entirely."""
        device, count = self.world.device, len(scenes)

        def leave_out(ids: Tensor, share: float, where: Tensor | None = None) -> Tensor:
            if generator is None:
                return ids
            out = torch.rand(count, generator=generator, device=device) < share
            if where is not None:
                out = out & where
            return ids.masked_fill(out.view(-1, *[1] * (ids.ndim - 1)), -1)

        def word(text: str) -> Tensor:
            return torch.full((count,), self.ids[text], device=device)

        columns = [torch.full((count,), self.tokenizer.bos_token_id, device=device)]
        for slot in (0, 1):
            concept = scenes.concept[:, slot]
            if generator is not None:
                anything = torch.rand(count, generator=generator, device=device) < 0.02
                concept = concept.masked_fill(anything, len(self.world.names))
            style = leave_out(self.styles[scenes.style[:, slot]], 0.15)
            size = leave_out(self.layouts[scenes.layout, 0], 0.25).masked_fill(scenes.has_two, -1)
            before = torch.where((style < 0) & (size < 0), self.articles[concept], self.ids["a"])
            object_columns = [before, size, style, *self.names[concept].unbind(1)]
            if slot == 1:
                relation = self.layouts[scenes.layout].unbind(1)
                object_columns = [*relation, *object_columns]
                object_columns = [column.masked_fill(~scenes.has_two, -1) for column in object_columns]
            columns += object_columns
        patterned = scenes.pattern > 0
        second = scenes.ground[:, 1]
        ground = torch.stack(
            [
                word("on"),
                torch.where(
                    patterned | (scenes.ground[:, 0] != list(COLORS).index("orange")), self.ids["a"], self.ids["an"]
                ),
                self.patterns[scenes.pattern].masked_fill(~patterned, -1),
                self.colors[scenes.ground[:, 0]],
                word("and").masked_fill(second < 0, -1),
                self.colors[second].masked_fill(second < 0, -1),
                word("background"),
            ],
            1,
        )
        ground = leave_out(ground, 0.04)
        ids = torch.cat([torch.stack(columns, 1), ground], 1)
        ids = torch.cat([ids, torch.full((count, 1), self.tokenizer.eos_token_id, device=device)], 1)
        order = (ids < 0).int().argsort(dim=1, stable=True)
        ids = ids.gather(1, order)[:, : self.length]
        ids = F.pad(ids, (0, self.length - ids.shape[1]), value=-1)
        ids = ids.masked_fill(ids < 0, self.tokenizer.pad_token_id)
        if generator is not None:
            dropped = torch.rand(count, 1, generator=generator, device=device) < 0.1
            ids = torch.where(dropped, self.empty, ids)
        return ids

    def text(self, scenes: Scenes) -> list[str]:
        """Whole captions."""
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in self.encode(scenes)]


def article(name: str) -> str:
    """`a` or `an`, by the first letter; the few exceptions among the names are listed."""
    return (
        "an"
        if (name[0] in "aeiou" and not name.startswith(("unicorn", "euro"))) or name.startswith("hourglass")
        else "a"
    )
