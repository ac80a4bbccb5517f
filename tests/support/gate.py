"""A denoiser that waits: for tests of what happens while a picture is being drawn, however fast the machine is."""

import functools
import threading
import time

PATIENCE = 240  # seconds: busy machines are slow


class Gate:
    """Holds a model before its next pass until `open`, or until the end of the `with` block.

    Args:
        model: the denoiser, such as `pipe.unet`, before an engine takes it.
    """

    def __init__(self, model) -> None:
        self._reached, self._opened = threading.Event(), threading.Event()
        forward = model.forward

        @functools.wraps(forward)
        def wait_and_forward(*args, **kwargs):
            self._reached.set()
            if not self._opened.wait(PATIENCE):
                raise TimeoutError("The test did not open the gate.")
            return forward(*args, **kwargs)

        model.forward = wait_and_forward

    def __enter__(self) -> "Gate":
        return self

    def __exit__(self, *exception) -> None:
        self.open()

    def wait(self) -> None:
        """Until a pass stands before the gate."""
        assert self._reached.wait(PATIENCE), "no pass has begun"

    def open(self) -> None:
        """Lets this pass and all that follow through."""
        self._opened.set()


def until(condition, seconds: float = PATIENCE) -> None:
    """Waits for a condition to hold."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.01)
