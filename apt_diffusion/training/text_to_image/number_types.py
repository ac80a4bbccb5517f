"""Types of numbers on the command line: `int` or `float` within limits."""

import argparse
import math
from collections.abc import Callable


def number(kind: type, is_allowed: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """An argparse type: `int` or `float` within limits. A NaN passes none."""

    def parse(text: str) -> float:
        value = kind(text)
        if not is_allowed(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    parse.__name__ = kind.__name__  # for argparse's "invalid int value"
    return parse


positive_int = number(int, lambda value: value >= 1, "at least 1")
count = number(int, lambda value: value >= 0, "at least 0")
positive = number(float, lambda value: value > 0, "above 0")
not_negative = number(float, lambda value: 0 <= value < math.inf, "at least 0, and finite")
fraction = number(float, lambda value: 0 <= value < 1, "at least 0 and below 1")
finite = number(float, math.isfinite, "finite")
