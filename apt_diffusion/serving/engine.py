"""The engine: draws many requests at once from one base model, each with its own adapters and settings.

Continuous batching: a picture joins and leaves at any denoising step. Every picture runs the stock pipeline in a
thread of its own (`rows.py`); one thread runs the models, and joins into one pass the steps of all pictures of one
shape (`batches.py`). Adapters stay attached while there is room (`residents.py`).

    with Engine(pipe, AdapterStore("adapters")) as engine:
        tickets = [engine.submit(ImageRequest("a sks dog", adapters={"dog": 0.8}, seed=0)), ...]
        pictures = [ticket.result() for ticket in tickets]
"""

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from ..calls import check_idle, prepared_apt
from ..components import components_of
from ..io.files import AdapterFile
from ..model import Call, ModelAdapters
from .batches import Joiner, batch_size, can_join, share_out
from .requests import Draining, ImageRequest, Preview, QueueFull, Ticket
from .residents import Residents, Version
from .rows import Easel, ModelCall, Row
from .store import AdapterStore

_LINGER_S = 0.02  # how long a pass waits for rows that are about to hand in their next call
_CHECK_S = 0.5  # how often deadlines are looked at while nothing else happens
_LOADERS = 2


@dataclass
class _Waiting:
    """A request in the queue; its adapters are read when its turn is near."""

    ticket: Ticket
    adapters: Future[dict[Version, AdapterFile | None]] | None = None


class Engine:
    """Draws requests from one pipeline, which is the engine's until `close`.

    Every method may be called from any thread.

    Args:
        pipeline: a diffusers pipeline that draws from a prompt, ours or a stock one. Adapters that it has are served,
            too, and none of them is active of itself.
        store: the adapters of a folder.
        max_batch_size: pictures that are drawn at once; guidance doubles the rows of a pass.
        max_queue: requests that may wait.
        max_device_bytes: of adapters that stay attached.
        max_pixels: of all pictures that are drawn at once. `None`: `max_batch_size` of the model's own size.

    Raises:
        ValueError: for a limit that is not positive.
        RuntimeError: while a call is under way on this pipeline.
    """

    def __init__(
        self,
        pipeline: Any,
        store: AdapterStore | None = None,
        *,
        max_batch_size: int = 8,
        max_queue: int = 64,
        max_device_bytes: int = 2**30,
        max_pixels: int | None = None,
    ) -> None:
        for name, limit in (
            ("max_batch_size", max_batch_size), ("max_queue", max_queue), ("max_device_bytes", max_device_bytes),
            ("max_pixels", 1 if max_pixels is None else max_pixels),
        ):  # fmt: skip
            if limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit}.")
        check_idle(pipeline)
        self.max_batch_size = max_batch_size
        self.max_queue = max_queue
        self._easel = Easel(pipeline)
        self._residents = Residents(pipeline, store, max_device_bytes, self._easel.vocabulary)
        self.max_pixels = max_pixels or max_batch_size * self._easel.size**2
        self._components = {part: ModelAdapters.of(model) for part, model in components_of(pipeline).items()}
        self._changed = threading.Condition()
        self._waiting: deque[_Waiting] = deque()
        self._rows: set[Row] = set()
        self._calls: list[ModelCall] = []
        self._jobs: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._numbers = itertools.count()
        self._joiner = Joiner()
        self._draining = self._closing = self._broken = False
        self._idle_since = time.monotonic()  # when rows were last given something to go on with
        self._counts: Counter[str] = Counter()
        self._seconds = {"pass_seconds": 0.0, "other_seconds": 0.0}
        self._batch_sizes: Counter[int] = Counter()
        self._seconds_per_picture = 1.0
        self._loaders = ThreadPoolExecutor(_LOADERS, thread_name_prefix="apt-adapters")
        for part, component in self._components.items():
            component.begin_call(Call(samples=(None,)), part)
        self._thread = threading.Thread(target=self._run, name="apt-engine", daemon=True)
        self._thread.start()

    def submit(self, request: ImageRequest, on_preview: Preview | None = None) -> Ticket:
        """Accepts a request.

        Args:
            request: what to draw.
            on_preview: gets `(step, steps, picture)` on the way, `request.num_previews` times at most. It is called by
                a thread of the engine, and must not wait.

        Raises:
            ValueError: for what this model cannot draw, or an unknown adapter.
            QueueFull: with the seconds after which to try again.
            Draining: after `drain` or `close`.
        """
        self._easel.check(request, self.max_pixels)
        for name in request.adapters:
            self._residents.version(name)
        ticket = Ticket(request, on_preview, self._wake)
        with self._changed:
            if self._draining:
                raise Draining("The server is finishing its work and takes no new requests. Try again soon.")
            if len(self._waiting) >= self.max_queue:
                self._counts["refused"] += 1
                rounds = (len(self._waiting) + len(self._rows)) / self.max_batch_size
                seconds = max(1.0, rounds * self._seconds_per_picture)
                raise QueueFull(f"{len(self._waiting)} requests wait already. Try again in {seconds:.0f} s.", seconds)
            self._counts["accepted"] += 1
            self._waiting.append(_Waiting(ticket))
            ticket.set_position(len(self._waiting) - 1)
            self._changed.notify_all()
        return ticket

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused, after `drain`, `close` or an error of the engine's own."""
        return self._draining

    def names(self) -> list[str]:
        """The adapters that can be asked for now."""
        return self._residents.names()

    def check_adapter(self, adapter: AdapterFile) -> None:
        """Attaches an adapter between two passes and takes it off again.

        Raises:
            ValueError: for one that does not fit this model, or that the engine would have no room for.
            Draining: after `close`.
        """
        done: Future[None] = Future()
        with self._changed:
            if self._closing:
                raise Draining("The server is finishing its work.")
            self._jobs.append((lambda: self._residents.try_out(adapter), done))
            self._changed.notify_all()
        done.result()

    def statistics(self) -> dict[str, Any]:
        """Numbers since the start, and of this moment.

        Returns:
            `queued`, `drawing`; `accepted`, `finished`, `failed`, `cancelled`, `refused` (requests); `passes`,
            `retried_passes`, `batch_sizes` (pictures of a pass -> passes), `pass_seconds` (in the denoiser),
            `other_seconds` (text encoders, decoder); `adapters_found` (by tier), `resident_adapters`,
            `resident_bytes`.
        """
        with self._changed:
            names = ("accepted", "finished", "failed", "cancelled", "refused", "passes", "retried_passes")
            return {
                "queued": len(self._waiting),
                "drawing": len(self._rows),
                **{name: int(self._counts[name]) for name in names},
                "batch_sizes": dict(sorted(self._batch_sizes.items())),
                **self._seconds,
                "adapters_found": dict(self._residents.found),
                "resident_adapters": len(self._residents),
                "resident_bytes": self._residents.bytes,
            }

    def drain(self, timeout_s: float | None = None) -> bool:
        """Takes nothing new and waits for what was accepted. Returns whether all of it is over."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._waiting and not self._rows, timeout_s)

    def close(self) -> None:
        """Cancels what is under way and gives the pipeline back as it was."""
        with self._changed:
            self._draining = self._closing = True
            tickets = [waiting.ticket for waiting in self._waiting] + [row.ticket for row in self._rows]
        for ticket in tickets:
            ticket.cancel()
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # The engine's thread: everything below but `_draw` and `_hand_over`, which run in the rows' threads.

    @torch.no_grad()
    def _run(self) -> None:
        try:
            with prepared_apt(self._residents.pipeline):
                while True:
                    self._run_jobs()
                    with self._changed:
                        self._drop_unwanted()
                        starting = self._admitted()
                        group = [] if starting else self._next_group()  # who begins joins the next pass
                        if not starting and not group and not self._jobs:
                            if self._closing and not self._rows and not self._waiting:
                                return
                            self._changed.wait(_LINGER_S if self._calls else _CHECK_S)
                            continue
                    for row, adapters in starting:
                        self._start(row, adapters)
                    if group:
                        self._run_group(group)
                    self._idle_since = time.monotonic()
        except BaseException as error:  # a fault of ours: nobody may wait for ever
            self._abandon(error)
            raise
        finally:
            self._loaders.shutdown(wait=False, cancel_futures=True)
            for component in self._components.values():
                component.end_call()
            self._residents.clear()
            self._easel.close()

    def _abandon(self, error: BaseException) -> None:
        with self._changed:
            self._draining = self._closing = self._broken = True
            queue, calls = list(self._waiting), list(self._calls)
            jobs = list(self._jobs)
            self._jobs.clear()
            self._waiting.clear()
            self._calls.clear()
        for waiting in queue:
            self._fail(waiting.ticket, error)
        for call in calls:
            call.error = error
            call.finished.set()
        for _, done in jobs:
            done.set_exception(error)

    def _run_jobs(self) -> None:
        while self._jobs:
            job, done = self._jobs.popleft()
            try:
                job()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    def _drop_unwanted(self) -> None:
        for waiting in list(self._waiting):
            try:
                waiting.ticket.check()
            except Exception as error:
                self._waiting.remove(waiting)
                self._fail(waiting.ticket, error)

    def _admitted(self) -> list[tuple[Row, dict[Version, AdapterFile | None]]]:
        """Takes from the queue what can be begun, in order; one whose adapters are still read lets others pass."""
        starting = []
        for waiting in list(self._waiting)[: 2 * self.max_batch_size]:
            if waiting.adapters is None:
                waiting.adapters = self._fetched(waiting.ticket.request)
            if not waiting.adapters.done():
                continue
            if waiting.adapters.exception() is not None:
                self._waiting.remove(waiting)
                self._fail(waiting.ticket, waiting.adapters.exception())
                continue
            adapters = waiting.adapters.result()
            if len(self._rows) >= self.max_batch_size or not self._has_room(waiting.ticket, adapters):
                break
            self._waiting.remove(waiting)
            waiting.ticket.set_position(0)
            row = Row(next(self._numbers), waiting.ticket, None, self._easel)
            self._rows.add(row)
            starting.append((row, adapters))
            if any(adapters.values()):  # it is attached before the next one is asked whether there is room
                break
        for position, waiting in enumerate(self._waiting):
            waiting.ticket.set_position(position)
        return starting

    def _fetched(self, request: ImageRequest) -> Future[dict[Version, AdapterFile | None]]:
        if not request.adapters:  # nothing to read: it keeps its place in the queue
            nothing: Future[dict[Version, AdapterFile | None]] = Future()
            nothing.set_result({})
            return nothing

        def fetch() -> dict[Version, AdapterFile | None]:
            try:
                return dict(self._residents.fetch(name) for name in request.adapters)
            finally:
                self._wake()

        future = self._loaders.submit(fetch)
        future.add_done_callback(lambda _: self._wake())
        return future

    def _has_room(self, ticket: Ticket, adapters: dict[Version, AdapterFile | None]) -> bool:
        pixels = sum(_pixels(self._easel, row.ticket) for row in self._rows)
        fits = not self._rows or pixels + _pixels(self._easel, ticket) <= self.max_pixels
        return fits and self._residents.fits(adapters)

    def _start(self, row: Row, adapters: dict[Version, AdapterFile | None]) -> None:
        request = row.ticket.request
        try:
            sample = {}
            for version, adapter in adapters.items():
                taken, name = self._residents.attach(version, adapter)
                row.held.append(taken)
                sample[name] = request.adapters[version[0]] * request.apt_scale
            row.sample = sample or None
            row.words = self._residents.words(row.held)
        except Exception as error:
            failure = error
            self._end(row, lambda: self._fail(row.ticket, failure))
            return
        threading.Thread(target=self._draw, args=(row,), name="apt-picture", daemon=True).start()

    def _next_group(self) -> list[ModelCall]:
        """The calls of the next pass; none while rows are about to hand in theirs."""
        if not self._calls:
            return []
        if any(row.expected for row in self._rows) and time.monotonic() - self._idle_since < _LINGER_S:
            return []
        # Text encoders and decoders first: rows that begin join the next pass, and rows that end make room.
        other = next((call for call in self._calls if not call.is_denoising), None)
        if other is not None:
            self._calls.remove(other)
            return [other]
        first = self._calls[0]
        group = [call for call in self._calls if call is first or _can_share(first, call)]
        self._calls = [call for call in self._calls if call not in group]
        return sorted(group, key=lambda call: call.row.number)

    def _run_group(self, group: list[ModelCall]) -> None:
        """One pass. If it fails, each row's part is tried alone: a row's fault is not its neighbours'."""
        begun = time.monotonic()
        try:
            results = self._pass(group)
        except Exception as error:
            if len(group) == 1:
                group[0].error = error
            else:
                self._counts["retried_passes"] += 1
                for call in group:
                    self._run_group([call])
                return
        else:
            for call, result in zip(group, results, strict=True):
                call.result = result
        seconds = time.monotonic() - begun
        with self._changed:
            if group[0].is_denoising:
                self._counts["passes"] += 1
                self._batch_sizes[len(group)] += 1
                self._seconds["pass_seconds"] += seconds
            else:
                self._seconds["other_seconds"] += seconds
            for call in group:
                call.row.expected = True
        for call in group:
            call.finished.set()

    def _pass(self, group: list[ModelCall]) -> list[Any]:
        first = group[0]
        adapters = self._components.get(first.part)
        if not first.is_denoising:
            if adapters is not None:
                adapters.share_out((first.row.sample,))
            with self._easel.vocabulary.lent(first.part, first.row.words):
                return [first.function(**first.arguments)]
        sizes = [batch_size(call.arguments) for call in group]
        assert adapters is not None  # denoisers are components that can carry adapters
        adapters.share_out(
            tuple(call.row.sample for call, size in zip(group, sizes, strict=True) for _ in range(size))
        )
        return share_out(first.function(**self._joiner.join([call.arguments for call in group])), sizes)

    def _draw(self, row: Row) -> None:
        begun = time.monotonic()
        try:
            image = row.draw(self._hand_over)
        except BaseException as error:  # whatever it is: somebody waits for this ticket
            failure = error
            self._end(row, lambda: self._fail(row.ticket, failure))
            return
        seconds = time.monotonic() - begun
        with self._changed:
            self._counts["finished"] += 1
            self._seconds_per_picture += 0.1 * (seconds - self._seconds_per_picture)
        self._end(row, lambda: row.ticket.finish(image))

    def _hand_over(self, call: ModelCall) -> Any:
        call.row.ticket.check()
        with self._changed:
            if self._broken:
                raise RuntimeError("The engine has stopped after an error of its own; its log says which.")
            call.row.expected = False
            self._calls.append(call)
            self._changed.notify_all()
        call.finished.wait()
        if call.error is not None:
            raise call.error
        return call.result

    def _end(self, row: Row, tell: Callable[[], None]) -> None:
        """The row's place and adapters are free before its owner is told."""
        with self._changed:
            self._rows.discard(row)
            for version in row.held:
                self._residents.release(version)
        tell()
        self._wake()

    def _fail(self, ticket: Ticket, error: BaseException | None) -> None:
        self._counts["cancelled" if isinstance(error, CancelledError) else "failed"] += 1
        ticket.fail(error or RuntimeError("The picture could not be drawn."))


def _can_share(first: ModelCall, call: ModelCall) -> bool:
    return call.part == first.part and can_join(first.arguments, call.arguments)


def _pixels(easel: Easel, ticket: Ticket) -> int:
    width, height = easel.size_of(ticket.request)
    return width * height
