"""What is said of the server at work: an update while people draw, and the benchmark of a small load."""

import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.gate import until

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
# Two versions of one application: settings of the engines and of the door change, so all replicas are replaced.
UPDATE = """
import sys
import ray
from ray import serve
from apt_diffusion.server.cluster import build

model, adapters, port = sys.argv[1:]
free = {"ray_actor_options": {"num_cpus": 0}}
args = {"model": model, "adapters": adapters, "replicas": 2, "engine_options": free, "door_options": free}
ray.init(include_dashboard=False, log_to_driver=False)
serve.start(http_options={"port": int(port)})
for queue in (64, 60):
    serve.run(build({**args, "max_queue": queue}), name="apt-diffusion")
    print("up", flush=True)
    sys.stdin.readline()
serve.shutdown()
"""


def test_an_update_loses_no_request(tiny_sd_path, tmp_path):
    pytest.importorskip("ray", reason="the extra `serve` is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = os.environ | {"RAY_TMPDIR": "/tmp", "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    variables |= {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}  # as `apt-diffusion serve` sets it
    words = [sys.executable, "-c", UPDATE, str(tiny_sd_path), str(tmp_path), str(port)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)
    answers: list[int] = []
    updated = threading.Event()

    def draw():
        body = {"prompt": "a sks glyph", "size": "16x16", "num_inference_steps": 40}
        while not updated.is_set():
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/images/generations", json=body, timeout=240)
            answers.append(answer.status_code)

    def go_on():
        process.stdin.write("\n")
        process.stdin.flush()

    def answered(count):
        for client in clients:
            if client.done():
                client.result()  # what went wrong in it
        return len(answers) >= count

    try:
        assert process.stdout.readline() == "up\n"
        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(draw) for _ in range(4)]
            try:
                until(lambda: answered(4))
                go_on()
                assert process.stdout.readline() == "up\n"
                count = len(answers)
                until(lambda: answered(count + 5))  # at least one of them was sent after the update
            finally:
                updated.set()
        for client in clients:
            client.result()
        go_on()
        assert process.wait(240) == 0
    finally:
        process.kill()
        process.wait()
    assert set(answers) == {200}


def test_the_benchmark_measures_all_four_servers(tmp_path):
    small = {"requests": 4, "rounds": 1, "steps": 1, "adapters": 2, "resident": 1, "batch": 2, "rate": 0.5}
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    script = ROOT / "benchmarks" / "serving.py"
    done = subprocess.run(
        [sys.executable, str(script), *words, "--output_dir", str(tmp_path)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "serving_miniature.json").read_text())
    names = ["engine", "one by one", "per adapter", "mixed"]
    measured = results["2"]
    assert list(measured["pictures per second"]) == list(measured["p50 and p95 in seconds"]) == names
    assert all(rate > 0 for rates in measured["pictures per second"].values() for rate in rates)
    assert all(0 < p50 <= p95 for p50, p95 in measured["p50 and p95 in seconds"].values())
    assert results["overhead"]["passes / bare passes"] > 0
