"""A file of prompts to draw samples of, each line with settings of its own, as kohya's scripts read them:

    a sks dog in snow --w 512 --h 768 --d 42 --s 30 --l 7.5 --n blurry, dark --a 0.8

width, height, seed, steps, guidance, negative prompt; and, of ours, the weight of the adapter. What a line leaves out
is as the command line has it. Empty lines, and those that begin with #, are left out.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...data.settings_file import read_text, refuse

LARGEST = 4096  # of width and height: what a picture may cost in memory
MOST_STEPS = 1000  # as many as schedulers have


@dataclass(frozen=True)
class SamplePrompt:
    """A line of the file; `None` is what the line leaves out."""

    line: int
    prompt: str
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    weight: float = 1.0


class _Option(NamedTuple):
    field: str
    kind: Callable[[str], Any]
    is_allowed: Callable[[Any], bool]
    wanted: str


_SIZE = (int, lambda value: 1 <= value <= LARGEST, f"a whole number from 1 to {LARGEST}")
_NUMBER = (float, math.isfinite, "a finite number")
OPTIONS = {
    "w": _Option("width", *_SIZE),
    "h": _Option("height", *_SIZE),
    "d": _Option("seed", int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2**63 - 1"),
    "s": _Option("steps", int, lambda value: 1 <= value <= MOST_STEPS, f"a whole number from 1 to {MOST_STEPS}"),
    "l": _Option("guidance", *_NUMBER),
    "n": _Option("negative", str, lambda value: value != "", "a text"),
    "a": _Option("weight", *_NUMBER),
}


def read_sample_prompts(
    file: str | Path, check_size: Callable[[int], Any], takes_negative: bool = True
) -> list[SamplePrompt]:
    """The prompts of the file, in its order.

    Args:
        file: text in UTF-8.
        check_size: raises `ValueError` for a width or height that the base cannot draw; its message may name the flag
            `--resolution`, in whose place the option stands then.
        takes_negative: whether the base reads negative prompts.

    Raises:
        ValueError: with everything that is wrong with the file, each with its line.
    """
    lines = read_text("--sample_prompts", file).splitlines()
    prompts, mistakes = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            prompt, found = _read_line(number, line, check_size, takes_negative)
            prompts.append(prompt)
            mistakes += [(number, mistake) for mistake in found]
    refuse("--sample_prompts", file, mistakes)
    if not prompts:
        raise ValueError(f"--sample_prompts: {file} has no prompts.")
    return prompts


def _read_line(
    number: int, line: str, check_size: Callable[[int], Any], takes_negative: bool
) -> tuple[SamplePrompt, list[str]]:
    """The prompt of a line, and all that is wrong with it."""
    text, *options = re.split(r"(?:^|\s)--(?=\S)", line.strip())
    values: dict[str, Any] = {}
    mistakes = [] if text.strip() else ["there is no prompt before the options."]
    for option in options:
        name, _, given = option.partition(" ")
        given = given.strip()
        if name not in OPTIONS:
            mistakes.append(
                f"--{name} is no option of a prompt: these are {', '.join(f'--{key}' for key in OPTIONS)}."
            )
            continue
        field, kind, is_allowed, wanted = OPTIONS[name]
        if field in values:
            mistakes.append(f"--{name} stands there twice.")
            continue
        try:
            value = kind(given)
        except ValueError:
            value = None
        values[field] = value
        if value is None or not is_allowed(value):
            mistakes.append(f"--{name} must be {wanted}, got {given!r}.")
        elif name in ("w", "h"):
            try:
                check_size(value)
            except ValueError as error:
                mistakes.append(str(error).replace("--resolution", f"--{name}"))
        elif name == "n" and not takes_negative:
            mistakes.append("--n: this base takes no negative prompt.")
    return SamplePrompt(number, text.strip(), **values), mistakes
