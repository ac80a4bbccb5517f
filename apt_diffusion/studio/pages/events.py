"""Event handlers of the pages: they return a dict of changed components, and show errors as one sentence."""

import functools
import inspect
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from ..charts import problem, progress

logger = logging.getLogger(__name__)

QUIET = {"show_progress": "hidden", "api_visibility": "private"}
# Who waits for the model waits in the studio's own queue (`turns`), which is fair and says how long it takes.
MODEL_QUEUE = {"concurrency_id": "model", "concurrency_limit": None, **QUIET}
PICTURES_QUEUE = {"concurrency_id": "pictures", "concurrency_limit": 1, **QUIET}  # uploads are decoded one by one
AT_ONCE = {"queue": False, **QUIET}
IN_BROWSER = {"fn": None, **AT_ONCE}  # its JavaScript is all
SENT = "Sent …"
STOPPED = "Stopped."
NOT_TAKEN = "The studio did not take this. Reload the page and try again; if it was restarted, that is enough."


def in_turn(triggers: list, handler: Callable, inputs: Any, status: gr.HTML, outputs: list) -> Any:
    """Runs a handler that uses the model. From the click on `status` says so, and where it is not taken.

    Args:
        triggers: events of components.
        handler: as for `told`.
        inputs: of the handler.
        status: where its errors go.
        outputs: what it may change.
    """
    sent, not_taken = json.dumps(progress(SENT)), json.dumps(problem(NOT_TAKEN))
    gr.on(triggers, inputs=None, outputs=status, js=f"() => {sent}", **IN_BROWSER)
    event = gr.on(triggers, told(status)(handler), inputs, outputs, **MODEL_QUEUE)
    # `told` turns the handler's own errors into answers: what fails never reached it, or was stopped on the way.
    js = f"now => now === {sent} ? {not_taken} : {json.dumps(progress(STOPPED))}"
    event.failure(inputs=status, outputs=status, js=js, **IN_BROWSER)
    return event


def stop(trigger: Any, events: list, status: gr.HTML) -> None:
    """Lets `trigger` end what `in_turn` has started, or take it out of the queue."""
    trigger(outputs=status, js=f"() => {json.dumps(progress(STOPPED))}", **IN_BROWSER)
    trigger(None, cancels=events, **AT_ONCE)


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


def clicked(event: gr.EventData) -> tuple[str, str]:
    """`(action, id)` of a button in a figure; `ValueError` for what no button sends."""
    data = getattr(event, "_data", None)
    action, name = (data.get("action"), data.get("id")) if isinstance(data, dict) else (None, None)
    if not isinstance(action, str) or not isinstance(name, str):
        raise ValueError("This button is not there any more: reload the page.")
    return action, name


def in_words(error: Exception) -> str:
    """What a visitor reads of an error. What nobody has foreseen goes to the log, and not into the page."""
    if type(error) in (ValueError, FileNotFoundError) and getattr(error, "errno", None) is None:
        return str(error)  # written for people: not those of Python's own files, JSON or Unicode, with their paths
    logger.error("A page's request failed.", exc_info=error)
    if "out of memory" in str(error).lower():
        return "There is not enough memory for this: choose a smaller size, or fewer pictures."
    if isinstance(error, OSError):
        return f"The server could not read or write a file ({error.strerror or 'no reason given'}). Try again later."
    return "Something unexpected went wrong. It is in the server's log; please try again."
