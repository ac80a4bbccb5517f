"""What is told of the server's work: numbers for Prometheus, and one line of the log per request."""

import json
import logging
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class Metrics:
    """The numbers of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.answers = Counter(
            "apt_http_requests", "Answers by route and status.", ("route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "apt_http_request_seconds", "From request to answer.", ("route",), buckets=_SECONDS, registry=self.registry
        )

    def text(self, statistics: Mapping[str, Any]) -> bytes:
        """The page for Prometheus.

        Args:
            statistics: of `Engine.statistics`, or empty.
        """
        registry = CollectorRegistry()
        registry.register(_OfEngine(statistics))
        return generate_latest(self.registry) + (generate_latest(registry) if statistics else b"")


class _OfEngine:
    """A collector of `prometheus_client` for the statistics of an engine."""

    def __init__(self, statistics: Mapping[str, Any]) -> None:
        self.statistics = statistics

    def collect(self) -> Iterator[Metric]:
        """The statistics as Prometheus has them."""
        numbers = self.statistics
        if not numbers:
            return
        for name, text in (
            ("queued", "Requests that wait."),
            ("drawing", "Pictures that are being drawn."),
            ("resident_adapters", "Adapters that are attached to the model."),
            ("resident_bytes", "Bytes of attached adapters."),
        ):
            yield GaugeMetricFamily(f"apt_engine_{name}", text, value=numbers[name])
        requests = CounterMetricFamily("apt_engine_requests", "Requests by what became of them.", labels=("outcome",))
        for outcome in ("accepted", "finished", "failed", "cancelled", "refused"):
            requests.add_metric((outcome,), numbers[outcome])
        yield requests
        found = CounterMetricFamily(
            "apt_engine_adapters_found", "Where adapters were when asked for.", labels=("tier",)
        )
        for tier, count in numbers["adapters_found"].items():
            found.add_metric((tier,), count)
        yield found
        for name, text in (
            ("pass_seconds", "Time in the denoiser."),
            ("other_seconds", "Time in text encoders and decoder."),
            ("retried_passes", "Passes that failed and were tried row by row."),
        ):
            yield CounterMetricFamily(f"apt_engine_{name}", text, value=numbers[name])
        total, buckets, pictures = 0, [], 0
        for size, passes in numbers["batch_sizes"].items():
            total, pictures = total + passes, pictures + size * passes
            buckets.append((str(float(size)), float(total)))
        yield HistogramMetricFamily(
            "apt_engine_batch_size", "Pictures of a denoising pass.", [*buckets, ("+Inf", float(total))], pictures
        )


class Observed:
    """ASGI middleware: every request gets an id, a line in the log, and its place in the metrics.

    Args:
        app: what it stands before.
        metrics: of the server.
    """

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        begun = time.monotonic()
        status = 500

        async def observed_send(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, observed_send)
        finally:
            self._note(scope, request_id, status, time.monotonic() - begun)

    def _note(self, scope: dict, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.answers.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        told = scope.get("state", {})
        line = {
            "request_id": request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 3),
            **{name: told[name] for name in ("key", "model", "prompt") if name in told},
        }
        logger.info(json.dumps(line, ensure_ascii=False))
