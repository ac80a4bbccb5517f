"""Serves the pages: the server around Gradio's, its order of checks, and how it ends."""

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute

from ..pages.page import head
from ..pages.style import CSS, theme
from ..studio import Studio
from ..uploads import MAX_BYTES
from ..visitors import VisitorCookie
from .admin import Admin
from .doors import Doors
from .headers import SecurityHeaders
from .requests import Requests
from .routes import routes
from .sessions import MAX_SESSIONS, Sessions
from .sweep import Bound, every, sweep

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 60
UPLOADS = Bound(seconds=6 * 3600, count=5_000, size=4 * 2**30)  # Gradio's copies of uploads and of its API's pictures
GOODBYE_SECONDS = 1  # open connections have so long to end by themselves
THREADS = 100  # who waits for the model holds one


def build_app(site: gr.Blocks, studio: Studio, admin_token: str | None = None) -> FastAPI:
    """The whole server as an ASGI application.

    Args:
        site: of `pages.site.build_site`.
        studio: that the pages use.
        admin_token: opens the owner's page; without one there is none.
    """
    uploads = get_upload_folder()
    middleware = [
        Middleware(SecurityHeaders),
        # No other site may read anything; where this stands, Gradio adds no rule of its own.
        Middleware(CORSMiddleware, allow_origins=[]),
        Middleware(Requests, site, uploads, Sessions(site)),
        Middleware(Doors, uploads),
        Middleware(VisitorCookie),
    ]
    admin = Admin(studio, admin_token)
    own: list[BaseRoute] = [*admin.routes(), *routes(studio.library, studio.drawings)]
    app = FastAPI(openapi_url=None, middleware=middleware, routes=own)
    site.max_threads = THREADS
    gr.mount_gradio_app(
        app,
        site,
        path="/",
        theme=theme(),
        css=CSS,
        head=head(),
        max_file_size=MAX_BYTES,
        footer_links=["api"],
        run_history=False,  # on a shared computer the next person would see it
        ssr_mode=False,
        show_error=False,  # the pages' own words stand in their status lines
        enable_monitoring=False,
    )
    site.has_launched = True  # Gradio checks paths of files only then
    site.state_holder.capacity = MAX_SESSIONS
    return app


def serve(
    app: Any,
    studio: Studio,
    host: str,
    port: int,
    share: bool = False,
    farewell: Callable[[], None] = lambda: None,
) -> None:
    """Serves until the process is interrupted or terminated; open pages do not hold it up.

    Args:
        app: of `build_app`.
        studio: whose files are kept within bounds.
        host: the address to listen on.
        port: the port to listen on.
        share: through a tunnel of gradio.live, too; where there is none, a sentence says so, and it goes on without.
        farewell: called before a signal ends the process.

    Raises:
        OSError: where the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=128)
    uploads = Path(get_upload_folder())

    def clean() -> None:
        sweep(uploads, UPLOADS, time.time())
        studio.drawings.sweep()

    ended = every(SWEEP_SECONDS, clean)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=GOODBYE_SECONDS,
    )
    try:
        Server(config, lambda: announce(host, listener.getsockname()[1], share), farewell).run(sockets=[listener])
    finally:
        ended.set()
        listener.close()


class Server(uvicorn.Server):
    """Uvicorn that says when it is ready, and ends soon after a signal: open pages and drawings do not hold it up.

    Args:
        config: of uvicorn.
        ready: called then.
        farewell: called before the process ends by a signal; else nothing of it may be left.
    """

    def __init__(
        self, config: uvicorn.Config, ready: Callable[[], None], farewell: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(config)
        self.ready = ready
        self.farewell = farewell

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn's; what has not ended by itself after `GOODBYE_SECONDS` is not waited for."""
        super().handle_exit(sig, frame)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of connections that are cut off now
        leaving = threading.Timer(GOODBYE_SECONDS + 0.5, self._leave)
        leaving.daemon = True
        leaving.start()

    def _leave(self) -> None:
        self.farewell()
        os._exit(0)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, then `ready`."""
        await super().startup(sockets)
        if self.started:
            self.ready()


def announce(host: str, port: int, share: bool) -> None:
    """Prints where the studio is open, and with `share` opens its tunnel."""
    shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    address = f"http://{shown}:{port}/"
    print(f"The studio is open at {address} (Ctrl-C ends it).", flush=True)
    if share:
        public = open_tunnel(port)
        if public:
            print(f"For a week everybody who has this link can use it: {public}", flush=True)


def open_tunnel(port: int) -> str | None:
    """A public address for this computer's port, `None` with a sentence in the log where there is none."""
    from gradio import networking

    try:
        return networking.setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
    except Exception as error:  # the network, the tunnel's program, its certificate
        logger.error(
            "There is no public link: gradio.live cannot be reached, or its tunnel program cannot be downloaded "
            "(%s). The studio goes on without.",
            type(error).__name__,
        )
        return None
