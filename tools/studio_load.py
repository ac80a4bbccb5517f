#!/usr/bin/env python
"""Many visitors at once in a running studio: waits, errors, foreign pictures, memory and disk.

    python tools/studio_load.py --clients 24 --seconds 120

Starts a studio with the embedded model, lets each client draw one picture after another through the page's own
protocol, and writes a table. Every picture is compared with the one that this client's seed gives alone.
"""

import argparse
import hashlib
import http.cookiejar
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a large sks toy on a pink background"


@dataclass
class Client:
    """One visitor with a cookie of its own."""

    address: str
    number: int
    waits: list[float] = field(default_factory=list)
    pictures: dict[int, str] = field(default_factory=dict)  # seed -> hash of its pixels' file
    sources: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        self.opener = urllib.request.build_opener(cookies)
        self.session = f"client{self.number}x{random.randrange(10**9)}"

    def open_page(self) -> dict:
        """Gets the cookie; returns Gradio's configuration."""
        self.read("/", {"accept": "text/html"})
        return json.loads(self.read("/config"))

    def read(self, path: str, headers: dict[str, str] | None = None) -> bytes:
        """The body of an answer."""
        request = urllib.request.Request(self.address + path, headers=headers or {})
        with self.opener.open(request, timeout=600) as response:
            return response.read()

    def draw(self, function: dict, inputs: list) -> str:
        """Draws through the page's protocol; returns what the page would show of it."""
        body = json.dumps({"data": inputs, "fn_index": function["id"], "session_hash": self.session}).encode()
        request = urllib.request.Request(
            f"{self.address}/gradio_api/queue/join", body, {"content-type": "application/json"}
        )
        self.opener.open(request, timeout=600).read()
        shown = []
        stream = self.opener.open(f"{self.address}/gradio_api/queue/data?session_hash={self.session}", timeout=600)
        with stream:
            for line in stream:
                shown.append(line.decode())
                if "process_completed" in shown[-1]:
                    break
        return "".join(shown)


def values(config: dict, function: dict, seed: int) -> list:
    """What the page sends when it is opened, with this seed and one picture."""
    names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
    start = {part["id"]: part["props"].get("value") for part in config["components"]}
    given = {"prompt": PROMPT, "seed": seed, "new-seed": False, "count": 1, "adapters": ["example/teddy-bear"]}
    return [given.get(names[i], start[i]) for i in function["inputs"]]


def run(client: Client, config: dict, until: float) -> None:
    """Draws until the time is over."""
    names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
    drawing = next(
        d for d in config["dependencies"]
        if d["backend_fn"] and ["draw", "click"] in [[names.get(i), event] for i, event in d["targets"]]
    )  # fmt: skip
    seed = client.number * 1000
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            shown = client.draw(drawing, values(config, drawing, seed))
            if "Done. Seed" not in shown:
                client.errors.append(shown[-300:])
            else:
                source = shown.split("/studio/pictures/")[1].split(".png")[0]
                client.sources.append(f"/studio/pictures/{source}.png")
                client.pictures[seed] = hashlib.sha256(client.read(client.sources[-1])).hexdigest()
        except OSError as error:
            client.errors.append(repr(error))
        client.waits.append(time.monotonic() - began)
        seed += 1


def foreign(clients: list[Client]) -> int:
    """How many pictures of others a client can open, and how many of its own are another's."""
    count = 0
    for one, other in zip(clients, [*clients[1:], clients[0]], strict=True):
        for source in other.sources[-2:]:
            try:
                one.read(source)
                count += 1
            except urllib.error.HTTPError:
                pass
    hashes = [found for client in clients for found in client.pictures.values()]
    return count + len(hashes) - len(set(hashes))


def measure(process: psutil.Process, folder: Path) -> tuple[float, float]:
    """Memory of the server and bytes on disk, in MB."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return process.memory_info().rss / 2**20, size / 2**20


def main() -> None:
    """Runs the clients and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--port", type=int, default=7869)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "app.py"), "--port", str(args.port), "--adapters", f"{folder}/adapters"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
        try:
            while "is open at" not in str(server.stdout.readline()):
                if server.poll() is not None:
                    sys.exit("The studio did not start.")
            address = f"http://127.0.0.1:{args.port}"
            clients = [Client(address, number) for number in range(args.clients)]
            config = [client.open_page() for client in clients][-1]
            process = psutil.Process(server.pid)
            until = time.monotonic() + args.seconds
            threads = [threading.Thread(target=run, args=(client, config, until)) for client in clients]
            for thread in threads:
                thread.start()
            marks = []
            while any(thread.is_alive() for thread in threads):
                time.sleep(args.seconds / 8)
                marks.append((time.monotonic() - until + args.seconds, *measure(process, Path(folder))))
            strange = foreign(clients)
        finally:
            server.terminate()
            server.wait()
    report(clients, marks, strange)


def report(clients: list[Client], marks: list[tuple[float, float, float]], strange: int) -> None:
    """Prints what was measured."""
    counts = [len(client.pictures) for client in clients]
    means = [statistics.mean(client.waits) for client in clients]
    print(f"pictures {sum(counts)}, by client {min(counts)} to {max(counts)}")
    print(f"errors {sum(len(client.errors) for client in clients)}, foreign pictures {strange}")
    print(f"mean wait {statistics.mean(means):.1f} s, by client {min(means):.1f} to {max(means):.1f} s")
    for seconds, memory, disk in marks:
        print(f"after {seconds:.0f} s: memory {memory:.0f} MB, disk {disk:.2f} MB")
    for error in [error for client in clients for error in client.errors][:5]:
        print(error)


if __name__ == "__main__":
    main()
