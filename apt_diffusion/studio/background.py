"""Long work in a thread, watched step by step from a generator."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """Raised inside the work when nobody wants its result any more."""


class Watcher:
    """What the work calls: `emit` hands something out, and raises `Stopped` once the generator was closed."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue = queue.SimpleQueue()
        self.is_stopped = threading.Event()

    def emit(self, value: object) -> None:
        """Hands a value to who iterates; raises `Stopped` where nobody does any more."""
        if self.is_stopped.is_set():
            raise Stopped
        self.queue.put(("value", value))


def in_background(work: Callable[[Watcher], None]) -> Iterator:
    """Runs `work(watcher)` in a thread and yields what it emits. Its exception is raised here.

    Whoever drops the generator stops the work at its next `emit`. Locks belong inside the work: a generator that is
    forgotten half-way holds none.
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
