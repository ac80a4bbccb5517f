"""A server in one process: it ends when what it has accepted is drawn."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..serving.engine import Engine

logger = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn's server; at its first signal it goes on until the engine is empty, at the second it ends at once."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain
        self._is_draining = False
        self._task: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._is_draining or (sig == signal.SIGINT and self.should_exit):
            super().handle_exit(sig, frame)
            return
        self._is_draining = True
        logger.warning("Draining: accepted requests are finished, new ones get 503. Another signal ends at once.")
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._task = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        await asyncio.to_thread(self._drain)
        await asyncio.sleep(0.5)  # answers that are ready leave
        self.should_exit = True


def serve(app: FastAPI, engine: Engine, listener: socket.socket, drain_s: float = 120.0) -> None:
    """Serves until SIGTERM or Ctrl+C, and then until the engine is empty.

    Args:
        app: of `app.build_app`.
        engine: of its painter; it is closed at the end.
        listener: of `listen`.
        drain_s: seconds for what was accepted.
    """

    def drain() -> None:
        app.state.server.draining = True
        if not engine.drain(drain_s):
            logger.warning("Not everything could be finished within %.0f s.", drain_s)

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=10,
        limit_concurrency=1000,
        h11_max_incomplete_event_size=2**15,
    )
    try:
        _Server(config, drain).run([listener])
    finally:
        engine.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; `OSError` with a sentence where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise OSError(
            f"The server cannot listen on {host}, port {port} ({error.strerror}): another program uses it, or it is "
            "no address of this computer. Choose another one with --port or --host."
        ) from error
