"""Idempotency keys: a request that is sent again gets the first one's answer, and is not drawn twice."""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from .refusals import Refusal

MAX_KEY = 200  # characters
KEEP_SECONDS = 600.0
MAX_KEPT = 64


class Answers:
    """The answers of the last minutes, by key."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], tuple[bytes, float, asyncio.Task[Any]]] = OrderedDict()

    async def once(self, owner: str, key: str, body: bytes, work: Callable[[], Awaitable[Any]]) -> Any:
        """The answer to `body`; a later request with the same key and body waits for the same.

        Args:
            owner: whose key; others may use the same word.
            key: of the header `Idempotency-Key`.
            body: of the request.
            work: draws; it goes on when the client leaves, who may come back for the answer.

        Raises:
            Refusal: for a key that is too long, or was used for another body.
        """
        if len(key) > MAX_KEY:
            raise Refusal(400, f"An Idempotency-Key may have {MAX_KEY} characters.")
        self._forget()
        digest = hashlib.sha256(body).digest()
        kept = self._kept.get((owner, key))
        if kept is not None and kept[0] != digest:
            raise Refusal(
                422, "This Idempotency-Key was used for another request: take a new one.", "idempotency_key_reused"
            )
        if kept is None:
            task = asyncio.ensure_future(work())
            self._kept[owner, key] = digest, time.monotonic(), task
            task.add_done_callback(lambda done: self._drop_failed(owner, key, done))
        else:
            task = kept[2]
        return await asyncio.shield(task)

    def _drop_failed(self, owner: str, key: str, done: "asyncio.Task[Any]") -> None:
        if done.cancelled() or done.exception() is not None:  # it may be tried again
            self._kept.pop((owner, key), None)

    def _forget(self) -> None:
        old = time.monotonic() - KEEP_SECONDS
        for name, (_, since, task) in list(self._kept.items()):
            if task.done() and (since < old or len(self._kept) > MAX_KEPT):
                del self._kept[name]
