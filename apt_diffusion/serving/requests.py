"""What an engine is asked for, and what it hands out at once: a request and its ticket."""

import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

MAX_PROMPT = 10_000  # characters
MAX_STEPS = 1000
MAX_ADAPTERS = 8  # in one mix
MAX_PREVIEWS = 8

Preview = Callable[[int, int, Image.Image], None]


class QueueFull(RuntimeError):
    """The engine has as many requests waiting as it accepts.

    Attributes:
        retry_after_s: seconds after which a place is likely to be free.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.retry_after_s)


class Draining(RuntimeError):
    """The engine finishes what it has accepted and takes nothing new."""


class DeadlineExceeded(TimeoutError):
    """A request was not finished within its `deadline_s`."""


@dataclass(frozen=True)
class ImageRequest:
    """One picture to draw. `None` leaves the model's own default.

    Args:
        prompt, negative_prompt: texts; the second needs a `guidance_scale` above 1 to act.
        width, height: in pixels; of `image` where that is given.
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance.
        scheduler: a name of `pipelines.samplers.SAMPLERS` (or `FLOW_SAMPLERS`).
        seed: of the noise. Without one, the picture cannot be had again.
        adapters: name -> weight; empty for the base model.
        apt_scale: strength, a factor on all weights of this picture.
        image: a picture to start from.
        strength: how far to leave that picture, above 0 and up to 1.
        num_previews: how many unfinished pictures to show on the way.
        deadline_s: seconds from its submission after which nobody wants it any more.

    Raises:
        ValueError: for a value that is none of these.
    """

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    seed: int | None = None
    adapters: Mapping[str, float] = field(default_factory=dict)
    apt_scale: float = 1.0
    image: Image.Image | None = None
    strength: float = 0.8
    num_previews: int = 0
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt or "")):
            if not isinstance(text, str) or len(text) > MAX_PROMPT:
                raise ValueError(f"{name} must be a text of at most {MAX_PROMPT} characters.")
        whole = {
            "width": (self.width, 1, 2**16),
            "height": (self.height, 1, 2**16),
            "num_inference_steps": (self.num_inference_steps, 1, MAX_STEPS),
            "seed": (self.seed, 0, 2**63 - 1),
            "num_previews": (self.num_previews, 0, MAX_PREVIEWS),
        }
        for name, (value, least, most) in whole.items():
            if value is not None and (not _is_whole(value) or not least <= value <= most):
                raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r}.")
        for name in ("guidance_scale", "apt_scale", "strength", "deadline_s"):
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise ValueError(f"{name} must be a number, got {value!r}.")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale <= 100:
            raise ValueError(f"guidance_scale must be from 0 to 100, got {self.guidance_scale}.")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {self.strength}.")
        if self.deadline_s is not None and self.deadline_s <= 0:
            raise ValueError(f"deadline_s must be positive, got {self.deadline_s}.")
        if not isinstance(self.adapters, Mapping) or len(self.adapters) > MAX_ADAPTERS:
            raise ValueError(f"adapters must be at most {MAX_ADAPTERS} names with their weights.")
        for name, weight in self.adapters.items():
            if not isinstance(name, str) or not _is_number(weight) or abs(weight) > 100:
                raise ValueError(f"The adapter {name!r} needs a weight between -100 and 100, got {weight!r}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Ticket:
    """A request that an engine has accepted."""

    def __init__(self, request: ImageRequest, on_preview: Preview | None, wake: Callable[[], None]) -> None:
        self.request = request
        self.on_preview = on_preview
        self.submitted_at = time.monotonic()
        self._future: Future[Image.Image] = Future()
        self._wake = wake
        self._ahead = 0
        self._stop = threading.Event()

    def result(self, timeout: float | None = None) -> Image.Image:
        """The picture, as soon as it is there.

        Raises:
            concurrent.futures.CancelledError: after `cancel`.
            DeadlineExceeded: after the request's deadline.
            TimeoutError: after `timeout` seconds; the request goes on.
            Exception: what went wrong while it was drawn.
        """
        return self._future.result(timeout)

    def cancel(self) -> bool:
        """Stops it, at the latest after the denoising step under way. `False` where it is over already."""
        if self._future.done():
            return False
        self._stop.set()
        self._wake()
        return True

    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self._future.done()

    def position(self) -> int:
        """How many requests are started before this one; 0 once it is drawn, and afterwards."""
        return self._ahead

    def add_done_callback(self, function: Callable[["Ticket"], None]) -> None:
        """Calls `function(ticket)` when it is over, from the engine's thread: it must not wait."""
        self._future.add_done_callback(lambda _: function(self))

    # For the engine:

    def check(self) -> None:
        """`CancelledError` or `DeadlineExceeded` where nobody wants the picture any more."""
        if self._stop.is_set():
            raise CancelledError("The request was cancelled.")
        deadline = self.request.deadline_s
        if deadline is not None and time.monotonic() - self.submitted_at > deadline:
            raise DeadlineExceeded(f"The picture was not finished within {deadline:g} s.")

    def set_position(self, ahead: int) -> None:
        """Tells it its place in the queue."""
        self._ahead = ahead

    def finish(self, image: Image.Image) -> None:
        """Its picture is there."""
        self._future.set_result(image)

    def fail(self, error: BaseException) -> None:
        """There will be none."""
        self._future.set_exception(error)
