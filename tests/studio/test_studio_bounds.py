"""What one visitor may take of the machine: turns, pictures, disk, sessions and bytes. Without a browser."""

import asyncio
import contextlib
import io
import json
import os
import struct
import threading
import time
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from support.gate import until
from support.studio_helpers import ANNA, BERT, picture

from apt_diffusion.studio import uploads
from apt_diffusion.studio.countdown import Countdown
from apt_diffusion.studio.drawings import Drawings
from apt_diffusion.studio.library import Library
from apt_diffusion.studio.recipe import settings_in
from apt_diffusion.studio.server.answers import Refused
from apt_diffusion.studio.server.requests import MAX_JSON, Requests, parse
from apt_diffusion.studio.server.sessions import MAX_PER_ADDRESS, Sessions
from apt_diffusion.studio.server.sweep import Bound, sweep
from apt_diffusion.studio.turns import Turns, Who

# Pictures are refused by their header


def long_png(path: Path, width: int, height: int) -> Path:
    """A small file of a very long picture: one colour, compressed."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


@pytest.mark.parametrize("size", [(16, 3_000_000), (3_000_000, 16), (16, 60_000), (100, 5_001)])
def test_long_pictures_are_refused_before_anything_decodes_them(tmp_path, monkeypatch, size):
    def decoded(*args):
        raise AssertionError("it was decoded")

    monkeypatch.setattr("PIL.Image.Image.load", decoded)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    with pytest.raises(ValueError, match="a long side of more than") as error:
        uploads.open_picture(long_png(tmp_path / "long.png", *size))
    assert "long.png" in str(error.value) and str(tmp_path) not in str(error.value)


# Turns


@contextlib.contextmanager
def held(turns: Turns, who: Who, cost: float = 1):
    """It is the turn of `who` within."""
    has_it, release = threading.Event(), threading.Event()

    def hold() -> None:
        with turns.turn(who, cost):
            has_it.set()
            release.wait(240)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert has_it.wait(60)
        yield
    finally:
        release.set()
        holder.join(60)


def queued(turns: Turns, asked: list[tuple[str, float]]) -> list[str]:
    """The order in which these requests, which all wait at once, are served."""
    served, threads = [], []

    def ask(name: str, cost: float) -> None:
        with turns.turn(Who(name), cost):
            served.append(name)

    with held(turns, Who("holder")):
        for count, (name, cost) in enumerate(asked, start=1):
            threads.append(threading.Thread(target=ask, args=(name, cost)))
            threads[-1].start()
            until(lambda count=count: len(turns) == count)
    for thread in threads:
        thread.join(60)
    return served


def test_who_asks_for_much_does_not_make_others_wait_for_all_of_it():
    turns = Turns(per_visitor=10)
    served = queued(turns, [("anna", 10)] * 4 + [("bert", 10), ("carl", 10)])
    assert served == ["anna", "bert", "carl", "anna", "anna", "anna"]


def test_one_large_request_counts_as_many_small_ones():
    turns = Turns(per_visitor=10)
    served = queued(turns, [("anna", 30), ("anna", 30), ("bert", 10), ("bert", 10), ("bert", 10)])
    assert served == ["anna", "bert", "bert", "bert", "anna"]


def test_places_are_limited_for_all_for_a_visitor_and_for_an_address():
    turns = Turns(places=4, per_visitor=2, per_address=3)
    taken = []

    def wait(who: Who) -> None:
        with turns.turn(who, 1):
            pass

    def add(who: Who) -> None:
        taken.append(threading.Thread(target=wait, args=(who,)))
        taken[-1].start()
        until(lambda: len(turns) == len(taken))

    class GivenUp(Exception):
        pass

    def give_up(ahead, seconds):
        raise GivenUp

    with held(turns, Who("holder", "h")):
        add(Who("anna", "x"))
        add(Who("anna", "x"))
        with pytest.raises(ValueError, match="2 of your requests wait"), turns.turn(Who("anna", "y"), 1):
            pass
        add(Who("bert", "x"))
        with pytest.raises(ValueError, match="Your address"), turns.turn(Who("carl", "x"), 1):
            pass
        add(Who("dora", "z"))
        with pytest.raises(ValueError, match="Too many people wait for the model: 4"), turns.turn(Who("emil", "e"), 1):
            pass
        # What was begun has a place.
        with pytest.raises(GivenUp), turns.turn(Who("emil", "e"), 1, give_up, again=True):
            pass
    for thread in taken:
        thread.join(60)
    assert len(turns) == 0


def test_who_waits_is_told_how_many_are_before_and_how_long_it_takes():
    now = [0.0]
    turns = Turns(clock=lambda: now[0])
    with turns.turn(Who("anna"), 10):
        now[0] += 20  # 2 seconds for each unit
    assert turns.seconds_for(3) == 6
    told = []

    class Enough(Exception):
        pass

    def on_wait(ahead: int, seconds: float | None) -> None:
        told.append((ahead, seconds))
        raise Enough

    with held(turns, Who("bert"), 10):
        now[0] += 5  # of 20 seconds
        with pytest.raises(Enough), turns.turn(Who("carl"), 1, on_wait):
            pass
    assert told == [(1, 15.0)] and len(turns) == 0


def test_time_left_falls_steadily_though_steps_are_uneven():
    countdown, now, said = Countdown(), 0.0, []
    for step in range(1, 101):
        now += 5.0 if step % 25 == 0 else 1.0  # samples are drawn now and then
        said.append(countdown.left(step, 100, now))
    numbers = [value for value in said if value is not None]
    assert said[:2] == [None, None] and numbers == sorted(numbers, reverse=True)
    assert 80 < numbers[0] < 110 and numbers[-1] < 5


# Pictures on disk


def settings(seed: int = 0) -> dict:
    return {
        "prompt": "a red circle", "negative_prompt": "", "adapters": [], "weights": [], "steps": 3, "guidance": 3.0,
        "width": 16, "height": 16, "seed": seed, "count": 1, "sampler": "", "blocks": {}, "model": "m",
    }  # fmt: skip


def keep(drawings: Drawings, visitor: str, count: int) -> list:
    image = Image.new("RGB", (16, 16), "red")
    return [drawings.keep(visitor, "adapted", [image], [settings(seed)])[0] for seed in range(count)]


def test_what_is_drawn_is_bounded_by_number_bytes_and_age(tmp_path):
    now = [time.time() + 1]
    library = Library(tmp_path)
    drawings = Drawings(library, Bound(100, 3, 10**6), Bound(100, 4, 10**6), clock=lambda: now[0])
    kept = keep(drawings, ANNA, 5)
    assert [drawing.id for drawing in drawings.of(ANNA)] == [drawing.id for drawing in reversed(kept[2:])]
    keep(drawings, BERT, 3)
    drawings.sweep()
    assert len(drawings.of(ANNA)) + len(drawings.of(BERT)) == 4
    for drawing in drawings.of(ANNA):
        os.utime(drawing.file, (now[0] - 101, now[0] - 101))
    drawings.sweep()
    assert drawings.of(ANNA) == []
    small = Drawings(library, Bound(100, 10, 900), clock=lambda: now[0])
    keep(small, ANNA, 4)
    assert sum(drawing.file.stat().st_size for drawing in small.of(ANNA)) <= 900


def test_pictures_are_their_visitors_and_names_are_no_paths(tmp_path):
    drawings = Drawings(Library(tmp_path))
    (drawing,) = keep(drawings, ANNA, 1)
    assert drawings.get(ANNA, drawing.id).settings["prompt"] == "a red circle"
    assert drawing.download_name == "a-red-circle-seed-0.png"
    for name in (drawing.id, "../" + drawing.id, f"../../{ANNA}/drawn/{drawing.id}", ""):
        with pytest.raises(ValueError, match="not there any more"):
            drawings.get(BERT, name)
    drawings.delete(ANNA, drawing.id)
    with pytest.raises(ValueError, match="not there any more"):
        drawings.get(ANNA, drawing.id)


def test_all_pictures_come_in_one_file_under_telling_names(tmp_path):
    drawings = Drawings(Library(tmp_path / "library"))
    keep(drawings, ANNA, 2)
    with zipfile.ZipFile(drawings.write_zip(ANNA, tmp_path / "all.zip")) as archive:
        assert archive.namelist() == ["001-a-red-circle-seed-0.png", "002-a-red-circle-seed-1.png"]
        with Image.open(io.BytesIO(archive.read(archive.namelist()[1]))) as image:
            assert settings_in(image)["seed"] == 1
    assert drawings.clear(ANNA) == 2 and drawings.of(ANNA) == []


def test_a_sweep_takes_the_oldest_files_and_follows_no_link(tmp_path):
    folder = tmp_path / "shown"
    for number in range(4):
        file = folder / f"{number}" / "a.png"
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(100))
        os.utime(file, (1000 + number, 1000 + number))
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    (folder / "link").symlink_to(outside)
    gone = sweep(folder, Bound(1000, 10, 250), now=1003)
    assert sorted(path.parent.name for path in gone) == ["0", "1"] and outside.exists()
    assert not (folder / "0").exists() and (folder / "3" / "a.png").exists()


# Requests


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b'{"data": [NaN]}', 400, "finite"),
        (b'{"data": [-Infinity]}', 400, "finite"),
        (b'{"data": [1e999]}', 400, "finite"),
        (b'{"data": ' + b"[" * 100_000, 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[1]", 400, "JSON object"),
    ],
    ids=["NaN", "infinite", "too large a number", "nested", "no text", "no object"],
)
def test_bodies_that_no_page_sends_are_refused(body, status, words):
    with pytest.raises(Refused, match=words) as error:
        parse(body)
    assert error.value.status == status


def door(tmp_path, functions=None):
    """The checks before a page with one function of two inputs; what passes is noted."""
    passed = []

    async def gradio(scope, receive, send):
        passed.append(json.loads((await receive())["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    blocks = [SimpleNamespace(get_block_name=lambda name=name: name, skip_api=False) for name in ("file", "number")]
    function = SimpleNamespace(inputs=blocks, fn=print, api_name=None)
    site = SimpleNamespace(fns={3: function}, _queue=SimpleNamespace(pending_event_ids_session={}))
    return Requests(gradio, site, tmp_path, Sessions(site)), passed


def post(app, value, path="/gradio_api/queue/join", length=None, parts=None):
    """The status and the reason."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    chunks = iter(parts or [body])
    sent = []

    async def receive():
        chunk = next(chunks, b"")
        return {"type": "http.request", "body": chunk, "more_body": parts is not None}

    async def send(message):
        sent.append(message)

    headers = [(b"content-length", str(len(body) if length is None else length).encode())] if parts is None else []
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "client": ("10.0.0.1", 1)}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]).decode()


def call(*data, **more):
    return {"fn_index": 3, "session_hash": "s1", "data": list(data)} | more


def upload(path):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def test_what_a_page_sends_is_passed_on(tmp_path):
    app, passed = door(tmp_path)
    assert post(app, call([upload(tmp_path / "a" / "b.png")], 3))[0] == 200
    assert passed[0]["data"][1] == 3


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (call([upload("http://example.com/a.png")], 1), 400),
        (call(upload("/etc/passwd"), 1), 400),
        (call([{"path": "a.png", "url": "http://example.com", "meta": {"_type": "gradio.FileData"}}], 1), 400),
        (call(["a.png"], 1), 400),
        (call({"meta": "x"}, 1), 400),
        (call([], 1) | {"fn_index": 99}, 404),
        (call([], 1) | {"fn_index": "3"}, 404),
        (call([]), 400),
        (call([], 1) | {"data": "ab"}, 400),
        (call([], 1) | {"session_hash": ["x"]}, 400),
        (call([], 1) | {"session_hash": "x" * 100}, 400),
        (call([], 1) | {"event_data": {"deep": [upload("/etc/passwd")]}}, 400),
    ],
)
def test_malformed_events_are_refused_with_a_sentence(tmp_path, value, status):
    app, passed = door(tmp_path)
    said, words = post(app, value)
    assert said == status and not passed and "Traceback" not in words and "Error" not in words
    assert json.loads(words)["detail"].endswith(".")


def test_large_bodies_are_refused_said_or_not(tmp_path):
    app, passed = door(tmp_path)
    assert post(app, call([], 1), length=100 * 2**20)[0] == 413
    assert post(app, b"", parts=[bytes(2**18)] * 100)[0] == 413  # it has no length
    assert post(app, bytes(MAX_JSON + 1), path="/anything")[0] == 413
    assert not passed


def test_invented_sessions_come_to_an_end(tmp_path):
    app, _ = door(tmp_path)
    statuses = [post(app, call([], 1, session_hash=f"s{number}"))[0] for number in range(MAX_PER_ADDRESS + 20)]
    assert statuses.count(200) == MAX_PER_ADDRESS and statuses[-1] == 429
    assert post(app, call([], 1, session_hash="s0"))[0] == 200  # who is known goes on


def test_who_reads_no_answers_gets_no_more(tmp_path):
    app, _ = door(tmp_path)
    app.site._queue.pending_event_ids_session["s1"] = set(map(str, range(32)))
    status, words = post(app, call([], 1))
    assert status == 429 and "unanswered" in words


def test_errors_inside_stay_inside(tmp_path, caplog):
    async def broken(scope, receive, send):
        raise RuntimeError("/secret/place")

    async def five_hundred(scope, receive, send):
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"KeyError: /secret/place"})

    app, _ = door(tmp_path)
    for inner in (broken, five_hundred):
        app.app = inner
        status, words = post(app, call([], 1))
        assert status == 500 and "secret" not in words and "try again" in words


def test_a_picture_with_its_caption_is_a_pair(tmp_path):
    paths = [picture(tmp_path / "a.png"), picture(tmp_path / "b.png"), tmp_path / "a.txt"]
    paths[2].write_text("\ufeffa sks glyph\non grass\n", encoding="utf-8")
    pictures, captions = uploads.split_captions(paths)
    assert [Path(path).name for path in pictures] == ["a.png", "b.png"]
    assert captions == ["a sks glyph on grass", ""]
    (tmp_path / "c.txt").write_text("alone")
    with pytest.raises(ValueError, match=r"“c.txt” belongs to no picture"):
        uploads.split_captions([*paths, tmp_path / "c.txt"])
    paths[2].write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match="no text"):
        uploads.split_captions(paths)
