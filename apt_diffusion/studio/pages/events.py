"""How pages answer: with a dict of what changes, and with a sentence where something is wrong."""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from ..charts import problem

logger = logging.getLogger(__name__)

MODEL_QUEUE = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def told(status: gr.HTML, *extra: tuple[gr.components.Component, Any]) -> Callable[[Callable], Callable]:
    """Decorates a handler that returns, or yields, `{component: value}`: its errors become a sentence in `status`.

    Args:
        status: where the sentence goes.
        extra: `(component, value)` to set then, too.
    """

    def decorate(handler: Callable) -> Callable:
        @functools.wraps(handler)
        def answer(*args: Any, **kwargs: Any) -> dict:
            try:
                return handler(*args, **kwargs)
            except Exception as error:
                return {status: problem(in_words(error)), **dict(extra)}

        @functools.wraps(handler)
        def answers(*args: Any, **kwargs: Any) -> Iterator[dict]:
            try:
                yield from handler(*args, **kwargs)
            except Exception as error:
                yield {status: problem(in_words(error)), **dict(extra)}

        return answers if inspect.isgeneratorfunction(handler) else answer

    return decorate


def in_words(error: Exception) -> str:
    """What a visitor reads of an error. What nobody has foreseen goes to the log, and not into the page."""
    if isinstance(error, ValueError | FileNotFoundError):
        return str(error)  # written for people
    logger.error("A page's request failed.", exc_info=error)
    if "out of memory" in str(error).lower():
        return "There is not enough memory for this: choose a smaller size, or fewer pictures."
    if isinstance(error, OSError):
        return f"The server could not read or write a file ({error.strerror or 'no reason given'}). Try again later."
    return "Something unexpected went wrong. It is in the server's log; please try again."
