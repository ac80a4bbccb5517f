"""What people do in the studio, with a real browser."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.studio_browser import (
    as_file,
    choose,
    draw,
    offered,
    pictures_of,
    remember,
    served,
    tab,
    upload,
    wait_for,
    wait_for_pictures,
)
from support.studio_helpers import make_adapter, make_looking_adapter, picture

STEPS = 400  # enough to be stopped on the way on a fast machine, too


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_sd_path):
    folder = tmp_path_factory.mktemp("studio") / "adapters"
    make_adapter(tiny_sd_path, folder / "shared")
    (folder / "shared" / "samples").mkdir()
    picture(folder / "shared" / "samples" / "step-000002.png", 24, 24)
    make_looking_adapter("vilt", folder / "answers", answers='["red", "blue", "two"]')
    make_looking_adapter("clip", folder / "classes")
    return folder


@pytest.fixture(scope="module")
def address(adapters, tiny_sd_path):
    with served(adapters, "--model", str(tiny_sd_path), "--max-train-steps", "500") as address:
        yield address


def test_a_subject_is_taught_stopped_continued_and_drawn(visit, adapters, tmp_path):
    page = visit()
    owner = page.context
    tab(page, "Train")
    hostile = "..%2F..%2Fevil<img src=x onerror=alert(1)>.png"
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    upload(page, as_file(hostile, picture(tmp_path / "a.png", 64, 40)), as_file("b.png", picture(tmp_path / "b.png")))
    wait_for(page, "#train-status", "2 pictures, cut to 32 × 32 pixels")
    page.wait_for_function("document.querySelectorAll('#seen .apt-whole').length == 2")
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
        page.click("#download-adapter a")
    assert download.value.suggested_filename == "my-b-dog-b.safetensors"

    page.click("#use-adapter")
    page.wait_for_selector("#draw:visible")
    wait_for(page, "#adapters", "my-b-dog-b")
    draw(page, "a photo of sks dog", 7, count=2)
    wait_for(page, "#status", r"Done\. Seed 7\.")
    wait_for_pictures(page)
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
    tab(page, "Adapters")
    page.get_by_role("button", name="Publish: my-b-dog-b").click()
    wait_for(page, "#adapters-status", "Published: my-b-dog-b")
    neighbour.reload()
    neighbour.wait_for_selector("#draw")
    assert offered(neighbour) == ["my-b-dog-b", "shared"]


def test_drawing_does_not_wait_for_a_trainings_start(visit, adapters, tmp_path):
    page = visit()
    tab(page, "Train")
    upload(page, as_file("a.png", picture(tmp_path / "a.png")), as_file("b.png", picture(tmp_path / "b.png")))
    wait_for(page, "#train-status", "2 pictures")
    page.fill("#adapter-name input, #adapter-name textarea", "slow to start")
    page.fill("#train-steps input[type=number]", str(STEPS))
    page.keyboard.press("Tab")
    # A fast machine would have begun before a slow page tells of the start.
    with ThreadPoolExecutor(1) as pool:
        suspended = pool.submit(suspended_at_its_start, adapters, "slow-to-start")
        page.click("#train")
        _, trainer = suspended.result()  # the start now lasts until the picture is there
    try:
        wait_for(page, "#train-status", "Loading the model")
        tab(page, "Generate")
        draw(page, "a glyph", 5)
        wait_for(page, "#status", "Done")
        wait_for_pictures(page)
        tab(page, "Train")
        wait_for(page, "#train-status", "Loading the model")
    finally:
        trainer.resume()
    page.click("#cancel")
    wait_for(page, "#train-status", "Stopped")


def suspended_at_its_start(adapters, training, condition=lambda job: True):
    """The job file of a training that is about to begin, and its process, suspended once the condition holds."""
    end = time.monotonic() + 240
    while not (found := list(adapters.glob(f".visitors/*/trainings/{training}/job.json"))):
        assert time.monotonic() < end
        time.sleep(0.01)
    (job,) = found
    trainer = psutil.Process(json.loads(job.read_text())["pid"])
    while not condition(job):
        assert time.monotonic() < end
        time.sleep(0.01)
    trainer.suspend()
    while trainer.status() != psutil.STATUS_STOPPED:  # a moment after the signal
        assert time.monotonic() < end
        time.sleep(0.01)
    return job, trainer


def class_pictures(job):
    """How many are drawn; the one that is being written has a hidden name."""
    return len(list(job.parent.glob("class/[!.]*.png")))


def test_a_start_counts_the_class_pictures_that_it_draws(visit, adapters, tmp_path):
    page = visit()
    tab(page, "Train")
    upload(page, as_file("a.png", picture(tmp_path / "a.png")), as_file("b.png", picture(tmp_path / "b.png")))
    wait_for(page, "#train-status", "2 pictures")
    page.fill("#adapter-name input, #adapter-name textarea", "of a class")
    page.fill("#class-prompt input, #class-prompt textarea", "a glyph")
    page.fill("#train-steps input[type=number]", str(STEPS))
    page.keyboard.press("Tab")
    # A fast machine would be through before a slow page asks.
    with ThreadPoolExecutor(1) as pool:
        suspended = pool.submit(suspended_at_its_start, adapters, "of-a-class", class_pictures)
        page.click("#train")
        job, trainer = suspended.result()
    try:
        drawn = class_pictures(job)
        wait_for(page, "#train-status", f"Drawing pictures of “a glyph”: {drawn} of 64")
        bar = page.locator("#train-status progress")
        assert float(bar.get_attribute("value")) == pytest.approx(drawn / 64, abs=1e-3)
    finally:
        trainer.resume()
    page.click("#cancel")
    wait_for(page, "#train-status", "Stopped")


def test_cards_show_sample_pictures_and_costs_a_conclusion(visit):
    page = visit()
    tab(page, "Adapters")
    page.wait_for_function(
        "[...document.querySelectorAll('#adapter-cards img')].some(image => image.naturalWidth == 24)"
    )
    tab(page, "Cost")
    choose(page, "#cost-model", "ViLT-B/32")
    said = wait_for(page, "#cost-summary", "82.4 % less")
    assert "So the same prompts need 5.7 times less arithmetic as APT than as deep prompts" in said
    assert "Choose APT where adapters are mixed" in said


def test_scores_are_explained_where_they_stand(visit):
    page = visit()
    tab(page, "Understand")
    note = page.locator("details.apt-note:visible", has_text="What do the scores say?").first
    assert not note.locator("p").is_visible()
    note.locator("summary").click()
    assert "probability" in note.locator("p").inner_text()


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
    wait_for(page, "#train-status", "“notes.txt” belongs to no picture")
    page.click('#pictures button[aria-label="Clear"], #pictures button[title="Clear"]')
    upload(page, {"name": "notes.pdf", "mimeType": "application/pdf", "buffer": b"no picture"})
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
        wait_for_pictures(page)
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
        wait_for_pictures(page)
        page.wait_for_timeout(300)
        together = pictures_of(page, "#adapted"), pictures_of(page, "#base")
        assert all(np.array_equal(*pair) for pair in zip(together, alone[page], strict=True))


def offered_now(page):
    """The adapters that are chosen."""
    return page.locator("#adapters .token").all_inner_texts()


def test_the_sweep_shows_a_row_and_wrong_orders_a_sentence(visit):
    page = visit()
    assert not offered_now(page)
    page.click("#sweep")
    assert "Choose an adapter first" in wait_for(page, "#status", "Choose")
    page.fill("#prompt textarea", " ")
    page.click("#draw")
    assert "Write a prompt first" in wait_for(page, "#status", "Write")
    choose(page, "#adapters", "shared")
    wait_for(page, "#adapters", "shared")
    draw(page, "a sks glyph", 3, steps=2)
    wait_for(page, "#status", "Done")
    wait_for_pictures(page)
    page.click("#sweep")
    page.wait_for_function("document.querySelectorAll('#grid img').length == 7")
    row = pictures_of(page, "#grid")
    assert np.array_equal(row[0], pictures_of(page, "#base")[0])
    assert np.array_equal(row[5], pictures_of(page, "#adapted")[0])


def test_with_and_without_an_adapter_is_one_click(visit):
    page = visit()
    tab(page, "Understand")
    for part, name, adapter, button, bars in (
        ("Ask", "ask", ("answerer", "answers, for ViLT"), "#ask", ("#answers", "#answers-off")),
        ("Classify", "class", ("namer", "classes"), "#classify", ("#classes", "#classes-with")),
    ):
        tab(page, part)
        chosen = "([where, label]) => document.querySelector(`#${where} input`)?.value == label"
        page.wait_for_function(chosen, arg=list(adapter))  # without a click
        page.locator(f"#{name}-examples button:has(img)").first.click()
        page.wait_for_selector(f"#{name}-picture img")
        page.click(button)
        wait_for(page, f"#{name}-status", "The answer: (red|blue|two)|Compared by their names")
        page.wait_for_selector(f"#{name}-map img")
        assert all(wait_for(page, where, r"\d+%") for where in bars)


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
    assert re.search("So the same prompts need .* times less arithmetic", page.inner_text("#cost-summary"))
