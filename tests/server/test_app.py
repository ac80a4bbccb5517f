"""The server as its clients see it: OpenAI's own client, plain HTTP, bad requests, slow clients."""

import base64
import http.client
import io
import json
import logging
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import torch
from conftest import randomize
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from support.gate import Gate, until
from support.server import fill, served

from apt_diffusion import StableDiffusionAPTPipeline
from apt_diffusion.server.settings import ServerSettings

FEW = {"num_inference_steps": 3, "guidance_scale": 3.0}


def load(tiny_sd_path):
    pipe = StableDiffusionAPTPipeline.from_pretrained(tiny_sd_path).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tiny_sd_path, tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    fill(StableDiffusionAPTPipeline.from_pretrained(tiny_sd_path), place, randomize)
    return place


@pytest.fixture(scope="module")
def site(tiny_sd_path, folder):
    settings = ServerSettings(adapters=str(folder), max_images=3, max_steps=400, max_adapter_bytes=2**20)
    with served(load(tiny_sd_path), settings) as (address, engine):
        yield address, engine


@pytest.fixture
def client(site):
    return openai.OpenAI(base_url=f"{site[0]}/v1", api_key="none", max_retries=0)


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def same(first, second) -> bool:
    return np.array_equal(np.asarray(first), np.asarray(second))


def test_openais_client_gets_what_the_pipeline_draws(client, tiny_sd_path, folder):
    answer = client.images.generate(
        prompt="a sks glyph", model="a:0.5+b", n=2, size="16x24", extra_body=FEW | {"seed": 7}
    )
    pipe = load(tiny_sd_path)
    for name, place in (("a", folder / "a"), ("b", folder / "b.safetensors")):
        pipe.load_apt_weights(place, name)
    for index, image in enumerate(answer.data):
        expected = pipe(
            "a sks glyph", width=16, height=24, num_inference_steps=3, guidance_scale=3.0,
            generator=torch.Generator().manual_seed(7 + index), apt_scale={"a": 0.5, "b": 1.0},
        )  # fmt: skip
        assert same(picture(image.b64_json), expected.images[0])
    assert answer.size == "16x24" and answer.output_format == "png" and len(answer.data) == 2


def test_one_line_of_curl_gets_the_same_picture(site, client):
    body = {"prompt": "a sks glyph", "model": "a", "size": "16x16", "seed": 3} | FEW
    answer = httpx.post(f"{site[0]}/v1/images/generations", json=body, timeout=60)
    again = client.images.generate(prompt="a sks glyph", model="a", size="16x16", extra_body=FEW | {"seed": 3})
    assert answer.status_code == 200 and len(answer.headers["x-request-id"]) == 16
    assert answer.json()["data"][0]["b64_json"] == again.data[0].b64_json
    other = client.images.generate(prompt="a sks glyph", model="base", size="16x16", extra_body=FEW | {"seed": 3})
    assert not same(picture(other.data[0].b64_json), picture(again.data[0].b64_json))


def test_a_stream_shows_the_picture_on_its_way(client):
    events = list(
        client.images.generate(
            prompt="a sks glyph", model="a", size="16x16", stream=True, partial_images=2,
            extra_body={"num_inference_steps": 9, "seed": 1},
        )
    )  # fmt: skip
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    pictures = [picture(event.b64_json) for event in events]
    assert all(p.size == (16, 16) for p in pictures) and not same(pictures[0], pictures[2])
    whole = client.images.generate(
        prompt="a sks glyph", model="a", size="16x16", extra_body={"num_inference_steps": 9, "seed": 1}
    )
    assert same(picture(whole.data[0].b64_json), pictures[2])


def test_a_picture_to_start_from(client, tiny_sd_path):
    from diffusers import StableDiffusionImg2ImgPipeline

    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    file = io.BytesIO()
    start.save(file, "PNG")
    settings = {"num_inference_steps": 5, "guidance_scale": 3.0, "strength": 0.6}
    answer = client.images.edit(
        image=("start.png", file.getvalue()), prompt="a sks glyph", extra_body=settings | {"seed": 2}
    )
    stock = StableDiffusionImg2ImgPipeline(**load(tiny_sd_path).components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    expected = stock("a sks glyph", image=start, generator=torch.Generator().manual_seed(2), **settings).images[0]
    assert same(picture(answer.data[0].b64_json), expected)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_pictures_say_that_a_model_made_them(client, kind):
    answer = client.images.generate(prompt="two dots", size="16x16", output_format=kind, extra_body=FEW | {"seed": 5})
    data = base64.b64decode(answer.data[0].b64_json)
    image = Image.open(io.BytesIO(data))
    assert image.format == kind.upper() and b"digitalsourcetype/trainedAlgorithmicMedia" in data
    if kind == "png":
        assert image.text["parameters"].startswith("two dots\nSteps: 3, CFG scale: 3.0, Seed: 5")


def test_models_are_the_base_and_what_is_in_the_folder(client):
    assert [model.id for model in client.models.list()] == ["base", "a", "b"]
    assert client.models.retrieve("a").owned_by == "apt-diffusion"
    with pytest.raises(openai.NotFoundError, match="no model 'nobody'"):
        client.models.retrieve("nobody")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": "x", "model": "nobody"}, 404, "no model 'nobody'"),
        ({"prompt": "x", "model": "a:much"}, 400, "must be a number"),
        ({"prompt": "x", "model": "a+a"}, 400, "stands twice"),
        ({"prompt": "x" * 10_001}, 400, "prompt: String should have at most 10000"),
        ({"model": "a"}, 400, "prompt: Field required"),
        ({"prompt": "x", "n": 4}, 400, "n may be 3 here"),
        ({"prompt": "x", "n": 2, "stream": True}, 400, "n must be 1"),
        ({"prompt": "x", "size": "16"}, 400, "written as `512x512`"),
        ({"prompt": "x", "size": "18x16"}, 400, "multiples of 4"),
        ({"prompt": "x", "size": "16000x16000"}, 400, "pixels that are drawn at once"),
        ({"prompt": "x", "num_inference_steps": 401}, 400, "num_inference_steps may be 400 here"),
        ({"prompt": "x", "response_format": "url"}, 400, "response_format"),
        ({"prompt": "x", "quality": "high"}, 400, "quality: Extra inputs are not permitted"),
        ({"prompt": "x", "scheduler": "Karras"}, 400, "no sampler"),
        ({"prompt": "x", "seed": -1}, 400, "seed"),
        ({"prompt": "x", "timeout_s": 0.01, "num_inference_steps": 300}, 504, r"not finished within 0\.01 s"),
        ([1], 400, "The body must be an object"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(site, body, status, message):
    answer = httpx.post(f"{site[0]}/v1/images/generations", json=body, timeout=60)
    assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert re.search(message, answer.json()["error"]["message"])


def test_bodies_that_are_no_forms(site):
    address = f"{site[0]}/v1/images"
    for text in ("{", "[" * 100_000):
        assert httpx.post(f"{address}/generations", content=text).json()["error"]["message"] == "The body is no JSON."
    big = httpx.post(f"{address}/generations", content=b" " * 2**18)
    assert big.status_code == 413 and big.json()["error"]["message"] == "The body of this request may have 128 KiB."
    assert len(big.headers["x-request-id"]) == 16
    assert 'apt_http_requests_total{route="other",status="413"}' in httpx.get(f"{site[0]}/metrics").text
    chunks = httpx.post(f"{address}/generations", content=(b" " * 2**16 for _ in range(4)))  # says no length
    assert chunks.status_code == 413
    fields = {"prompt": "x"}
    for files, message in (
        ({}, "Send one file"),
        ({"image": b"no picture"}, "no picture that can be read"),
        ({"image": _bomb()}, "pixels"),
        ([("image", b"1"), ("mask", b"2")], "Send one file"),
    ):
        answer = httpx.post(f"{address}/edits", data=fields, files=files)
        assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text
    assert httpx.get(f"{site[0]}/nothing").json()["error"]["message"] == "Not Found"


def _bomb() -> bytes:
    """A small PNG of 400 million pixels."""
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


def test_adapters_come_are_replaced_and_go(site, client, folder):
    def draw(name):
        answer = client.images.generate(prompt="a sks glyph", model=name, size="16x16", extra_body=FEW | {"seed": 1})
        return picture(answer.data[0].b64_json)

    def put(name, data):
        return httpx.put(f"{site[0]}/v1/adapters/{name}", content=data, timeout=60)

    first, second = (
        (folder / "b.safetensors").read_bytes(),
        (folder / "a" / "pytorch_apt_weights.safetensors").read_bytes(),
    )
    assert put("new", first).status_code == 201
    assert same(draw("new"), draw("b"))
    torn = put("new", second[:-100])
    assert torn.status_code == 422 and "cannot be used" in torn.json()["error"]["message"]
    assert str(folder) not in torn.text and same(draw("new"), draw("b"))  # the former one stays
    assert put("new", second).status_code == 200 and same(draw("new"), draw("a"))
    for name, data, status in (
        ("base", first, 400), ("..", first, 404), ("%2e%2e%2fx", first, 404), (".hidden", first, 400),
        ("x", b"", 400), ("x", b"no adapter", 422), ("x", b"\0" * (2**20 + 1), 413),
    ):  # fmt: skip
        assert put(name, data).status_code == status, name
    assert httpx.delete(f"{site[0]}/v1/adapters/new").json() == {"id": "new", "object": "model", "deleted": True}
    assert httpx.delete(f"{site[0]}/v1/adapters/new").status_code == 404
    with pytest.raises(openai.NotFoundError):
        draw("new")
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b.safetensors"]


def test_an_adapter_of_another_model_is_refused_before_anybody_sees_it(site, folder, tmp_path):
    from safetensors.torch import save_file

    save_file(
        {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.apt.prompts": torch.zeros(4, 999)}, tmp_path / "x"
    )
    answer = httpx.put(f"{site[0]}/v1/adapters/other", content=(tmp_path / "x").read_bytes())
    assert answer.status_code == 422
    assert httpx.get(f"{site[0]}/v1/models/other").status_code == 404


def test_who_leaves_is_not_drawn_for(site):
    address, engine = site
    before = engine.statistics()["cancelled"]
    body = {"prompt": "a sks glyph", "num_inference_steps": 400, "size": "16x16"}

    def leave_while_it_is_drawn(body):
        until(lambda: not engine.statistics()["drawing"])  # for anybody else
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
        connection.request("POST", "/v1/images/generations", json.dumps(body))
        until(lambda: engine.statistics()["drawing"])
        connection.close()

    def wait_cancelled(count):
        until(lambda: engine.statistics()["cancelled"] == before + count, 60)

    leave_while_it_is_drawn(body)
    wait_cancelled(1)
    with httpx.stream(
        "POST", f"{address}/v1/images/generations", json=body | {"stream": True, "partial_images": 3}, timeout=60
    ) as s:
        next(s.iter_lines())
    wait_cancelled(2)
    leave_while_it_is_drawn(body | {"stream": True, "partial_images": 0})  # before the first event
    wait_cancelled(3)


def test_the_same_request_twice_is_drawn_once(site):
    address, engine = site
    body = {"prompt": "a sks glyph", "size": "16x16", "num_inference_steps": 30}  # without a seed
    headers = {"Idempotency-Key": "order-7"}

    def post(body):
        return httpx.post(f"{address}/v1/images/generations", json=body, headers=headers, timeout=60)

    before = engine.statistics()["accepted"]
    with ThreadPoolExecutor() as pool:
        answers = [answer.json()["data"][0]["b64_json"] for answer in pool.map(post, [body] * 3)]
    assert len(set(answers)) == 1 and engine.statistics()["accepted"] == before + 1
    assert post(body | {"stream": True}).status_code == 400
    other = post(body | {"prompt": "two dots"})
    assert other.status_code == 422 and "was used for another request" in other.json()["error"]["message"]


def test_metrics_are_those_of_prometheus(site):
    httpx.post(f"{site[0]}/v1/images/generations", json={"prompt": "x", "size": "16x16"} | FEW, timeout=60)
    text = httpx.get(f"{site[0]}/metrics").text
    samples = {}
    for family in text_string_to_metric_families(text):
        samples |= {(sample.name, *sorted(sample.labels.items())): sample.value for sample in family.samples}
    statistics = site[1].statistics()
    assert samples[("apt_engine_requests_total", ("outcome", "finished"))] == statistics["finished"] > 0
    assert samples[("apt_engine_batch_size_count",)] == statistics["passes"]
    assert samples[("apt_engine_batch_size_bucket", ("le", "+Inf"))] == statistics["passes"]
    route = ("route", "/v1/images/generations")
    assert samples[("apt_http_requests_total", route, ("status", "200"))] > 0
    assert samples[("apt_http_request_seconds_count", route)] > 0


def logged(caplog, count):
    """The line of the request with this number; it is written after the answer is sent."""
    end = time.monotonic() + 30
    while len(caplog.records) < count and time.monotonic() < end:
        time.sleep(0.01)
    return json.loads(caplog.records[count - 1].getMessage())


def test_the_log_has_ids_and_no_prompts_unless_they_are_asked_for(tiny_sd_path, folder, caplog, site):
    body = {"prompt": "a secret wish", "size": "16x16"} | FEW
    with caplog.at_level(logging.INFO, "apt_diffusion.server"):
        httpx.post(f"{site[0]}/v1/images/generations", json=body, headers={"X-Request-Id": "mine-1"}, timeout=60)
        line = logged(caplog, 1)
        assert (line["request_id"], line["status"], line["route"]) == ("mine-1", 200, "/v1/images/generations")
        assert "secret" not in caplog.text
        with served(load(tiny_sd_path), ServerSettings(adapters=str(folder), log_prompts=True)) as (address, _):
            httpx.post(f"{address}/v1/images/generations", json=body, headers={"X-Request-Id": "a\tb"}, timeout=60)
        line = json.loads(caplog.records[-1].getMessage())
        assert line["prompt"] == "a secret wish" and line["request_id"] != "a\tb"


def test_the_page_that_explains_the_routes(site):
    schema = httpx.get(f"{site[0]}/openapi.json").json()
    form = schema["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "model", "seed", "apt_scale"} <= set(form["properties"]) and form["required"] == ["prompt"]
    assert all(route.get("summary") for methods in schema["paths"].values() for route in methods.values())
    assert httpx.get(f"{site[0]}/docs").status_code == 200


def test_a_full_server_says_when_to_come_back_and_a_draining_one_finishes(tiny_sd_path, folder):
    settings = ServerSettings(adapters=str(folder), max_batch_size=1, max_queue=1)
    body = {"prompt": "a sks glyph", "size": "16x16", "num_inference_steps": 20}
    pipe = load(tiny_sd_path)
    gate = Gate(pipe.unet)
    with served(pipe, settings) as (address, engine), ThreadPoolExecutor() as pool, gate:

        def post(seed):
            return httpx.post(f"{address}/v1/images/generations", json=body | {"seed": seed}, timeout=240)

        first = pool.submit(post, 1)
        gate.wait()  # until it is being drawn
        second = pool.submit(post, 2)
        until(lambda: engine.statistics()["queued"])
        full = post(3)
        assert full.status_code == 503 and int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "overloaded"
        assert httpx.get(f"{address}/readyz").text == "ready"
        drained = threading.Thread(target=engine.drain, args=(240,))
        drained.start()
        until(lambda: engine.is_draining)
        assert httpx.get(f"{address}/readyz").status_code == 503 and httpx.get(f"{address}/healthz").text == "ok"
        late = post(4)
        assert late.status_code == 503 and "retry-after" in late.headers
        gate.open()
        drained.join()
        assert [first.result().status_code, second.result().status_code] == [200, 200]


def test_clients_that_are_slow_are_left(tiny_sd_path, folder):
    settings = ServerSettings(adapters=str(folder))
    with served(load(tiny_sd_path), settings, {"body_seconds": 0.3}) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
            answer = b"".join(iter(lambda: connection.recv(10_000), b"")).decode()  # headers and body come in parts
        assert answer.startswith("HTTP/1.1 408") and "did not arrive within 0 s" in answer
        assert httpx.get(f"{address}/healthz").status_code == 200
