"""Estimates the remaining time of a task as a number that never rises."""

SMOOTHING = 0.15  # weight of a new estimate


class Countdown:
    """Smoothed estimate from the average time per step; it never rises."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None  # when which step was done
        self._last: tuple[float, float] | None = None  # when how many seconds were left

    def left(self, step: int, steps: int, now: float) -> float | None:
        """Seconds left at the time `now`, `None` until some steps were seen."""
        began, first = self._first = self._first or (now, step)
        if step - first < 2:
            return None
        estimate = (now - began) / (step - first) * (steps - step)
        if self._last is None:
            self._last = (now, estimate)
            return estimate
        then, before = self._last
        expected = max(before - (now - then), 0.0)
        left = min(before, max(expected + SMOOTHING * (estimate - expected), 0.0))
        self._last = (now, left)
        return left
