"""The owner's page, `/studio/admin`: what runs, who uses how much, and what is published; behind a token."""

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from ..charts import escape
from ..library import VISITORS
from ..studio import Studio
from ..visitors import address_of

COOKIE = "apt_studio_owner"
PAGE = "/studio/admin"
MAX_TRIES = 10  # wrong tokens of one address in a minute
MEGABYTE = 2**20
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:1rem auto;padding:0 1rem;color:#0f172a;"
    "background:#fff}table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.3rem .6rem;"
    "border-bottom:1px solid #cbd5e1}button,input{font:inherit;padding:.3rem .7rem}"
    "@media(prefers-color-scheme:dark){body{color:#e2e8f0;background:#020617}}"
)


class Admin:
    """The owner's page.

    Args:
        studio: what is looked after.
        token: lets the owner in; without one the page does not exist.
        clock: seconds that never go back.
    """

    def __init__(self, studio: Studio, token: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.studio = studio
        self.token = token
        self.clock = clock
        self._tries: dict[str, deque[float]] = {}

    def routes(self) -> list[Route]:
        """Its addresses; none without a token."""
        if not self.token:
            return []
        return [Route(PAGE, self._show), Route(PAGE, self._act, methods=["POST"])]

    async def _show(self, request: Request) -> Response:
        if not self._is_owner(request):
            return _page("<h1>APT studio: the owner's page</h1>" + _LOGIN)
        return _page(await run_in_threadpool(self._overview, ""))

    async def _act(self, request: Request) -> Response:
        form = {key: str(value) for key, value in (await request.form()).items()}
        if form.get("do") == "enter":
            return self._enter(request, form.get("token", ""))
        if not self._is_owner(request):
            return _page("<h1>Only the owner may do this.</h1>" + _LOGIN, 403)
        return _page(await run_in_threadpool(self._do, form.get("do", ""), form.get("what", "")))

    def _enter(self, request: Request, token: str) -> Response:
        address, now = address_of(request), self.clock()
        tries = self._tries.setdefault(address, deque(maxlen=MAX_TRIES))
        if len(tries) == MAX_TRIES and now - tries[0] < 60:
            return _page("<h1>Too many wrong tokens. Try again in a minute.</h1>", 429)
        if not secrets.compare_digest(token.encode(), str(self.token).encode()):
            tries.append(now)
            while len(self._tries) > 1000:
                del self._tries[next(iter(self._tries))]
            return _page("<h1>This is not the token.</h1>" + _LOGIN, 403)
        answer = RedirectResponse(PAGE, 303)
        answer.set_cookie(COOKIE, self._proof(), max_age=12 * 3600, httponly=True, samesite="strict", path=PAGE)
        return answer

    def _is_owner(self, request: Request) -> bool:
        return secrets.compare_digest(request.cookies.get(COOKIE, "").encode(), self._proof().encode())

    def _proof(self) -> str:
        return hashlib.sha256(f"owner {self.token}".encode()).hexdigest()

    def _do(self, what: str, name: str) -> str:
        library = self.studio.library
        try:
            if what == "stop":
                self.studio.trainings.cancel(name)
                said = "The training stops after its step."
            elif what == "unpublish":
                library.remove_public(library.find("0" * 32, name))
                said = "The adapter is not published any more."
            elif what == "forget":
                self.studio.trainings.forget(name)
                said = "All that this visitor had is deleted."
            else:
                raise ValueError("There is no such button.")
        except ValueError as error:
            said = str(error)
        return self._overview(said)

    def _overview(self, said: str) -> str:
        library = self.studio.library
        running = [
            (
                [visitor[:8], status.name, f"{status.state}, step {status.step} of {status.lesson.steps}"],
                _button("stop", visitor, "Stop"),
            )
            for visitor, status in self.studio.trainings.running()
        ]
        published = [
            ([adapter.name, adapter.kind], _button("unpublish", adapter.key, "Unpublish"))
            for kind in ("stable_diffusion", "vilt", "meter", "clip")
            for adapter in library.visible("0" * 32, kind)
            if adapter.key.startswith("public/")
        ]
        folders = sorted((library.folder / VISITORS).glob("*"))
        visitors = []
        for folder in folders:
            files = _sizes(folder)
            size = f"{sum(files) / MEGABYTE:.1f} MB in {len(files)} files"
            visitors.append(([folder.name[:8], size], _button("forget", folder.name, "Delete all")))
        free = shutil.disk_usage(library.folder).free / 2**30
        return (
            f"<h1>APT studio: the owner's page</h1><p role='status'>{escape(said)}</p>"
            f"<p>{len(self.studio.turns)} requests wait for the model; {free:.1f} GB of the disk are free.</p>"
            + _table("Trainings", ["visitor", "adapter", "state", ""], running)
            + _table("Published adapters", ["name", "for", ""], published)
            + _table("Visitors", ["visitor", "on disk", ""], visitors)
        )


_LOGIN = (
    f'<form method="post" action="{PAGE}"><label>Token <input type="password" name="token" '
    'autocomplete="current-password"></label> <button name="do" value="enter">Enter</button></form>'
)


def _sizes(folder: Path) -> list[int]:
    """Bytes of all files; those that vanish meanwhile, as a trainer's unfinished ones do, do not count."""
    sizes = []
    for place, _, names in os.walk(folder):  # which passes over folders that are gone
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                sizes.append((Path(place) / name).lstat().st_size)
    return sizes


def _button(do: str, what: str, label: str) -> str:
    return (
        f'<form method="post" action="{PAGE}"><input type="hidden" name="what" value="{escape(what)}">'
        f'<button name="do" value="{do}" aria-label="{label} {escape(what)}">{label}</button></form>'
    )


def _table(title: str, head: list[str], rows: list[tuple[list[str], str]]) -> str:
    if not rows:
        return f"<h2>{title}</h2><p>None.</p>"
    cells = [[*(escape(text) for text in texts), button] for texts, button in rows]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells)
    titles = "".join(f"<th>{name}</th>" for name in head)
    return f"<h2>{title}</h2><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def _page(body: str, status: int = 200) -> Any:
    return HTMLResponse(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>APT studio: owner</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>",
        status,
    )
