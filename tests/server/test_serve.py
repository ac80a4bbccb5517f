"""`apt-diffusion serve` as a process of its own: it starts, draws, and ends when what it accepted is drawn."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from apt_diffusion.cli import main

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_draws_and_at_sigterm_finishes_what_it_has_accepted(tiny_sd_path, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["serve", "--model", tiny_sd_path, "--adapters", tmp_path / "new", "--port", port, "--max_steps", 400]
    process = subprocess.Popen(
        [sys.executable, "-m", "apt_diffusion", *map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    address = f"http://127.0.0.1:{port}"

    def draw(steps):
        body = {"prompt": "a sks glyph", "size": "16x16", "num_inference_steps": steps}
        return httpx.post(f"{address}/v1/images/generations", json=body, timeout=60)

    try:
        until = time.monotonic() + 60
        while time.monotonic() < until and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{address}/readyz", timeout=2).status_code == 200:
                    break
            time.sleep(0.1)
        assert draw(2).status_code == 200
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(draw, 400)
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            refused = draw(2)
            assert refused.status_code == 503 and "retry-after" in refused.headers
            assert last.result().status_code == 200
        assert process.wait(30) == 0
        log = process.stderr.read()
    finally:
        process.kill()
        process.wait()
    assert "Draining: accepted requests are finished" in log and "Traceback" not in log
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
