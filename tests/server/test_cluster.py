"""The server on Ray Serve: two engines on this computer, one of which dies; and how it ends."""

import base64
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import psutil
import pytest
import torch
import yaml
from conftest import randomize
from PIL import Image
from support.gate import until
from support.server import fill

from apt_diffusion import StableDiffusionAPTPipeline

pytest.importorskip("ray", reason="the extra `serve` is not installed")
pytestmark = pytest.mark.slow
APP = "apt-diffusion"
ROOT = Path(__file__).parents[2]
SIZE = {"size": "16x16", "guidance_scale": 3.0, "model": "a", "prompt": "a sks glyph"}


@pytest.fixture(scope="module")
def folder(tiny_sd_path, tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    fill(StableDiffusionAPTPipeline.from_pretrained(tiny_sd_path), place, randomize)
    return place


@pytest.fixture(scope="module")
def server(tiny_sd_path, folder, tmp_path_factory):
    """`apt-diffusion serve --replicas 2` as a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [
        "serve",
        "--model",
        tiny_sd_path,
        "--adapters",
        folder,
        "--replicas",
        2,
        "--port",
        port,
        "--max_steps",
        900,
    ]
    log = tmp_path_factory.mktemp("log") / "server.log"
    variables = os.environ | {"RAY_TMPDIR": "/tmp", "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "apt_diffusion", *map(str, words)], stdout=output, stderr=output, env=variables
        )
    address = f"http://127.0.0.1:{port}"

    def is_ready():
        assert process.poll() is None, log.read_text()[-3000:]
        return status_of(address) == 200

    started = set()
    try:
        until(is_ready, 600)
        started |= set(children(process))
        yield address, process
    finally:
        started |= set(children(process))
        process.kill()
        process.wait()
        for other in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                other.kill()


def status_of(address: str) -> int | None:
    """Of the server; none while it does not answer."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{address}/readyz", timeout=5).status_code


def children(process: subprocess.Popen) -> list[psutil.Process]:
    """What this server has started; another test may have a Ray of its own at the same time."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def named(process: subprocess.Popen, name: str) -> list[psutil.Process]:
    """Those of its processes that Ray has given this name."""
    found = []
    for child in children(process):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            if name in " ".join(child.cmdline()):
                found.append(child)
    return found


def engines_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes of its engines."""
    return named(process, f"ray::ServeReplica:{APP}:Engine")


def seconds_of(engine: psutil.Process) -> float:
    """What it has computed."""
    times = engine.cpu_times()
    return times.user + times.system


def _picture(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))), dtype=int)


def _alone(tiny_sd_path, folder, seed: int, steps: int) -> np.ndarray:
    pipe = StableDiffusionAPTPipeline.from_pretrained(tiny_sd_path).load_apt_weights(folder / "a")
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        "a sks glyph", width=16, height=16, num_inference_steps=steps, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return np.asarray(drawn.images[0], dtype=int)


def test_rays_door_has_time_to_come_up_on_a_busy_computer(server):
    """Ray kills it after five seconds otherwise."""
    (controller,) = named(server[1], "ray::ServeController")
    assert float(controller.environ()["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"]) == 60


def test_the_openai_client_gets_the_pipelines_picture(server, tiny_sd_path, folder):
    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)
    answer = client.images.generate(
        prompt="a sks glyph", model="a", size="16x16",
        extra_body={"seed": 3, "num_inference_steps": 4, "guidance_scale": 3.0},
    )  # fmt: skip
    assert np.abs(_picture(answer.data[0].b64_json) - _alone(tiny_sd_path, folder, 3, 4)).max() <= 1
    events = client.images.generate(
        prompt="a sks glyph", model="a", size="16x16", stream=True, partial_images=2,
        extra_body={"num_inference_steps": 9},
    )  # fmt: skip
    assert [event.type.split(".")[1] for event in events] == ["partial_image", "partial_image", "completed"]


def test_errors_of_an_engine_reach_the_client_as_one_sentence(server, folder):
    (folder / "torn.safetensors").write_bytes((folder / "b.safetensors").read_bytes()[:-50])
    answer = httpx.post(f"{server[0]}/v1/images/generations", json=SIZE | {"model": "torn"}, timeout=60)
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and message.startswith("torn.safetensors") and "Traceback" not in message
    bad = httpx.put(f"{server[0]}/v1/adapters/new", content=(folder / "torn.safetensors").read_bytes(), timeout=60)
    assert bad.status_code == 422 and "\n" not in bad.json()["error"]["message"]
    (folder / "torn.safetensors").unlink()


def test_an_engine_that_dies_is_replaced_and_loses_no_picture(server, tiny_sd_path, folder):
    def draw(seed):
        body = SIZE | {"seed": seed, "num_inference_steps": 300}
        return httpx.post(f"{server[0]}/v1/images/generations", json=body, timeout=240)

    engines = engines_of(server[1])
    assert len(engines) == 2
    before = {engine: seconds_of(engine) for engine in engines}

    def drawn(engine):
        return seconds_of(engine) - before[engine]

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(draw, seed) for seed in range(8)]
        until(lambda: any(drawn(engine) > 0.3 for engine in engines))  # seconds
        for engine in engines:
            engine.suspend()
        busy, other = sorted(engines, key=drawn, reverse=True)
        try:
            assert not any(answer.done() for answer in answers)
            busy.kill()
        finally:
            other.resume()
        answers = [answer.result() for answer in answers]
    assert [answer.status_code for answer in answers] == [200] * 8
    for seed in (0, 7):
        picture = _picture(answers[seed].json()["data"][0]["b64_json"])
        assert np.abs(picture - _alone(tiny_sd_path, folder, seed, 300)).max() <= 1
    until(lambda: len(set(engines_of(server[1])) - {busy}) == 2)  # another one takes its place


def test_at_its_end_it_finishes_what_it_has_accepted(server):
    """The last test of this file: the server is gone after it."""
    address, process = server
    engines = engines_of(process)
    drawing = SIZE | {"num_inference_steps": 900, "stream": True, "partial_images": 2}

    def is_refusing():
        status = status_of(address)
        assert status in (200, 503, None)
        return status == 503

    with httpx.stream("POST", f"{address}/v1/images/generations", json=drawing, timeout=240) as last:
        events = last.iter_lines()
        assert next(events) == "event: image_generation.partial_image"
        for engine in engines:
            engine.suspend()  # the picture now lasts until all that follows is done
        try:
            process.send_signal(signal.SIGTERM)
            until(is_refusing, 60)
            time.sleep(1)  # until Ray's proxy has heard of an application that is gone
            refused = httpx.post(f"{address}/v1/images/generations", json=drawing, timeout=60)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        finally:
            for engine in engines:
                engine.resume()
        assert "event: image_generation.completed" in list(events)
    assert process.wait(240) == 0


def test_the_file_for_a_cluster_names_what_there_is():
    from apt_diffusion.server import cluster

    (application,) = yaml.safe_load((ROOT / "serve.yaml").read_text())["applications"]
    module, _, name = application["import_path"].partition(":")
    assert (module, name) == (cluster.__name__, "build")
    built = cluster.build(application["args"])
    with pytest.raises(TypeError, match="modle"):
        cluster.build({"modle": "x"})
    door, engines = built._bound_deployment, built._bound_deployment.init_args[0]._bound_deployment
    assert (door.name, engines.name) == ("Door", "Engine") and engines.ray_actor_options["num_gpus"] == 1
    assert engines._deployment_config.autoscaling_config.target_ongoing_requests == 8
