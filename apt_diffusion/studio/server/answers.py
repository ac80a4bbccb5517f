"""HTTP responses that the server sends itself, before Gradio handles the request."""

import json
from typing import Any


class Refused(Exception):
    """A request that is not passed on.

    Args:
        status: of HTTP.
        sentence: for whoever sent it; names cause and remedy.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence


async def send_refusal(send: Any, refused: Refused) -> None:
    """The refusal as JSON: `detail` is where Gradio's clients look for the reason."""
    body = json.dumps({"detail": refused.sentence, "error": refused.sentence}, ensure_ascii=False).encode()
    headers = [
        (b"content-type", b"application/json; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # what is left of the body is not read
    ]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
