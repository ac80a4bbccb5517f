"""Bounds the number of browser sessions that the server keeps, because clients choose the session names."""

import contextlib
import threading
import time
from typing import Any

from .answers import Refused

MAX_SESSIONS = 400
MAX_PER_ADDRESS = 200  # a classroom may share one
MAX_UNREAD = 32  # answers of one session that nobody has fetched
IDLE_SECONDS = 1800


class Sessions:
    """Remembers the latest sessions and makes Gradio forget the others.

    Args:
        site: the pages.
    """

    def __init__(self, site: Any) -> None:
        self.site = site
        self._last_use: dict[str, tuple[float, str]] = {}  # the least recently used first
        self._lock = threading.Lock()

    def note(self, session: str | None, address: str) -> None:
        """A session calls a function.

        Raises:
            Refused: where its address has too many sessions, or it leaves its answers unread.
        """
        queue = self.site._queue
        if session is None:
            if len(queue.pending_event_ids_session) > MAX_SESSIONS:
                raise Refused(429, "Too many requests wait for their answers to be fetched. Try again later.")
            return
        if len(queue.pending_event_ids_session.get(session, ())) >= MAX_UNREAD:
            raise Refused(429, "This page has too many unanswered requests. Wait a moment, or reload it.")
        now = time.monotonic()
        with self._lock:
            self._forget_idle(now)
            if session not in self._last_use:
                same = sum(other == address for _, other in self._last_use.values())
                if same >= MAX_PER_ADDRESS or len(self._last_use) >= MAX_SESSIONS:
                    raise Refused(429, "Too many pages are open here. Close some, or try again in half an hour.")
            self._last_use.pop(session, None)
            self._last_use[session] = (now, address)

    def __len__(self) -> int:
        return len(self._last_use)

    def _forget_idle(self, now: float) -> None:
        for session, (used, _) in list(self._last_use.items()):
            if now - used < IDLE_SECONDS:
                return
            del self._last_use[session]
            forget(self.site, session)


def forget(site: Any, session: str) -> None:
    """Drops what Gradio keeps of a session: its unread answers and its components' values."""
    queue = site._queue
    for event in queue.pending_event_ids_session.pop(session, set()):
        queue.event_ids_to_events.pop(event, None)
    with contextlib.suppress(KeyError):
        del queue.pending_messages_per_session[session]
    site.state_holder.session_data.pop(session, None)
    site.state_holder.time_last_used.pop(session, None)
