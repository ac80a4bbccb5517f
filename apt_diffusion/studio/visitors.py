"""Identifies visitors by a random cookie per browser. A visitor's folder can be found only with the cookie."""

import hashlib
import re
import secrets
from typing import Any

from .turns import Who

COOKIE = "apt_studio"
_TOKEN = re.compile(r"[A-Za-z0-9_-]{32,64}")
_YEAR = 365 * 24 * 3600


def visitor_of(request: Any) -> str:
    """The name of the visitor's folder: 32 hexadecimal digits, which tell nothing of the cookie.

    A client without cookies is one visitor per session.

    Args:
        request: `gradio.Request`, or anything with `cookies` and `session_hash`.
    """
    token = request.cookies.get(COOKIE, "")
    known = token if _TOKEN.fullmatch(token) else f"session {getattr(request, 'session_hash', None)}"
    return hashlib.sha256(known.encode()).hexdigest()[:32]


def who_of(request: Any) -> Who:
    """The visitor and the address of a request."""
    return Who(visitor_of(request), address_of(request))


def address_of(request: Any) -> str:
    """The address of a visitor's computer, or of the router or proxy in front of it."""
    client = getattr(request, "client", None)
    return str(getattr(client, "host", "") or "")


class VisitorCookie:
    """ASGI middleware: gives every browser that opens the page a cookie, which scripts cannot read."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        is_page = scope["type"] == "http" and scope["path"] in ("", "/")
        if not is_page or self._has_cookie(scope):
            await self.app(scope, receive, send)
            return
        cookie = f"{COOKIE}={secrets.token_urlsafe(32)}; Path=/; Max-Age={_YEAR}; HttpOnly; SameSite=Lax"

        async def send_with_cookie(message: dict) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"set-cookie", cookie.encode())]
            await send(message)

        await self.app(scope, receive, send_with_cookie)

    @staticmethod
    def _has_cookie(scope: dict) -> bool:
        sent = b";".join(value for name, value in scope["headers"] if name == b"cookie").decode("latin-1")
        pairs = (pair.strip().partition("=") for pair in sent.split(";"))
        return any(name == COOKIE and _TOKEN.fullmatch(value) for name, _, value in pairs)
