"""Validates requests: body size, JSON with finite numbers, an existing function, and no files of other visitors."""

import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .answers import Refused, send_refusal

logger = logging.getLogger(__name__)

MAX_JSON = 2**20  # bytes; the mask of a brush is the largest thing that a page sends
UPLOAD = "/gradio_api/upload"
CALLS = re.compile(r"/gradio_api/(?:queue/join|(?:run|api|call)/(?P<name>[^/]+))/?")
SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")
UNEXPECTED = "Something unexpected went wrong. It is in the server's log; please try again."


class Requests:
    """ASGI middleware.

    Args:
        app: what it stands before.
        site: the pages, whose functions are called.
        upload_folder: the only place where files of a request may lie.
        sessions: keeps count of them; see `Sessions`.
    """

    def __init__(self, app: Any, site: Any, upload_folder: str | Path, sessions: Any) -> None:
        self.app = app
        self.site = site
        self.upload_folder = Path(upload_folder).resolve()
        self.sessions = sessions

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = Answer(send)
        path = scope["path"].rstrip("/")
        try:
            if scope["method"] in ("POST", "PUT", "PATCH", "DELETE") and path != UPLOAD:
                body = await read_body(scope, receive, MAX_JSON)
                if path.startswith("/gradio_api/"):
                    self.check(path, body, (scope.get("client") or ("unknown",))[0])
                receive = replayed(body, receive)
            await self.app(scope, receive, answer.send)
        except Refused as refused:
            await send_refusal(send, refused)
        except Exception as error:
            if answer.started:
                raise
            logger.error("A request failed.", exc_info=error)
            await send_refusal(send, Refused(500, UNEXPECTED))

    def check(self, path: str, body: bytes, address: str) -> None:
        """Raises `Refused` for a body that no page of the studio would send."""
        value = parse(body)
        for place in files_in(value):
            if not self._is_upload(place):
                raise Refused(400, "A file must be uploaded first: addresses and paths are not read.")
        session = value.get("session_hash")
        if session is not None and not (isinstance(session, str) and SESSION.fullmatch(session)):
            raise Refused(400, "This is no session of the studio: reload the page.")
        call = CALLS.fullmatch(path)
        if call is not None:
            self._check_call(value, call["name"])
            self.sessions.note(session, address)

    def _check_call(self, value: dict, name: str | None) -> None:
        functions = self.site.fns
        if name not in (None, "predict"):
            function = next((f for f in functions.values() if f.api_name == name), None)
        else:
            index = value.get("fn_index")
            function = functions.get(index) if isinstance(index, int) else None
        if function is None or not function.fn:
            raise Refused(404, "The studio has no such function. If it was restarted, reload the page.")
        data = value.get("data")
        inputs = [block for block in function.inputs if name in (None, "predict") or not block.skip_api]
        if not isinstance(data, list) or len(data) not in (len(inputs), len(function.inputs)):
            raise Refused(400, f"This function takes a list of {len(inputs)} values. Reload the page.")
        for block, part in zip(function.inputs, data, strict=False):
            if len(data) == len(function.inputs) and block.get_block_name() in ("file", "image"):
                _check_file(part)

    def _is_upload(self, place: str) -> bool:
        try:
            return Path(place).is_absolute() and Path(place).resolve().is_relative_to(self.upload_folder)
        except (OSError, ValueError):  # a name that is too long, or has a zero byte
            return False


class Answer:
    """An answer on its way out: what went wrong inside stays inside.

    Args:
        send: of ASGI.
    """

    def __init__(self, send: Any) -> None:
        self.out = send
        self.started = False
        self.hidden = False

    async def send(self, message: dict) -> None:
        """Passes a message of ASGI on; one sentence takes the place of an internal error."""
        if message["type"] == "http.response.start":
            self.started = True
            self.hidden = message["status"] == 500
            if self.hidden:
                await send_refusal(self.out, Refused(500, UNEXPECTED))
        if not self.hidden:
            await self.out(message)


async def read_body(scope: dict, receive: Any, limit: int) -> bytes:
    """The whole body of a request; `Refused` once it has more than `limit` bytes, or says that it will have."""
    said = dict(scope["headers"]).get(b"content-length", b"0")
    if not said.isdigit() or int(said) > limit:
        raise Refused(413, f"A request may have {limit // 2**20} MB.")
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "The request was cut off.")
        body += message.get("body", b"")
        if len(body) > limit:
            raise Refused(413, f"A request may have {limit // 2**20} MB.")
        if not message.get("more_body"):
            return body


def replayed(body: bytes, receive: Any) -> Any:
    """A `receive` of ASGI that gives the body again, then what follows."""
    given = False

    async def again() -> dict:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def parse(body: bytes) -> dict:
    """A JSON object whose numbers are finite; `Refused` for anything else."""
    try:
        value = json.loads(body or b"{}", parse_constant=_refuse_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "The request is not JSON that can be read.") from error
    if not isinstance(value, dict):
        raise Refused(400, "The request must be a JSON object.")
    return value


def files_in(value: Any) -> Iterator[str]:
    """All paths and addresses of files in a request."""
    stack = [value]
    while stack:
        part = stack.pop()
        if isinstance(part, dict):
            if "path" in part or "meta" in part:
                yield str(part.get("path", ""))
            stack.extend(part.values())
        elif isinstance(part, list):
            stack.extend(part)


def _check_file(part: Any) -> None:
    files = part if isinstance(part, list) else [] if part is None else [part]
    for file in files:
        meta = file.get("meta") if isinstance(file, dict) else None
        if not isinstance(meta, dict) or meta.get("_type") != "gradio.FileData":
            raise Refused(400, "A file must be uploaded first.")


def _refuse_number(name: str) -> float:
    raise Refused(400, f"A number must be finite, and {name} is not.")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Refused(400, f"A number must be finite, and {text[:20]} is not.")
    return value
