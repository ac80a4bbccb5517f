"""`apt-diffusion serve` as a process of its own: it starts, draws, and ends when what it accepted is drawn."""

import contextlib
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from support.gate import until

from apt_diffusion.cli import main

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_draws_and_at_sigterm_finishes_what_it_has_accepted(tiny_sd_path, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["serve", "--model", tiny_sd_path, "--adapters", tmp_path / "new", "--port", port, "--max_steps", 600]
    log = tmp_path / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "-m", "apt_diffusion", *map(str, words)], cwd=ROOT, stderr=output)
    address = f"http://127.0.0.1:{port}"

    body = {"prompt": "a sks glyph", "size": "16x16", "num_inference_steps": 2}

    def draw():
        return httpx.post(f"{address}/v1/images/generations", json=body, timeout=60)

    def is_ready():
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{address}/readyz", timeout=5).status_code == 200

    try:
        until(is_ready)
        assert draw().status_code == 200
        long = body | {"num_inference_steps": 600, "stream": True, "partial_images": 3}
        with httpx.stream("POST", f"{address}/v1/images/generations", json=long, timeout=240) as last:
            events = last.iter_lines()
            assert next(events) == "event: image_generation.partial_image"  # it is accepted, and being drawn
            process.send_signal(signal.SIGTERM)
            until(lambda: is_ready() is False)
            refused = draw()
            assert refused.status_code == 503 and "retry-after" in refused.headers
            assert "event: image_generation.completed" in list(events)
        assert process.wait(240) == 0
    finally:
        process.kill()
        process.wait()
    said = log.read_text()
    assert "Draining: accepted requests are finished" in said and "Traceback" not in said
    assert (tmp_path / "new").is_dir()


def test_a_model_that_is_none_is_one_sentence(tmp_path, capsys):
    assert main(["serve", "--model", str(tmp_path), "--adapters", str(tmp_path / "a")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(tmp_path) in error and "Traceback" not in error


def test_a_port_that_is_taken_is_told_before_the_model_loads(tmp_path, capsys, no_models):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--adapters", str(tmp_path), "--port", port]) == 1
    assert f"port {port}" in capsys.readouterr().err
