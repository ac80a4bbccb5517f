"""The studio as people meet it, for tests: `app.py` in a process of its own, and a real browser."""

import base64
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.studio_helpers import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium; .ci/run does it)"
)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE = 300_000  # milliseconds: busy machines are slow


@contextlib.contextmanager
def served(folder, *flags):
    """The address of a server with these flags, whose adapters are in `folder`."""
    log = folder.parent / f"{folder.name}.log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), "--adapters", str(folder), *flags]
    with log.open("w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=log.parent, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
    try:
        end = time.monotonic() + 240
        while "The studio is open at" not in log.read_text():
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=60)
        for job in folder.glob(".visitors/*/trainings/*/job.json"):  # they outlive the server, if a test failed
            with contextlib.suppress(ProcessLookupError):
                os.kill(json.loads(job.read_text())["pid"], signal.SIGKILL)
    assert "A page's request failed" not in log.read_text(), log.read_text()


@contextlib.contextmanager
def chromium_running():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def visitors(chromium, address):
    """A function that opens the studio as somebody new, or as the owner of `context` again."""
    with contextlib.ExitStack() as stack:

        def open_page(context=None):
            if context is None:
                context = stack.enter_context(contextlib.closing(chromium.new_context(accept_downloads=True)))
            context.set_default_timeout(PATIENCE)
            page = context.new_page()
            page.goto(address)
            page.wait_for_selector("#draw")
            return page

        yield open_page


def wait_for(page, where, pattern):
    """The text of an element, once it matches; the page may have gone on to another one meanwhile."""
    found = page.wait_for_function(
        """([where, pattern]) => {
            const text = document.querySelector(where)?.innerText;
            return new RegExp(pattern).test(text) && [text];
        }""",
        arg=[where, pattern],
        timeout=PATIENCE,
    )
    return found.json_value()[0]


def remember(page, where):
    """Keeps every text that an element has from now on: a fast machine shows some for a moment only."""
    page.evaluate(
        """where => {
            const element = document.querySelector(where);
            window.remembered = [];
            new MutationObserver(() => window.remembered.push(element.innerText))
                .observe(element, {childList: true, subtree: true, characterData: true});
        }""",
        where,
    )


def tab(page, name):
    page.get_by_role("tab", name=name).click()


def wait_for_pictures(page):
    """Waits until all pictures of the page Generate are finished ones."""
    page.wait_for_function(
        """() => {
            const images = [...document.querySelectorAll("#base img, #adapted img, #grid img")];
            return images.length && images.every(image => image.src.includes("/studio/pictures/"));
        }""",
        timeout=PATIENCE,
    )


def choose(page, where, label):
    page.click(f"{where} input")
    page.locator(where).get_by_role("option", name=label, exact=True).click()
    page.keyboard.press("Escape")


def offered(page, where="#adapters"):
    """The choices of a list that has some, once a busy machine shows them."""
    for _ in range(20):
        page.click(f"{where} input")
        page.wait_for_timeout(500)
        labels = page.get_by_role("option").all_inner_texts()
        page.keyboard.press("Escape")
        if labels:
            break
    return [label.replace("✓", "").strip() for label in labels]


def fetch(url, **settings):
    """`(status, body)`."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, **settings), timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def pictures_of(page, where):
    """The pixels of the pictures in a place."""
    sources = page.eval_on_selector_all(f"{where} img", "images => images.map(image => image.src)")
    return np.stack([np.asarray(opened(page, source).convert("RGB")) for source in sources])


def opened(page, source):
    """A picture of the page; what the server has of it is fetched with the visitor's cookie."""
    if source.startswith("data:"):
        content = base64.b64decode(source.partition("base64,")[2])
    else:
        content = page.request.get(source).body()
    return Image.open(io.BytesIO(content))


def upload(page, *files, into="#pictures"):
    page.set_input_files(f"{into} input[type=file]", list(files))


def as_file(name, image_path):
    return {"name": name, "mimeType": "image/png", "buffer": Path(image_path).read_bytes()}


def draw(page, prompt, seed, steps=4, count=1, side=None):
    page.fill("#prompt textarea", prompt)
    if page.is_checked("#new-seed input"):
        page.uncheck("#new-seed input")
    page.fill("#seed input", str(seed))
    page.fill("#count input[type=number]", str(count))
    if not page.is_visible("#steps input[type=number]"):
        page.get_by_text("More settings").click()
        page.wait_for_selector("#steps input[type=number]:visible")
    page.fill("#steps input[type=number]", str(steps))
    if side is not None:
        page.fill("#width input[type=number]", str(side))
        page.fill("#height input[type=number]", str(side))
    page.keyboard.press("Tab")
    page.click("#draw")


def configuration(page):
    """Gradio's, and the names that we gave to its components."""
    config = page.evaluate("window.gradio_config")
    return config, {part["id"]: part["props"].get("elem_id") for part in config["components"]}


def function_of(config, by_id, button):
    """The function of the server that a click on a button calls."""
    return next(
        dependency
        for dependency in config["dependencies"]
        if dependency["backend_fn"] and [button, "click"] in [[by_id.get(i), e] for i, e in dependency["targets"]]
    )


def call(address, function, data, session="forged"):
    """The status of a request made by hand, and the answers to it as one text."""
    body = json.dumps({"data": data, "fn_index": function, "session_hash": session}).encode()
    sent = {"data": body, "headers": {"Content-Type": "application/json"}}
    status, answer = fetch(f"{address}/gradio_api/queue/join", **sent)
    if status != 200:
        return status, answer.decode()
    lines = []
    with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash={session}", timeout=60) as stream:
        for line in stream:
            lines.append(line.decode())
            if "process_completed" in lines[-1] or "close_stream" in lines[-1]:
                break
    return status, "".join(lines)
