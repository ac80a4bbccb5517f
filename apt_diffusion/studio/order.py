"""The checked settings of one drawing, in the form that the page, links and picture files store."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..pipelines.prompt_tags import split_tags
from .library import Adapter

MAX_STEPS = 100
MAX_IMAGES = 8
MAX_ADAPTERS = 4
MAX_SEED = 2**32 - 1
MAX_PROMPT = 1000  # characters
MAX_WEIGHT = 2.0
BLOCKS = ("text_encoder", "down", "mid", "up")


@dataclass(frozen=True)
class Order:
    """What to draw. Checked when it is made: every field may come from anybody.

    Args:
        prompt: what the picture shows.
        negative_prompt: what it does not show.
        adapters: each with its weight.
        steps: of denoising.
        guidance: how strictly the prompt is followed.
        width: pixels.
        height: pixels.
        seed: of the first picture; the next has the next seed.
        count: of pictures.
        sampler: a name of `samplers.SAMPLERS`; `""` is the model's own.
        strength: a factor on all weights.
        blocks: factors on the weights by part of the model, see `BLOCKS`; what is not named has 1.
        picture: to start from, in place of noise.
        mask: white where the picture is drawn anew.
        change: how much of the picture's noise schedule is drawn anew, in (0, 1].

    Raises:
        ValueError: with a sentence for the page.
    """

    prompt: str
    negative_prompt: str = ""
    adapters: tuple[tuple[Adapter, float], ...] = field(default=())
    steps: int = 25
    guidance: float = 7.5
    width: int = 512
    height: int = 512
    seed: int = 0
    count: int = 1
    sampler: str = ""
    strength: float = 1.0
    blocks: tuple[tuple[str, float], ...] = ()
    picture: Image.Image | None = None
    mask: Image.Image | None = None
    change: float = 0.6

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("Write a prompt first: what should the picture show?")
        if len(self.prompt) > MAX_PROMPT or len(self.negative_prompt) > MAX_PROMPT:
            raise ValueError(f"A prompt may have {MAX_PROMPT} characters.")
        if len(self.adapters) > MAX_ADAPTERS:
            raise ValueError(f"At most {MAX_ADAPTERS} adapters can be mixed.")
        for name, value, low, high in (
            ("number of steps", self.steps, 1, MAX_STEPS),
            ("number of pictures", self.count, 1, MAX_IMAGES),
            ("seed", self.seed, 0, MAX_SEED),
            ("guidance", self.guidance, 0, 30),
            ("strength", self.strength, 0, MAX_WEIGHT),
            ("change of the picture", self.change, 0.05, 1),
            *((f"weight of {adapter.name}", weight, -MAX_WEIGHT, MAX_WEIGHT) for adapter, weight in self.adapters),
            *((f"strength of the block {name}", value, 0, MAX_WEIGHT) for name, value in self.blocks),
        ):
            if not low <= value <= high:
                raise ValueError(f"The {name} must be from {low:g} to {high}, not {value}.")
        if self.mask is not None and self.picture is None:
            raise ValueError("A mask needs a picture: choose the picture to start from.")

    @property
    def seeds(self) -> list[int]:
        """One per picture, so that each can be drawn again."""
        return [(self.seed + index) % (MAX_SEED + 1) for index in range(self.count)]

    @property
    def steps_drawn(self) -> int:
        """Denoising steps of one picture: fewer than `steps` where it starts from a picture."""
        return self.steps if self.picture is None else max(1, min(int(self.steps * self.change), self.steps))

    @property
    def parts(self) -> int:
        """How often it is drawn: with the adapters and without."""
        return 2 if self.adapters else 1

    @property
    def cost(self) -> float:
        """Denoising steps of all pictures."""
        return float(self.parts * self.steps_drawn * self.count)

    def weight(self, value: float) -> float | dict[str, Any]:
        """An adapter's weight as `set_apt_adapters` takes it: by block where the blocks differ."""
        factors = dict(self.blocks)
        if all(factor == 1 for factor in factors.values()):
            return value
        return {
            "unet": {part: value * factors.get(part, 1.0) for part in ("down", "mid", "up")},
            "text_encoder": value * factors.get("text_encoder", 1.0),
        }


def take_tags(prompt: str, resolve: Callable[[str], Adapter]) -> tuple[str, list[tuple[Adapter, float]]]:
    """A prompt without its `<apt:name:0.8>`, and the adapters that these name; without a number the weight is 1.

    Args:
        prompt: as written.
        resolve: gives the adapter of a name, or raises `ValueError`.

    Raises:
        ValueError: for an unknown name, or a weight that is no number.
    """
    text, weights = split_tags(prompt)
    return text, [(resolve(name), weight) for name, weight in weights.items()]


def whole(value: Any, name: str) -> int:
    """A whole number from a page, a link or a file; `ValueError` with a sentence for anything else."""
    number = real(value, name)
    if number != int(number):
        raise ValueError(f"The {name} must be a whole number, not {number:g}.")
    return int(number)


def real(value: Any, name: str) -> float:
    """A finite number from a page, a link or a file; `ValueError` with a sentence for anything else."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"The {name} must be a number.")
    return number


def text(value: Any, name: str = "text") -> str:
    """A text from a page, a link or a file; nothing is an empty one."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"The {name} must be a text.")
    return value


def names(value: Any, name: str = "list") -> list[str]:
    """Texts from a page; nothing is no text."""
    values: Sequence[Any] = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in values) or len(values) > 100:
        raise ValueError(f"The {name} must be a list of names.")
    return list(values)
