"""The same server on Ray Serve: one door for HTTP, and any number of engines behind it, on one computer or many.

`serve.yaml` names `apt_diffusion.server.cluster:build`. Ray starts replicas, scales their number by their queues,
replaces those that die, and updates them one by one. Here is only what is ours: a request whose engine dies is sent to
another one, once; the door answers 503 with `Retry-After` while everything ends.
"""

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import AsyncGenerator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError

from ..serving.requests import Draining, ImageRequest, QueueFull
from .app import build_app
from .engines import open_engine, open_store, with_defaults
from .keys import Keyring
from .painters import Drawn, LocalPainter, Painter
from .settings import ServerSettings
from .signing import signer_of

logger = logging.getLogger(__name__)

APP = "apt-diffusion"
DRAIN_S = 120.0
READY_S = 60.0  # as long as `serve.start` waits for the door
_STATISTICS_S = 5.0


class EngineReplica:
    """One engine. Ray waits at its end until what it has accepted is drawn."""

    def __init__(self, settings: ServerSettings) -> None:
        self.engine = open_engine(settings)
        self.painter = LocalPainter(self.engine)
        _tell_ray(self.engine.statistics)

    async def draw(self, request: ImageRequest) -> AsyncGenerator[Drawn, None]:
        """See `Painter`."""
        async for drawn in self.painter.draw(request):
            yield drawn

    async def check_adapter(self, file: str) -> None:
        """See `Painter`."""
        await self.painter.check_adapter(Path(file))

    def check_health(self) -> None:
        """Ray replaces a replica whose engine has stopped."""
        if self.engine.is_draining:
            raise RuntimeError("The engine has stopped.")


class ReplicaPainter(Painter):
    """Asks the replicas.

    Args:
        handle: of their deployment.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.under_way = 0  # pictures

    async def draw(self, request: ImageRequest) -> AsyncGenerator[Drawn, None]:
        """See `Painter`."""
        self.under_way += 1
        try:
            async with contextlib.aclosing(self._drawn_by_any(request)) as steps:
                async for drawn in steps:
                    yield drawn
        finally:
            self.under_way -= 1

    async def _drawn_by_any(self, request: ImageRequest) -> AsyncGenerator[Drawn, None]:
        for is_last_try in (False, True):
            steps = self.handle.options(stream=True).draw.remote(request)
            try:
                async for drawn in steps:
                    yield drawn
                return
            except BackPressureError as error:
                raise QueueFull("All engines have as many requests as they accept.", 5.0) from error
            except RayActorError as error:
                if is_last_try:
                    raise Draining("Two engines have died over this picture. Try again soon.") from error
                logger.warning("An engine has died; its request goes to another one.")
            except RayTaskError as error:  # a whole traceback; the engine's own error is in it
                raise error.cause from None
            finally:
                steps.cancel()

    async def check_adapter(self, file: Path) -> None:
        """See `Painter`."""
        try:
            await self.handle.check_adapter.remote(str(file))
        except RayTaskError as error:
            raise error.cause from None

    async def statistics(self) -> dict[str, Any]:
        """Empty: every replica tells its own to Ray's metrics."""
        return {}

    async def is_ready(self) -> bool:
        """Ray's proxy sends nothing here before it is."""
        return True


class Door:
    """Takes requests of HTTP: keys, limits, forms, answers. It needs no GPU."""

    def __init__(self, engines: Any, settings: ServerSettings) -> None:
        self.engines = engines
        self.settings = settings
        logging.getLogger(__package__).setLevel(logging.INFO)

    def __serve_build_asgi_app__(self) -> Any:
        self.painter = ReplicaPainter(self.engines)
        self.application = build_app(self.painter, open_store(self.settings), self.settings)
        return self.application

    async def drain(self) -> None:
        """From now on new requests get 503; returns once all accepted pictures are drawn."""
        self.application.state.server.draining = True
        while self.painter.under_way:
            await asyncio.sleep(0.1)


def build(args: dict[str, Any]) -> Any:
    """The application for Ray Serve.

    Args:
        args: fields of `ServerSettings`; `replicas`, a number or Ray's `autoscaling_config`; `engine_options` and
            `door_options`, Ray's options of the two deployments, such as `{"ray_actor_options": {"num_gpus": 1}}`.

    Raises:
        TypeError: for a field that there is not.
    """
    args = dict(args)
    replicas = args.pop("replicas", 1)
    options = {"engine": args.pop("engine_options", {}), "door": args.pop("door_options", {})}
    settings = with_defaults(ServerSettings(**args))
    ongoing = settings.max_batch_size + settings.max_queue
    if isinstance(replicas, dict):
        # One more engine where those that there are have more than a full batch each.
        scaling = {"target_ongoing_requests": settings.max_batch_size, **replicas}
        number: dict[str, Any] = {"autoscaling_config": scaling}
    else:
        number = {"num_replicas": replicas}
    engines = _deployment(EngineReplica).options(
        **{
            "name": "Engine",
            "max_ongoing_requests": ongoing,
            "graceful_shutdown_timeout_s": DRAIN_S,
            "health_check_period_s": 5,
            **number,
            **options["engine"],
        }
    )
    door = _deployment(serve.ingress()(Door)).options(
        **{
            "name": "Door",
            "max_ongoing_requests": 1000,
            "graceful_shutdown_timeout_s": DRAIN_S,
            **options["door"],
        }
    )
    return door.bind(engines.bind(settings), settings)


def _deployment(cls: Any) -> Any:
    return serve.deployment(cls)  # its annotation is that of the decorator with arguments


def run(settings: ServerSettings, replicas: int, host: str, port: int) -> None:
    """Serves on this computer until SIGTERM or Ctrl+C, and then until what was accepted is drawn.

    Raises:
        FileNotFoundError, ValueError: for a file of keys that cannot be read.
    """
    Keyring(settings.keys)
    signer_of(settings)
    ended = threading.Event()
    # Ray kills a door that has not come up in 5 s; on a busy computer its imports alone take longer.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", str(READY_S))
    ray.init(include_dashboard=False, log_to_driver=True, logging_level=logging.WARNING)
    for sign in (signal.SIGTERM, signal.SIGINT):  # after ray.init, which has handlers of its own
        signal.signal(sign, lambda *_: ended.set())
    try:
        serve.start(http_options={"host": host, "port": port})
        absolute = asdict(settings) | {
            "adapters": str(Path(settings.adapters).expanduser().resolve()),
            "keys": settings.keys and str(Path(settings.keys).expanduser().resolve()),
        }
        options = {"engine_options": {"ray_actor_options": _share(replicas)}}
        options["door_options"] = {"ray_actor_options": {"num_cpus": 0}}
        serve.run(build({**absolute, **options, "replicas": replicas}), name=APP, route_prefix="/")
        logger.warning("Serving %s on http://%s:%d by %d replicas", settings.model, host, port, replicas)
        ended.wait()
        logger.warning("Draining: accepted requests are finished, new ones get 503.")
        # Before the application goes: from then on Ray's proxy knows no route, and answers 404.
        with contextlib.suppress(TimeoutError):
            serve.get_app_handle(APP).drain.remote().result(timeout_s=DRAIN_S)
        serve.delete(APP)
    finally:
        serve.shutdown()
        ray.shutdown()


def _share(replicas: int) -> dict[str, float]:
    """What each replica takes of this computer: the owner has chosen their number, so that all of them must fit."""
    gpus = ray.cluster_resources().get("GPU", 0)
    return {"num_cpus": 0, "num_gpus": min(1.0, gpus / replicas)} if gpus else {"num_cpus": 0}


def _tell_ray(statistics: Any) -> None:
    """Gives the engine's numbers to Ray's metrics, tagged with the replica, as long as the process lives."""
    from ray.util.metrics import Gauge

    gauges: dict[str, Gauge] = {}

    def tell() -> None:
        for name, value in _numbers(statistics()).items():
            if name not in gauges:
                gauges[name] = Gauge(f"apt_engine_{name}", f"{name} of one engine; see docs/server.md.")
            gauges[name].set(value)
        timer = threading.Timer(_STATISTICS_S, tell)
        timer.daemon = True
        timer.start()

    tell()


def _numbers(statistics: dict[str, Any]) -> dict[str, float]:
    """The statistics as plain numbers; sums where there is one by tier or size."""
    plain = {name: value for name, value in statistics.items() if not isinstance(value, dict)}
    found = {f"adapters_found_{tier}": count for tier, count in statistics["adapters_found"].items()}
    pictures = sum(size * passes for size, passes in statistics["batch_sizes"].items())
    return {**plain, **found, "batch_size_sum": pictures}
