"""Who draws for the server: an engine in this process. `cluster.py` has the one that asks replicas."""

import abc
import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..io.files import read_adapter_file
from ..serving.engine import Engine
from ..serving.requests import ImageRequest


class Drawn(NamedTuple):
    """A picture, unfinished while `step` is less than `steps`."""

    step: int
    steps: int
    picture: Image.Image

    @property
    def is_preview(self) -> bool:
        """Whether more is to come."""
        return self.step < self.steps


class Painter(abc.ABC):
    """What the server asks of its engines. Errors are those of `Engine.submit` and `Ticket.result`."""

    @abc.abstractmethod
    def draw(self, request: ImageRequest) -> AsyncGenerator[Drawn, None]:
        """Previews, and at last the picture. Closing the iterator cancels the request."""

    @abc.abstractmethod
    async def check_adapter(self, file: Path) -> None:
        """`ValueError` for a file that is damaged or does not fit the model."""

    @abc.abstractmethod
    async def statistics(self) -> dict[str, Any]:
        """Of `Engine.statistics`; empty where they are told elsewhere."""

    @abc.abstractmethod
    async def is_ready(self) -> bool:
        """Whether requests are taken."""


class LocalPainter(Painter):
    """An engine in this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def draw(self, request: ImageRequest) -> AsyncGenerator[Drawn, None]:
        """See `Painter`."""
        loop = asyncio.get_running_loop()
        came: asyncio.Queue[Drawn | None] = asyncio.Queue()

        def tell(drawn: Drawn | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended; nobody listens
                loop.call_soon_threadsafe(came.put_nowait, drawn)

        ticket = self.engine.submit(request, lambda *preview: tell(Drawn(*preview)))
        ticket.add_done_callback(lambda _: tell(None))
        try:
            while (drawn := await came.get()) is not None:
                yield drawn
            yield Drawn(1, 1, ticket.result(0))
        finally:
            ticket.cancel()

    async def check_adapter(self, file: Path) -> None:
        """See `Painter`."""
        await asyncio.to_thread(lambda: self.engine.check_adapter(read_adapter_file(file, with_words=True)))

    async def statistics(self) -> dict[str, Any]:
        """See `Painter`."""
        return self.engine.statistics()

    async def is_ready(self) -> bool:
        """See `Painter`."""
        return not self.engine.is_draining
