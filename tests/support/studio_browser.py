"""The studio as people meet it, for tests: `app.py` in a process of its own, and a real browser."""

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
PATIENCE = 120_000  # milliseconds: busy machines are slow


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
    """The text of an element, once it matches."""
    page.wait_for_function(
        "([where, pattern]) => new RegExp(pattern).test(document.querySelector(where)?.innerText)",
        arg=[where, pattern],
        timeout=PATIENCE,
    )
    return page.inner_text(where)


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


def choose(page, where, label):
    page.click(f"{where} input")
    page.get_by_role("option", name=label).click()
    page.keyboard.press("Escape")


def offered(page, where="#adapters"):
    page.click(f"{where} input")
    page.wait_for_timeout(300)
    labels = page.get_by_role("option").all_inner_texts()
    page.keyboard.press("Escape")
    return [label.replace("✓", "").strip() for label in labels]


def fetch(url, **settings):
    """`(status, body)`."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, **settings), timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def pictures_of(page, gallery):
    """The pixels of a gallery's pictures."""
    sources = page.eval_on_selector_all(f"{gallery} img", "images => images.map(image => image.src)")
    return np.stack([np.asarray(Image.open(io.BytesIO(fetch(source)[1])).convert("RGB")) for source in sources])


def upload(page, *files, into="#pictures"):
    page.set_input_files(f"{into} input[type=file]", list(files))


def as_file(name, image_path):
    return {"name": name, "mimeType": "image/png", "buffer": Path(image_path).read_bytes()}


def draw(page, prompt, seed, steps=4, count=1):
    page.fill("#prompt textarea", prompt)
    if page.is_checked("#new-seed input"):
        page.uncheck("#new-seed input")
    page.fill("#seed input", str(seed))
    page.fill("#count input[type=number]", str(count))
    if not page.is_visible("#steps input[type=number]"):
        page.get_by_text("More settings").click()
    page.fill("#steps input[type=number]", str(steps))
    page.keyboard.press("Tab")
    page.click("#draw")
