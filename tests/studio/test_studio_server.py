"""The studio's server: what it refuses, what it says when something is wrong, and that everybody can use its pages."""

import json
import os
import signal
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from support.studio_browser import (
    as_file,
    call,
    choose,
    configuration,
    draw,
    fetch,
    function_of,
    served,
    tab,
    upload,
    wait_for,
)
from support.studio_helpers import ROOT, bomb, copy_adapter, disguised, make_adapter, picture

from apt_diffusion.studio.library import EXAMPLES

pytestmark = pytest.mark.slow  # a server starts first


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_sd_path):
    """A good one with a hostile card, one that will be damaged, and one for another model."""
    folder = tmp_path_factory.mktemp("studio") / "adapters"
    shared = make_adapter(tiny_sd_path, folder / "shared")
    card = "# A card <img src=x onerror=alert(1)><script>alert(2)</script>\n\n[here](javascript:alert(3))\n"
    (shared / "README.md").write_text(card)
    copy_adapter(shared, folder / "damaged")
    copy_adapter(EXAMPLES / "mushroom", folder / "foreign")
    return folder


@pytest.fixture(scope="module")
def address(adapters, tiny_sd_path):
    with served(adapters, "--model", str(tiny_sd_path), "--queue-size", "1", "--max-train-steps", "5000") as address:
        yield address


# What is said


def test_who_waits_and_who_finds_no_place_in_the_queue_is_told_so(visit):
    first, second, third = visit(), visit(), visit()
    choose(first, "#adapters", "shared")
    wait_for(first, "#adapters", "shared")
    draw(first, "a sks glyph", 1, steps=1)
    wait_for(first, "#status", "Done")
    draw(first, "a sks glyph", 1, steps=100, count=8, side=64)  # takes long enough for the others to come
    wait_for(first, "#status", "Step")
    second.click("#draw")
    wait_for(second, "#status", "Waiting for the model")
    third.click("#draw")
    assert "Too many people wait" in wait_for(third, "#status", "Too many")
    first.click("#stop-drawing")
    wait_for(first, "#status", r"^Stopped\.$")
    wait_for(second, "#status", "Done")
    third.click("#draw")
    wait_for(third, "#status", "Done")
    first.wait_for_timeout(300)
    assert first.inner_text("#status") == "Stopped."


def test_gradios_own_word_for_errors_covers_nothing(visit):
    page = visit()
    draw(page, "a sks glyph", 1, steps=1)
    said = wait_for(page, "#status", "Done")
    mark = '<div data-testid="status-tracker"><span class="error">Error</span></div>'
    page.evaluate("mark => document.querySelector('#status').insertAdjacentHTML('afterbegin', mark)", mark)
    assert page.inner_text("#status").strip() == said.strip()


def test_adapters_that_cannot_be_used_get_a_sentence_without_a_path(visit, adapters):
    page = visit()
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    for name, words in (("damaged", "not there any more"), ("foreign", "was made for the base model 'miniature'")):
        choose(page, "#adapters", name)
        wait_for(page, "#adapters", name)
        if name == "damaged":
            file = adapters / name / "pytorch_apt_weights.safetensors"
            file.write_bytes(file.read_bytes()[:-100])
        page.click("#draw")
        text = wait_for(page, "#status", words)
        assert str(adapters) not in text and "Traceback" not in text
        page.locator("#adapters").get_by_role("button", name="Clear").click()
    choose(page, "#adapters", "shared")
    tab(page, "Adapters")
    page.get_by_text("About shared").click()
    wait_for(page, "#adapter-cards", "A card")
    assert not page.locator("#adapter-cards :is([onerror], script, a[href^=javascript])").count()
    tab(page, "Generate")
    draw(page, "a sks glyph", 1, steps=2)
    wait_for(page, "#status", "Done")


def test_pictures_to_look_at_are_checked_before_anything_decodes_them(visit, tmp_path):
    page = visit()
    tab(page, "Understand")
    tab(page, "Classify")
    for make, name, words in ((bomb, "bomb.png", "million"), (disguised, "drawing.png", "no picture")):
        page.wait_for_selector("#class-picture input[type=file]", state="attached")
        upload(page, as_file(name, make(tmp_path / name)), into="#class-picture")
        page.wait_for_selector('#class-picture button[aria-label="Remove Image"]')
        page.click("#classify")
        text = wait_for(page, "#class-status", words)
        assert name in text and "/" not in text and not page.locator(".toast-body").count()
        page.click('#class-picture button[aria-label="Remove Image"]')
    page.locator("#class-examples button:has(img)").first.click()
    page.wait_for_selector("#class-picture img")
    page.click("#classify")
    wait_for(page, "#class-status", "Compared by their names")


def test_a_trainer_that_is_killed_leaves_a_sentence_and_can_go_on(visit, address, adapters, tmp_path):
    page = visit()
    tab(page, "Train")
    upload(page, as_file("a.png", picture(tmp_path / "a.png")))
    wait_for(page, "#train-status", "1 pictures, cut to")
    page.fill("#train-steps input[type=number]", "4000")
    page.keyboard.press("Tab")
    page.click("#train")
    wait_for(page, "#train-status", r"Step [1-9]\d+")

    # A stranger can neither stop it nor take it over.
    config, by_id = configuration(page)
    for button, words in (("cancel", "no training to stop"), ("resume", "no stopped training")):
        function = function_of(config, by_id, button)
        assert words in call(address, function["id"], [{}])[1]
    (job,) = [json.loads(file.read_text()) for file in adapters.glob(".visitors/*/trainings/*/job.json")]
    assert not job["cancelled"]

    os.kill(job["pid"], signal.SIGKILL)
    assert "killed" in wait_for(page, "#train-status", "The training failed")
    page.wait_for_selector("#train:enabled")
    page.click("#resume:enabled")
    wait_for(page, "#train-status", r"Step [1-9]\d+ of 4000")
    page.click("#cancel:enabled")
    wait_for(page, "#train-status", "Stopped")


# What is refused


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


def test_doors_that_the_studio_does_not_use_are_closed(address):
    for path in (
        "file=http://example.com/",
        "proxy=http://example.com/",
        "deep_link?session_hash=forged",
        "dev/reload",
    ):
        assert fetch(f"{address}/gradio_api/{path}")[0] == 403
    for path in ("process_recording", "component_server", "component_server/"):
        assert fetch(f"{address}/gradio_api/{path}", data=b"{}", method="POST")[0] == 403
    for path in ("/monitoring", "/gradio_api/runs", "/gradio_api/run-history/records"):
        assert fetch(address + path)[0] in (403, 404, 405)


# Everybody


ROLES = ("button", "textbox", "combobox", "slider", "spinbutton", "checkbox", "tab", "link")


def test_every_control_has_a_name_that_is_read_aloud(visit):
    page = visit()
    choose(page, "#adapters", "shared")
    tools = page.context.new_cdp_session(page)
    count = 0
    for names in (["Generate"], ["Train"], ["Understand", "Ask"], ["Classify"], ["Watch it draw"], ["Cost"]):
        for name in names:
            tab(page, name)
            page.wait_for_timeout(300)
        for closed in page.locator("button.label-wrap:visible").all():
            closed.click()
        for node in tools.send("Accessibility.getFullAXTree")["nodes"]:
            role = node.get("role", {}).get("value")
            if role in ROLES and not node["ignored"]:
                count += 1
                assert node["name"]["value"].strip(), f"a {role} on the page {name} has no name: {node}"
    assert count > 80


SHOWN_LATER = ("weight-1", "weight-2", "weight-3", "weight-4")


def test_every_control_has_a_help_line(visit):
    """Its own, or one that follows it or its row, or stands in its row."""
    config, _ = configuration(visit())
    parts = {part["id"]: part for part in config["components"]}

    def is_help(node):
        return "apt-help" in (parts[node["id"]]["props"].get("elem_classes") or [])

    def controls(node, helped):
        part, children = parts[node["id"]], node.get("children") or []
        props = part["props"]
        if props.get("visible") in (False, "hidden") and props.get("elem_id") not in SHOWN_LATER:
            return  # for scripts and programs
        if part["type"] in ("textbox", "slider", "number", "checkbox", "dropdown"):
            yield props["label"], bool(props.get("info"))
        if part["type"] in ("button", "downloadbutton", "file", "image") and props.get("interactive") is not False:
            yield props.get("label") or props["value"], helped
        in_row = part["type"] == "row" and (helped or any(map(is_help, children)))
        for child, following in zip(children, [*children[1:], None], strict=False):
            yield from controls(child, in_row or (following is not None and is_help(following)))

    found = [pair for child in config["layout"]["children"] for pair in controls(child, False)]
    assert len(found) > 40
    assert not [label for label, helped in found if not helped]
