"""Runs long work in a thread and yields its progress step by step from a generator."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """Raised inside the work after its generator was closed."""


class Watcher:
    """The work's connection to its generator: `emit` yields a value there, or raises `Stopped` if it was closed."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue = queue.SimpleQueue()
        self.is_stopped = threading.Event()

    def emit(self, value: object) -> None:
        """Yields a value from the generator; raises `Stopped` if the generator was closed."""
        if self.is_stopped.is_set():
            raise Stopped
        self.queue.put(("value", value))


def in_background(work: Callable[[Watcher], None]) -> Iterator:
    """Runs `work(watcher)` in a thread and yields what it emits. Its exception is raised here.

    Closing the generator stops the work at its next `emit`. Take locks inside the work, so that a generator that is
    abandoned half-way holds none.
    """
    watcher = Watcher()

    def run() -> None:
        try:
            work(watcher)
            watcher.queue.put(("end", None))
        except BaseException as error:  # handed to the reader, whatever it is
            watcher.queue.put(("error", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = watcher.queue.get()
            if kind == "end":
                return
            if kind == "error":
                if not isinstance(value, Stopped):
                    raise value
                return
            yield value
    finally:
        watcher.is_stopped.set()
