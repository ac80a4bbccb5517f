"""The studio as people meet it: `app.py` in a process of its own, used with a real browser."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from studio_helpers import ROOT, make_adapter, picture

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium; .ci/run does it)"
)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE = 120_000  # milliseconds: busy machines are slow
STEPS = 400  # enough to be stopped on the way on a fast machine, too


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_sd_path):
    folder = tmp_path_factory.mktemp("adapters")
    make_adapter(tiny_sd_path, folder / "shared")
    return folder


@pytest.fixture(scope="module")
def address(adapters, tiny_sd_path, tmp_path_factory):
    """The server's address; it ends with the module."""
    log = tmp_path_factory.mktemp("log") / "server.txt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), "--max-train-steps", "500"]
    command += ["--model", str(tiny_sd_path), "--adapters", str(adapters)]
    with log.open("w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=log.parent, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
    try:
        end = time.monotonic() + 240
        while "Running on local URL" not in log.read_text():
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=60)
        for job in adapters.glob(".visitors/*/trainings/*/job.json"):  # they outlive the server, if a test failed
            with contextlib.suppress(ProcessLookupError):
                os.kill(json.loads(job.read_text())["pid"], signal.SIGKILL)
    assert "A page's request failed" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, address):
    """Opens the studio as somebody new, or as the owner of `context` again."""
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


def fetch(url):
    """`(status, body)`."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def pictures_of(page, gallery):
    """The pixels of a gallery's pictures."""
    sources = page.eval_on_selector_all(f"{gallery} img", "images => images.map(image => image.src)")
    return np.stack([np.asarray(Image.open(io.BytesIO(fetch(source)[1])).convert("RGB")) for source in sources])


def upload(page, *files):
    page.set_input_files("#pictures input[type=file]", list(files))


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


def test_a_subject_is_taught_stopped_continued_and_drawn(visit, adapters, tmp_path):
    page = visit()
    owner = page.context
    tab(page, "Train")
    hostile = "..%2F..%2Fevil<img src=x onerror=alert(1)>.png"
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    upload(page, as_file(hostile, picture(tmp_path / "a.png", 64, 40)), as_file("b.png", picture(tmp_path / "b.png")))
    wait_for(page, "#train-status", "2 pictures, cut to 32 × 32 pixels")
    page.wait_for_function("document.querySelectorAll('#seen img').length == 2")
    page.fill("#adapter-name input, #adapter-name textarea", "../../My <b>dog</b>")
    page.fill("#train-steps input[type=number]", str(STEPS))
    page.keyboard.press("Tab")
    page.click("#train")
    wait_for(page, "#train-status", r"Step [1-9]")
    page.close()  # the training goes on without its page

    page = visit(owner)
    tab(page, "Train")
    wait_for(page, "#train-status", rf"Step \d+ of {STEPS}")
    page.click("#cancel")
    text = wait_for(page, "#train-status", r"Stopped\. The adapter of step \d+ is kept")
    stopped = int(re.search(r"step (\d+)", text)[1])
    assert 0 < stopped < STEPS
    page.click("#resume")
    text = wait_for(page, "#train-status", rf"Step \d+ of {STEPS}")
    assert int(re.search(r"Step (\d+)", text)[1]) >= stopped
    wait_for(page, "#train-status", "Finished: my-b-dog-b can be used")
    page.wait_for_function("document.querySelectorAll('#samples img').length > 0")
    assert f"of {STEPS}" in page.get_attribute("#losses svg", "aria-label")
    with page.expect_download() as download:
        page.click("#download-adapter")
    assert download.value.suggested_filename == "my-b-dog-b.safetensors"

    page.click("#use-adapter")
    page.wait_for_selector("#draw:visible")
    wait_for(page, "#adapters", "my-b-dog-b")
    draw(page, "a photo of sks dog", 7, count=2)
    wait_for(page, "#status", r"Done\. Seed 7\.")
    adapted, base = pictures_of(page, "#adapted"), pictures_of(page, "#base")
    assert adapted.shape == base.shape == (2, 32, 32, 3)
    assert not np.array_equal(adapted, base)
    page.get_by_text("Python code for these pictures").click()
    assert "my-b-dog-b.safetensors" in wait_for(page, "#code", "load_apt_weights")

    # Everything lies in the visitor's own folder, under our names.
    own = list(adapters.glob(".visitors/*/trainings/*/pictures/*"))
    assert {path.name for path in own} == {"picture-01.png", "picture-02.png"}
    assert not list(adapters.rglob("*evil*")) and not list(adapters.parent.glob("My*"))

    # A neighbour sees it once it is published, and not before.
    neighbour = visit()
    assert offered(neighbour) == ["shared"]
    page.get_by_text("About the adapters").click()
    page.get_by_role("button", name="Publish").click()
    wait_for(page, "#status", "Published: my-b-dog-b")
    neighbour.reload()
    neighbour.wait_for_selector("#draw")
    assert offered(neighbour) == ["my-b-dog-b", "shared"]


def test_bad_uploads_get_a_sentence_and_leave_the_page_usable(visit, tmp_path):
    page = visit()
    tab(page, "Train")
    page.click("#train")
    assert "Add some pictures" in wait_for(page, "#train-status", "pictures of your subject")
    damaged = Path(picture(tmp_path / "holiday.png")).read_bytes()[:200]
    upload(page, {"name": "holiday.png", "mimeType": "image/png", "buffer": damaged})
    assert "“holiday.png” is damaged" in wait_for(page, "#train-status", "holiday")
    page.click("#train")
    wait_for(page, "#train-status", "damaged")
    page.click('#pictures button[aria-label="Clear"], #pictures button[title="Clear"]')
    upload(page, {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"})
    page.wait_for_selector("text=/Invalid file type/i")
    upload(page, as_file("good.png", picture(tmp_path / "good.png")))
    wait_for(page, "#train-status", "1 pictures, cut to")
    assert page.is_enabled("#train") and not page.get_by_text("Traceback").count()


def test_two_visitors_at_once_get_their_own_pictures(visit):
    first, second = visit(), visit()
    alone = {}
    for page, seed in ((first, 11), (second, 22)):
        choose(page, "#adapters", "shared")
        wait_for(page, "#adapters", "shared")
        draw(page, f"a sks glyph {seed}", seed)
        wait_for(page, "#status", rf"Done\. Seed {seed}\.")
        alone[page] = pictures_of(page, "#adapted"), pictures_of(page, "#base")
    assert not np.array_equal(alone[first][0], alone[second][0])
    for page in (first, second):
        remember(page, "#status")
    first.click("#draw")
    second.click("#draw")
    for page in (first, second):
        page.wait_for_function("window.remembered.some(text => /Step|Starting/.test(text))")
    for page, seed in ((first, 11), (second, 22)):
        wait_for(page, "#status", rf"Done\. Seed {seed}\.")
        page.wait_for_timeout(300)
        together = pictures_of(page, "#adapted"), pictures_of(page, "#base")
        assert all(np.array_equal(*pair) for pair in zip(together, alone[page], strict=True))


def test_the_sweep_shows_a_row_and_wrong_orders_a_sentence(visit):
    page = visit()
    page.click("#sweep")
    assert "Choose an adapter first" in wait_for(page, "#status", "Choose")
    page.fill("#prompt textarea", " ")
    page.click("#draw")
    assert "Write a prompt first" in wait_for(page, "#status", "Write")
    choose(page, "#adapters", "shared")
    wait_for(page, "#adapters", "shared")
    draw(page, "a sks glyph", 3, steps=2)
    wait_for(page, "#status", "Done")
    page.click("#sweep")
    page.wait_for_function("document.querySelectorAll('#strengths img').length == 7")
    row = pictures_of(page, "#strengths")
    assert np.array_equal(row[0], pictures_of(page, "#base")[0])
    assert np.array_equal(row[5], pictures_of(page, "#adapted")[0])


def test_files_outside_cannot_be_read_through_the_server(visit, address, adapters):
    page = visit()
    session = page.evaluate("window.gradio_config.root")
    assert session.startswith(address)
    header = next(adapters.rglob("pytorch_apt_weights.safetensors"))
    for path in (header, ROOT / "app.py", ROOT / "README.md", Path("/etc/passwd"), adapters / ".visitors"):
        for wanted in (str(path), f"../../../../../../..{path}", f"/tmp/..{path}", urllib.parse.quote(str(path), "")):
            for route in ("/gradio_api/file=", "/gradio_api/file/", "/file="):
                status, body = fetch(f"{address}{route}{wanted}")
                assert status in (403, 404), (route, wanted, status)
                assert b"root:" not in body and b"safetensors" not in body[:20]
    for route in ("/../../../../etc/passwd", "/static/../../../../etc/passwd", "/assets/..%2f..%2f..%2fetc/passwd"):
        status, body = fetch(address + route)
        assert status != 200 or b"root:" not in body


def test_a_forged_request_gets_no_file_and_no_other_visitors_adapter(visit, address):
    """What the page would send, with a path of the server's, and with an adapter's key that was made up."""
    page = visit()
    config = page.evaluate("window.gradio_config")
    by_id = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
    train = next(d for d in config["dependencies"] if ["train", "click"] in named(d, by_id))
    sent = [None] * len(train["inputs"])
    sent[0] = [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}]
    assert "process_completed" in (answer := call(address, train["id"], sent))
    assert "root:" not in answer and '"success":false' in answer.replace(" ", "")
    drawing = next(d for d in config["dependencies"] if ["draw", "click"] in named(d, by_id))
    sent = [{"prompt": "a", "adapters": ["own/../../shared"]}.get(by_id[i]) for i in drawing["inputs"]]
    answer = call(address, drawing["id"], sent)
    assert "image.png" not in answer


def named(dependency, by_id):
    return [[by_id.get(target), event] for target, event in dependency["targets"]]


def call(address, function, data):
    """The answers to a request made by hand, as one text."""
    body = json.dumps({"data": data, "fn_index": function, "session_hash": "forged"}).encode()
    request = urllib.request.Request(f"{address}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).read()
    with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash=forged", timeout=60) as stream:
        lines = []
        for line in stream:
            lines.append(line.decode())
            if "process_completed" in lines[-1] or "close_stream" in lines[-1]:
                return "".join(lines)
    return "".join(lines)


def test_pages_need_nothing_from_elsewhere_and_work_by_keyboard_narrow_and_dark(visit, address):
    page = visit()
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.set_viewport_size({"width": 390, "height": 800})
    page.emulate_media(color_scheme="dark")
    page.goto(address)
    page.wait_for_selector("#draw")
    for name in ("Train", "Understand", "Cost", "Generate"):
        tab(page, name)
        page.wait_for_timeout(200)
        too_wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert too_wide <= 0, f"{name} is {too_wide} pixels too wide for a phone"
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", colour)[:3])) < 150
    page.get_by_role("tab", name="Generate").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#train:visible")
    elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not elsewhere and not complaints

    # Costs follow their sliders.
    tab(page, "Cost")
    wait_for(page, "#cost-summary", r"82\.4 % less than deep prompts")
    page.fill("#cost-prompts input[type=number]", "100")
    page.keyboard.press("Tab")
    wait_for(page, "#cost-parameters", r"995\.34 k")  # 12 (100 · 768 + 2 · 768 · 4 + 1)


def test_every_control_has_a_help_line(visit):
    page = visit()
    config = page.evaluate("window.gradio_config")
    kinds = {"textbox", "slider", "number", "checkbox", "dropdown"}
    controls = [part["props"] for part in config["components"] if part["type"] in kinds]
    assert len(controls) > 20
    assert not [props["label"] for props in controls if not props.get("info")]
