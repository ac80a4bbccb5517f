"""ASGI middleware: what a request may cost in bytes and in waiting, before and while anybody reads it."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from .refusals import Refusal

BODY_SECONDS = 60.0  # for a whole body to arrive
SEND_SECONDS = 60.0  # for a client to take a piece of the answer


class Bounds:
    """Refuses bodies that are too large or come too slowly, and leaves clients who do not read their answers.

    Args:
        app: what it stands before.
        max_bytes: path -> bytes of its body.
        body_seconds, send_seconds: see the constants.
    """

    def __init__(
        self,
        app: Any,
        max_bytes: Callable[[str], int],
        body_seconds: float = BODY_SECONDS,
        send_seconds: float = SEND_SECONDS,
    ) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.body_seconds = body_seconds
        self.send_seconds = send_seconds

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.max_bytes(scope["path"])
        until = time.monotonic() + self.body_seconds
        came, is_whole, has_begun = 0, False, False
        refusal: Refusal | None = None

        async def bounded_receive() -> dict:
            nonlocal came, is_whole, refusal
            if is_whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except asyncio.TimeoutError:
                refusal = Refusal(408, f"The request did not arrive within {self.body_seconds:.0f} s.", "too_slow")
                raise refusal from None
            came += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if came > limit:
                refusal = _too_large(limit)
                raise refusal
            return message

        async def bounded_send(message: dict) -> None:
            nonlocal has_begun
            if refusal is None or has_begun:
                has_begun = True
                await asyncio.wait_for(send(message), self.send_seconds)

        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or int(said) > limit:
            refusal = _too_large(limit)
        else:
            try:
                await self.app(scope, bounded_receive, bounded_send)
            except asyncio.TimeoutError:  # a client that does not read its answer
                if not has_begun:
                    raise
            except Refusal:
                if refusal is None:
                    raise
        if refusal is not None and not has_begun:
            refusal.headers["Connection"] = "close"  # what is left of the body is not read
            await refusal.response()(scope, receive, send)


def _too_large(limit: int) -> Refusal:
    size = f"{limit // 2**20} MiB" if limit >= 2**20 else f"{limit // 2**10} KiB"
    return Refusal(413, f"The body of this request may have {size}.", "too_large")
