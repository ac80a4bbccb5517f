"""A hostile visitor at the studio's door: what is refused, what is hidden, and that others notice nothing."""

import http.client
import json
import os
import signal
import struct
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support.studio_browser import (
    call,
    choose,
    configuration,
    draw,
    fetch,
    function_of,
    pictures_of,
    served,
    tab,
    wait_for,
    wait_for_pictures,
)
from support.studio_helpers import make_adapter, picture

HOSTILE = "`</code></q><h1>Pay here</h1><img src=http://evil.example/x.png onerror=alert(1)> {{7*7}} ${alert(2)}"
TOKEN = "a token of sixteen or more"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_sd_path):
    """One adapter whose card, prompt and header are an attack, or give away where it was made."""
    folder = tmp_path_factory.mktemp("studio") / "adapters"
    training = json.dumps({"output_dir": str(folder / "shared"), "instance_data_dir": "/home/anna/secret", "step": 3})
    shared = make_adapter(
        tiny_sd_path, folder / "shared", instance_prompt=HOSTILE, training=training,
        command_line="train --instance_data_dir /home/anna/secret",
    )  # fmt: skip
    (shared / "README.md").write_text(
        "# A card\n\n![x](http://evil.example/y.png) <img src=http://evil.example/z.png>\n\n"
        "[click](http://evil.example) <http://evil.example> ![r][r]\n\n[r]: http://evil.example/r.png\n\n"
        f"Prompt: `{HOSTILE}`\n"
    )
    return folder


@pytest.fixture(scope="module")
def address(adapters, tiny_sd_path):
    with served(adapters, "--model", str(tiny_sd_path), "--admin-token", TOKEN) as address:
        yield address


def headers_of(url, **settings):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, **settings), timeout=60) as response:
            return response.status, response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.headers


# Markup


def test_what_others_have_written_is_text_in_every_browser(visit, address):
    page = visit()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    tab(page, "Adapters")
    page.get_by_text("About shared").click()
    wait_for(page, "#adapter-cards", "A card")
    assert HOSTILE in page.inner_text("#adapter-cards q")
    assert "{{7*7}}" in page.inner_text("#adapter-cards") and "Pay here" not in page.locator("h1").all_inner_texts()
    assert not page.locator("#adapter-cards :is(img[src*=evil], a[href*=evil], [onerror], script)").count()
    page.get_by_role("button", name="Use it: shared").click()
    page.wait_for_selector("#draw:visible")
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('Pay here')")
    draw(page, HOSTILE, 3, steps=2)
    wait_for(page, "#status", "Done")
    wait_for_pictures(page)
    assert page.get_attribute("#adapted img", "alt").startswith(HOSTILE)
    tab(page, "Pictures")
    page.wait_for_selector("#history img")
    assert HOSTILE in page.inner_text("#history")
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


def test_a_script_that_got_into_a_page_does_not_run(visit):
    """The second line of defence: the Content-Security-Policy, were something not escaped."""
    page = visit()
    page.evaluate(
        """() => {
            const place = document.createElement("div");
            place.innerHTML = "<img src=data:, onerror='window.hit = 1'><a href='javascript:window.hit = 2'>x</a>";
            document.body.append(place);
            const script = document.createElement("script");
            script.textContent = "window.hit = 3";
            document.body.append(script);
            const other = new Image();
            other.src = "http://evil.example/leak.png";
            place.querySelector("a").click();
        }"""
    )
    page.wait_for_timeout(500)
    assert page.evaluate("window.hit") is None


# Headers


def test_every_answer_has_headers_that_keep_others_out(address):
    page = {"accept": "text/html"}
    for path, given in (("/", page), ("/", {}), ("/gradio_api/info", {}), ("/nothing", {}), ("/studio/page.js", {})):
        status, headers = headers_of(address + path, headers=given)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'self'" in policy, (path, status)
        script = policy.partition("script-src ")[2].partition(";")[0]
        assert "unsafe-inline" not in script and "http" not in script
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "SAMEORIGIN"


def test_other_sites_may_neither_read_nor_write(address):
    for origin in ("http://evil.example", "null", address.replace("127.0.0.1", "localhost")):
        for method, path in (
            ("GET", "/config"),
            ("POST", "/gradio_api/queue/join"),
            ("OPTIONS", "/gradio_api/upload"),
        ):
            given = {"origin": origin, "access-control-request-method": "POST", "content-type": "application/json"}
            data = b"{}" if method == "POST" else None
            status, headers = headers_of(address + path, headers=given, method=method, data=data)
            assert status in (400, 403) and not [name for name in headers if name.lower().startswith("access-control")]
    assert headers_of(address + "/config", headers={"origin": address})[0] == 200


# Requests


def test_no_address_of_a_visitor_reaches_the_downloader(visit, address):
    config, by_id = configuration(visit())
    for name in ("train", "classify"):
        function = function_of(config, by_id, name)
        for file in ({"path": "http://evil.example/a.png"}, {"path": "a.png", "url": "http://evil.example/a.png"}):
            file |= {"meta": {"_type": "gradio.FileData"}}
            data = [[file] if name == "train" else file, *[None] * (len(function["inputs"]) - 1)]
            status, words = call(address, function["id"], data)
            assert status == 400 and "must be uploaded first" in words


def test_wrong_values_are_told_rightly_and_leave_no_trace_in_the_log(visit, address, adapters):
    page = visit()
    config, by_id = configuration(page)
    drawing = function_of(config, by_id, "draw")
    good = {
        "prompt": "a", "negative-prompt": "", "steps": 2, "guidance": 3, "width": 16, "height": 16, "seed": 1,
        "count": 1, "sampler": "the model's own", "weight-1": 1, "weight-2": 1, "weight-3": 1, "weight-4": 1,
        "block-text-encoder": 1, "block-down": 1, "block-mid": 1, "block-up": 1, "change": 0.5, "new-seed": False,
    }  # fmt: skip
    for changes, words in (
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": "x"}, "seed must be a number"),
        ({"steps": 10**9}, "number of steps must be from 1"),
        ({"steps": 2.5}, "must be a whole number"),
        ({"prompt": {"a": 1}}, "prompt must be a text"),
        ({"adapters": [["x"]]}, "list of names"),
        ({"adapters": ["own/../../shared"]}, "not there any more"),
        ({"width": 10**6}, "multiple of 8"),
        ({"sampler": "__class__"}, "no sampler"),
        ({"mask": "data:image/png;base64,AAAA", "start-picture": None}, "Done"),
    ):
        data = [(good | changes).get(by_id[i]) for i in drawing["inputs"]]
        status, answer = call(address, drawing["id"], data)
        assert status == 200 and words in answer, (changes, answer[-500:])
        assert "Traceback" not in answer and "NoneType" not in answer
    for body in (b'{"data": [NaN]}', b"{", b"[]", json.dumps({"fn_index": 10**9, "data": []}).encode()):
        for path in ("queue/join", "run/predict", "call/generate", "cancel", "reset"):
            status, answer = fetch(f"{address}/gradio_api/{path}", data=body, method="POST")
            assert status < 500 and b"Traceback" not in answer, (path, status, answer)
    log = adapters.parent / f"{adapters.name}.log"
    assert "Traceback" not in log.read_text() and "Exception" not in log.read_text()


def test_large_and_many_requests_are_refused(address):
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/gradio_api/queue/join")
    connection.putheader("Content-Length", str(2 * 2**20))
    connection.endheaders()  # the answer comes before a byte of the body is sent
    answer = connection.getresponse()
    assert answer.status == 413 and b"1 MB" in answer.read()
    connection.close()


# Files


def test_downloads_say_nothing_of_the_server(address, adapters):
    status, content = fetch(f"{address}/studio/adapters/public/shared")
    assert status == 200
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].decode()
    assert "apt_config" in header and "command_line" not in header
    for secret in (str(adapters), "/home/anna", "secret"):
        assert secret not in header
    assert json.loads(json.loads(header)["__metadata__"]["training"])["step"] == 3


def test_a_visitors_picture_is_nobody_elses_and_previews_are_not_kept(visit, address, adapters):
    anna, bert = visit(), visit()
    choose(anna, "#adapters", "shared")
    wait_for(anna, "#adapters", "shared")
    before = {path for path in adapters.parent.rglob("*") if path.is_file()}
    draw(anna, "a sks glyph", 5, steps=30, count=2)
    wait_for(anna, "#status", "Done")
    wait_for_pictures(anna)
    new = {path for path in adapters.parent.rglob("*") if path.is_file()} - before
    assert len(new) == 4 and all(path.parent.name == "drawn" for path in new)  # adapted and base, two each
    assert pictures_of(anna, "#adapted").shape == (2, 32, 32, 3)
    source = anna.get_attribute("#adapted img", "src")
    assert anna.request.get(address + source).status == 200
    assert bert.request.get(address + source).status == 404
    assert fetch(address + source)[0] == 404
    for path in (
        "/studio/pictures/..%2f..%2fx.png",
        "/studio/adapters/own/../../x",
        "/studio/samples/public/shared/x",
    ):
        assert fetch(address + path)[0] == 404


# The owner


def test_the_owners_page_opens_with_the_token_and_stops_a_training(visit, address, adapters, tmp_path):
    page = visit()
    tab(page, "Train")
    page.set_input_files("#pictures input[type=file]", str(picture(tmp_path / "a.png")))
    wait_for(page, "#train-status", "1 pictures, cut to")
    page.fill("#class-prompt input, #class-prompt textarea", "")
    page.fill("#train-steps input[type=number]", "2000")
    page.keyboard.press("Tab")
    page.click("#train")
    wait_for(page, "#train-status", r"Step [1-9]")
    page.context.clear_cookies()  # the visitor is lost: nobody but the owner can stop it
    owner = visit()
    owner.goto(f"{address}/studio/admin")
    assert "Token" in owner.inner_text("body") and "Stop" not in owner.inner_text("body")
    assert fetch(f"{address}/studio/admin", data=b"do=stop&what=x", method="POST")[0] == 403
    owner.fill("input[name=token]", "wrong" * 4)
    owner.click("button")
    assert "not the token" in owner.inner_text("body")
    owner.fill("input[name=token]", TOKEN)
    owner.click("button")
    assert "my-subject" in owner.inner_text("body")
    owner.get_by_role("button", name="Stop").click()
    assert "stops after its step" in owner.inner_text("body")
    (job,) = [json.loads(file.read_text()) for file in adapters.glob(".visitors/*/trainings/*/job.json")]
    assert job["cancelled"]
    owner.get_by_role("button", name="Unpublish public/shared").click()
    assert "not published any more" in owner.inner_text("body") and not (adapters / "shared").exists()


def test_the_server_ends_at_once_though_pages_are_open(chromium, adapters, tiny_sd_path, tmp_path):
    with served(tmp_path / "adapters", "--model", str(tiny_sd_path)) as address:
        page = chromium.new_page()
        page.goto(address)
        page.wait_for_selector("#draw")
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        server = next(int(c) for c in children if f"{tmp_path}/adapters" in Path(f"/proc/{c}/cmdline").read_text())
        began = time.monotonic()
        os.kill(server, signal.SIGTERM)
        while "Z" not in Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[0]:
            assert time.monotonic() - began < 15  # not until the pages are closed
            time.sleep(0.1)
        page.close()
