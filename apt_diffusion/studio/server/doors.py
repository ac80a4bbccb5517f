"""Blocks Gradio's endpoints that the studio does not use, and limits uploads by size and free disk space."""

import shutil
from pathlib import Path
from typing import Any

from ..uploads import MAX_BYTES, MAX_PICTURES

CLOSED = (
    "/gradio_api/file=http",  # fetches pages of other servers
    "/gradio_api/file/http",
    "/gradio_api/proxy=",
    "/gradio_api/process_recording",  # keeps videos and runs ffmpeg on them
    "/gradio_api/deep_link",  # keeps what a session has on show, for others
    "/gradio_api/component_server",
    "/gradio_api/dev/",
)
UPLOAD = "/gradio_api/upload"
MAX_UPLOAD = MAX_PICTURES * MAX_BYTES
SPARE_BYTES = 2**30  # uploads leave so much of the disk free


class Doors:
    """ASGI middleware.

    Args:
        app: the wrapped ASGI app.
        upload_folder: where uploads are kept.
    """

    def __init__(self, app: Any, upload_folder: str | Path) -> None:
        self.app = app
        self.upload_folder = Path(upload_folder)

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        path = scope.get("path", "").rstrip("/") if scope["type"] == "http" else ""
        if path.startswith(CLOSED):
            await _refuse(send, 403, "This studio does not use that.")
        elif path == UPLOAD:
            await self._upload(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _upload(self, scope: dict, receive: Any, send: Any) -> None:
        size = int(dict(scope["headers"]).get(b"content-length", b"-1"))
        if not 0 <= size <= MAX_UPLOAD + 2**20:  # browsers always send it; without it nobody knows
            megabytes = MAX_UPLOAD // 2**20
            await _refuse(
                send, 413, f"At most {MAX_PICTURES} pictures, of {megabytes} MB in all, can be sent at once."
            )
        elif shutil.disk_usage(self._existing()).free < size + SPARE_BYTES:
            await _refuse(send, 507, "The server has no space left for uploads. Try again later.")
        else:
            await self.app(scope, receive, send)

    def _existing(self) -> Path:
        return next(folder for folder in (self.upload_folder, *self.upload_folder.parents) if folder.is_dir())


async def _refuse(send: Any, status: int, sentence: str) -> None:
    body = sentence.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
