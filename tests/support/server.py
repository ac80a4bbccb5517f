"""A server on loopback, in a thread of the test's process."""

import contextlib
import socket
import threading
from pathlib import Path

import uvicorn
from support.gate import until

import apt_diffusion as apt
from apt_diffusion.server.app import build_app
from apt_diffusion.server.bounds import Bounds
from apt_diffusion.server.engines import open_store
from apt_diffusion.server.painters import LocalPainter
from apt_diffusion.server.settings import ServerSettings
from apt_diffusion.serving.engine import Engine


def fill(pipe, folder: Path, randomize) -> None:
    """Adapters `a` (a folder, as a trainer leaves it) and `b` (a file)."""
    for seed, (name, place) in enumerate({"a": folder / "a", "b": folder / "b.safetensors"}.items()):
        apt.add_apt(pipe, apt.APTConfig(num_prompts=6, rank=2), name)
        randomize(pipe, seed)
        pipe.save_apt_weights(place, name)
        pipe.unload_apt_weights()


@contextlib.contextmanager
def served(pipe, settings: ServerSettings, bounds=None):
    """The address and the engine of a server with this pipeline."""
    engine = Engine(pipe, open_store(settings), max_batch_size=settings.max_batch_size, max_queue=settings.max_queue)
    app = build_app(LocalPainter(engine), open_store(settings), settings)
    if bounds is not None:
        next(one for one in app.user_middleware if one.cls is Bounds).kwargs.update(bounds)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", engine
    finally:
        server.should_exit = True
        thread.join()
        engine.close()
