"""The studio's command, who its visitors are, and which doors of its server are open: without a browser."""

import asyncio
import os
import re
import socket
from types import SimpleNamespace

import pytest

from apt_diffusion.studio import command, uploads
from apt_diffusion.studio.server.doors import Doors
from apt_diffusion.studio.visitors import COOKIE, VisitorCookie, visitor_of

# Visitors


def request_with(cookie="", session="s1"):
    return SimpleNamespace(cookies={COOKIE: cookie} if cookie else {}, session_hash=session)


def test_visitors_are_told_apart_by_their_cookie():
    first, second = visitor_of(request_with("x" * 43)), visitor_of(request_with("y" * 43))
    assert first != second and re.fullmatch("[0-9a-f]{32}", first) and "x" not in first
    assert visitor_of(request_with("x" * 43, "s2")) == first
    assert visitor_of(request_with()) != visitor_of(request_with(session="s2"))
    assert visitor_of(request_with("../../etc")) == visitor_of(request_with())


async def get(app, path, cookie=b""):
    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"cookie", cookie)] if cookie else []
    await app({"type": "http", "path": path, "headers": headers}, None, send)
    return dict(sent[0]["headers"]).get(b"set-cookie")


def test_a_new_browser_gets_a_cookie_that_scripts_cannot_read():
    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    app = VisitorCookie(page)
    cookie = asyncio.run(get(app, "/"))
    assert b"HttpOnly" in cookie and b"SameSite=Lax" in cookie
    assert asyncio.run(get(app, "/")) != cookie
    assert asyncio.run(get(app, "/", b"other=1; " + cookie.split(b";")[0])) is None
    assert asyncio.run(get(app, "/", COOKIE.encode() + b"=short")) is not None
    assert asyncio.run(get(app, "/assets/index.js")) is None


# The command


def test_flags_are_checked_and_paths_made_absolute(tmp_path, monkeypatch, capsys):
    args = command.parse_args([])
    assert (args.model, args.listen, args.port, args.share) == ("miniature-emoji", "127.0.0.1", 7860, False)
    assert command.parse_args(["--listen"]).listen == "0.0.0.0"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert command.parse_args(["--model", "model"]).model == str(tmp_path / "model")
    for wrong in (["--queue-size", "0"], ["--max-train-steps", "-1"], ["--port", "x"], ["--max-trainings", "0"]):
        with pytest.raises(SystemExit):
            command.parse_args(wrong)
    assert "must be at least 1" in capsys.readouterr().err
    monkeypatch.setenv("APT_STUDIO_ADMIN_TOKEN", "t" * 16)
    assert command.parse_args([]).admin_token == "t" * 16 and command.parse_args([]).queue_per_visitor == 4
    with pytest.raises(SystemExit):
        command.parse_args(["--admin-token", "short"])
    assert "at least 16 characters" in capsys.readouterr().err


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Runs the command with these flags until the server is ready, which then ends; returns the server's settings."""
    import gradio

    from apt_diffusion.studio.server import serve

    library = SimpleNamespace(folder=tmp_path)
    studio = SimpleNamespace(library=library, drawings=SimpleNamespace(sweep=lambda: None))
    monkeypatch.setattr("apt_diffusion.studio.studio.Studio", lambda *args: studio)
    with gradio.Blocks() as site:
        gradio.HTML("a page")
    monkeypatch.setattr("apt_diffusion.studio.pages.site.build_site", lambda *args: site)
    monkeypatch.setattr("signal.signal", lambda *args: None)
    monkeypatch.setattr("os.environ", os.environ.copy())
    ready = []

    def run(self, sockets):
        ready.append(self.config)
        self.ready()

    monkeypatch.setattr(serve.Server, "run", run)

    def start(*flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command.main(["--adapters", str(tmp_path), "--port", str(port), *flags])
        return site, *ready

    return start


def test_nothing_is_shared_unless_asked_for(started, monkeypatch, capsys):
    def tunnel(*args, **settings):
        raise AssertionError("a tunnel was opened")

    monkeypatch.setattr("gradio.networking.setup_tunnel", tunnel)
    monkeypatch.setenv("GRADIO_SHARE", "True")  # of somebody's shell
    site, _ = started()
    assert site.allowed_paths == [] and site.max_file_size == uploads.MAX_BYTES
    assert site.has_launched  # Gradio checks where files lie only then
    assert re.fullmatch(r"The studio is open at http://127\.0\.0\.1:\d+/ .*\n", capsys.readouterr().out)


def test_a_shared_studio_prints_its_link(started, monkeypatch, capsys):
    monkeypatch.setattr("gradio.networking.setup_tunnel", lambda *args, **settings: "https://x.gradio.live")
    started("--share")
    assert "everybody who has this link can use it: https://x.gradio.live" in capsys.readouterr().out


def test_without_a_network_sharing_ends_in_one_sentence(started, monkeypatch, capsys, caplog):
    def tunnel(*args, **settings):
        raise RuntimeError("Could not get share link from Gradio API Server.")

    monkeypatch.setattr("gradio.networking.setup_tunnel", tunnel)
    started("--share")
    out = capsys.readouterr().out
    assert out.startswith("The studio is open at") and out.count("\n") == 1
    (said,) = [record.message for record in caplog.records if record.name.startswith("apt_diffusion")]
    assert "There is no public link: gradio.live cannot be reached" in said


def test_an_address_that_cannot_be_had_is_said_in_a_sentence(started):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit, match=r"cannot listen on 127\.0\.0\.1, port \d+: another program uses it"):
            started("--port", str(taken.getsockname()[1]))


def test_examples_lie_where_gradio_deletes_nothing(tmp_path, monkeypatch):
    from apt_diffusion.studio.pages.downloads import examples_folder

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "shown"))
    assert examples_folder().parent == tmp_path and not examples_folder().is_relative_to(tmp_path / "shown")


# Doors


@pytest.mark.parametrize(
    ("size", "free", "status"),
    [(10**6, 10**12, 200), (10**10, 10**12, 413), (None, 10**12, 413), (10**6, 10**8, 507)],
    ids=["fine", "too much", "no size", "full disk"],
)
def test_uploads_have_a_size_and_leave_some_of_the_disk_free(tmp_path, monkeypatch, size, free, status):
    async def gradio(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent = []

    async def send(message):
        sent.append(message)

    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    headers = [] if size is None else [(b"content-length", str(size).encode())]
    scope = {"type": "http", "path": "/gradio_api/upload", "headers": headers}
    asyncio.run(Doors(gradio, tmp_path / "not" / "there")(scope, None, send))
    assert sent[0]["status"] == status
