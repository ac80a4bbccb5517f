"""Security headers: which origins may call the server, and what a browser may do with its pages."""

import re
import secrets
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders

from .answers import Refused, send_refusal

SCRIPT_TAG = re.compile(rb"<script(?=[\s>])")
POLICY = (
    "default-src 'none'; "
    # Gradio's own scripts compile the pages' short ones: they need eval. Inline handlers stay forbidden.
    "script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; media-src 'self' blob:; "
    "worker-src 'self' blob:; manifest-src 'self'; frame-ancestors 'self'; base-uri 'self'; form-action 'self'"
)
FIXED = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "referrer-policy": "same-origin",  # without one, a form of our own would have no origin either
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=()",
}


class SecurityHeaders:
    """ASGI middleware: refuses what other sites' pages send, and sends a Content-Security-Policy with every answer.

    Scripts of the page itself carry a number that is new for each page: what a visitor smuggles into it does not run.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        page = Page(send)
        asked = Headers(scope=scope)
        if not is_same_origin(asked):
            await send_refusal(page.send, Refused(403, "Only the studio's own pages may send this."))
            return
        if is_page(scope):  # its scripts are marked below: not compressed
            headers = [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]
            scope = {**scope, "headers": headers}
        await self.app(scope, receive, page.send)


class Page:
    """An answer on its way out.

    Args:
        send: of ASGI.
    """

    def __init__(self, send: Any) -> None:
        self.out = send
        self.nonce = secrets.token_urlsafe(16)
        self.start: dict | None = None  # of an HTML page, until all of it is there
        self.body = b""

    async def send(self, message: dict) -> None:
        """Passes a message of ASGI on, with headers; HTML is held back until its scripts can be marked."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message["headers"]))
            headers.update(FIXED | {"content-security-policy": POLICY.format(nonce=self.nonce)})
            for name in [name for name in headers if name.startswith("access-control-")]:
                del headers[name]
            message = {**message, "headers": headers.raw}
            if headers.get("content-type", "").startswith("text/html"):
                headers["cache-control"] = "no-store"
                self.start = message
                return
        elif self.start is not None:
            self.body += message.get("body", b"")
            if message.get("more_body"):
                return
            body = SCRIPT_TAG.sub(f'<script nonce="{self.nonce}"'.encode(), self.body)
            headers = MutableHeaders(raw=self.start["headers"])
            if "content-length" in headers:
                headers["content-length"] = str(len(body))
            await self.out(self.start)
            self.start, message = None, {**message, "body": body}
        await self.out(message)


def is_page(scope: dict) -> bool:
    """Whether a request asks for a page, not for a part of one."""
    return scope["method"] == "GET" and b"text/html" in dict(scope["headers"]).get(b"accept", b"")


def is_same_origin(headers: Headers) -> bool:
    """Whether a request comes from the studio's own page, or from no page. Browsers say so, and pages cannot lie."""
    origin = headers.get("origin")
    if origin is None:
        return headers.get("sec-fetch-site", "none") != "cross-site" or headers.get("sec-fetch-mode") == "navigate"
    hosts = {headers.get("host", ""), headers.get("x-forwarded-host", "")} - {""}
    return urlsplit(origin).netloc in hosts
