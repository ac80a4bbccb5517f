#!/usr/bin/env python
"""A rough day for a server: many clients, a dying engine, damaged adapters, and clients who misbehave.

    python tools/serve_load.py --seconds 300 --clients 64

Starts `apt-diffusion serve --replicas 2` with the embedded model of emoji. Most clients draw and compare what they
get with what the pipeline draws alone for the same seed and adapter; some cancel, read slowly, send too much, ask for
a damaged adapter, or replace one. Every `--kill` seconds an engine is killed. Prints what happened, and memory over
time; ends with 1 if a picture was lost, wrong or somebody else's.
"""

import argparse
import base64
import collections
import contextlib
import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
from PIL import Image

from apt_diffusion import StableDiffusionAPTPipeline

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "apt_diffusion" / "studio" / "examples"
ADAPTERS = ("robot", "castle", "teddy-bear")
PROMPT = "a robot on a plain sand background"
STEPS = 4
TOLERANCE = 2  # of 255: larger batches round otherwise
Case = tuple[str, int]  # adapter, or "base", and seed


def references(seeds: int) -> dict[Case, np.ndarray]:
    """What the pipeline draws alone."""
    pipe = StableDiffusionAPTPipeline.from_pretrained("miniature-emoji")
    pipe.set_progress_bar_config(disable=True)
    for name in ADAPTERS:
        pipe.load_apt_weights(EXAMPLES / name, name)
    pictures = {}
    for name in ("base", *ADAPTERS):
        for seed in range(seeds):
            scale = 0.0 if name == "base" else {name: 1.0}
            generator = torch.Generator().manual_seed(seed)
            drawn = pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=3.0, apt_scale=scale, generator=generator)
            pictures[name, seed] = np.asarray(drawn.images[0], dtype=int)
    return pictures


class Clients:
    """The clients, and what happened to them."""

    def __init__(self, address: str, pictures: dict[Case, np.ndarray], folder: Path, until: float) -> None:
        self.address, self.pictures, self.folder, self.until = address, pictures, folder, until
        self.counts: collections.Counter[str] = collections.Counter()
        self.bad: list[str] = []
        self.seconds: list[float] = []

    def run(self, number: int) -> None:
        chance = random.Random(number)
        deeds = [self.draw] * 12 + [
            self.leave,
            self.read_slowly,
            self.send_too_much,
            self.ask_for_damaged,
            self.replace,
        ]
        while time.monotonic() < self.until:
            deed = chance.choice(deeds)
            try:
                deed(chance)
            except Exception as error:
                self.bad.append(f"{deed.__name__}: {type(error).__name__}: {error}")
                self.counts["errors of transport"] += 1

    def post(self, body: dict, timeout: float = 300) -> httpx.Response:
        return httpx.post(f"{self.address}/v1/images/generations", json=body, timeout=timeout)

    def draw(self, chance: random.Random) -> None:
        case = chance.choice(list(self.pictures))
        body = {"prompt": PROMPT, "model": case[0], "seed": case[1], "num_inference_steps": STEPS}
        begun = time.monotonic()
        while (answer := self.post(body)).status_code == 503:  # as it asks for
            self.counts["told to come back"] += 1
            time.sleep(min(5.0, float(answer.headers.get("retry-after", 1))))
        self.seconds.append(time.monotonic() - begun)
        if answer.status_code != 200:
            self.counts["lost"] += 1
            self.bad.append(f"{case}: {answer.status_code} {answer.text[:200]}")
            return
        file = io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))
        picture = np.asarray(Image.open(file), dtype=int)
        if np.abs(picture - self.pictures[case]).max() <= TOLERANCE:
            self.counts["right"] += 1
            return
        owner = [other for other, one in self.pictures.items() if np.abs(picture - one).max() <= TOLERANCE]
        self.counts["foreign" if owner else "wrong"] += 1
        self.bad.append(f"{case}: got the picture of {owner or 'nobody'}")

    def leave(self, chance: random.Random) -> None:
        with contextlib.suppress(httpx.TimeoutException):
            self.post({"prompt": PROMPT, "model": chance.choice(ADAPTERS)}, timeout=chance.uniform(0.05, 0.5))
        self.counts["left"] += 1

    def read_slowly(self, chance: random.Random) -> None:
        body = {"prompt": PROMPT, "stream": True, "partial_images": 3, "num_inference_steps": STEPS}
        with httpx.stream("POST", f"{self.address}/v1/images/generations", json=body, timeout=300) as answer:
            for _ in answer.iter_bytes(64):
                time.sleep(0.001)
        self.counts["read slowly"] += 1

    def send_too_much(self, chance: random.Random) -> None:
        with contextlib.suppress(httpx.TransportError):  # the server closes while the body is on its way
            answer = httpx.post(f"{self.address}/v1/images/generations", content=b"x" * 2**21, timeout=60)
            if answer.status_code != 413:
                self.bad.append(f"two MiB of nonsense: {answer.status_code}")
        self.counts["sent too much"] += 1

    def ask_for_damaged(self, chance: random.Random) -> None:
        answer = self.post({"prompt": PROMPT, "model": "torn"})
        if answer.status_code not in (400, 503):
            self.bad.append(f"a damaged adapter: {answer.status_code} {answer.text[:200]}")
        self.counts["asked for a damaged adapter"] += 1

    def replace(self, chance: random.Random) -> None:
        data = (EXAMPLES / chance.choice(ADAPTERS) / "pytorch_apt_weights.safetensors").read_bytes()
        answer = httpx.put(f"{self.address}/v1/adapters/changing", content=data, timeout=120)
        if answer.status_code not in (200, 201, 503):
            self.bad.append(f"an upload: {answer.status_code} {answer.text[:200]}")
        self.post({"prompt": PROMPT, "model": "changing", "num_inference_steps": STEPS})
        self.counts["replaced an adapter"] += 1


def engines() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ray::ServeReplica:apt-diffusion:Engine" in " ".join(process.info["cmdline"] or ()):
            found.append(process)
    return found


def start(folder: Path) -> tuple[subprocess.Popen, str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["serve", "--adapters", folder, "--replicas", 2, "--port", port, "--max_queue", 64]
    process = subprocess.Popen(
        [sys.executable, "-m", "apt_diffusion", *map(str, words)], cwd=ROOT, stderr=(folder.parent / "log").open("w"),
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{address}/readyz", timeout=2).status_code == 200:
                return process, address
        if process.poll() is not None:
            sys.exit((folder.parent / "log").read_text()[-3000:])
        time.sleep(0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="default: %(default)s")
    parser.add_argument("--clients", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--kill", type=float, default=60, help="seconds between two kills (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=8, help="pictures of each adapter (default: %(default)s)")
    args = parser.parse_args()
    pictures = references(args.seeds)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "adapters"
        folder.mkdir()
        for name in (*ADAPTERS, "changing"):
            source = EXAMPLES / (name if name in ADAPTERS else ADAPTERS[0]) / "pytorch_apt_weights.safetensors"
            shutil.copy(source, folder / f"{name}.safetensors")
        (folder / "torn.safetensors").write_bytes((folder / "robot.safetensors").read_bytes()[:-1000])
        process, address = start(folder)
        begun = time.monotonic()
        clients = Clients(address, pictures, folder, begun + args.seconds)
        threads = [threading.Thread(target=clients.run, args=(number,)) for number in range(args.clients)]
        for thread in threads:
            thread.start()
        next_kill = begun + args.kill
        while time.monotonic() < clients.until:
            time.sleep(min(10.0, args.seconds / 10))
            running = engines()
            memory = [round(one.memory_info().rss / 2**20) for one in running]
            told = dict(sorted(clients.counts.items()))
            print(f"{time.monotonic() - begun:5.0f} s: engines {memory} MiB, {told}", flush=True)
            if time.monotonic() > next_kill and len(running) == 2:
                running[0].kill()
                next_kill = time.monotonic() + args.kill
                print("        an engine was killed", flush=True)
        for thread in threads:
            thread.join()
        process.send_signal(signal.SIGTERM)
        status = process.wait(180)
    drawn = clients.counts["right"]
    spread = np.percentile(clients.seconds, (50, 95)) if clients.seconds else (0.0, 0.0)
    print(f"\n{drawn} right pictures, p50 {spread[0]:.1f} s, p95 {spread[1]:.1f} s; the server ended with {status}")
    for line in clients.bad[:20]:
        print("  bad:", line)
    return int(bool(clients.bad) or status != 0 or not drawn)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
