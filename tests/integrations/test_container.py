"""The Dockerfile: it is not built here, but read, and the commands in it are those of the package."""

import json
import os
import re
import shlex
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from apt_diffusion.cli import COMMANDS
from apt_diffusion.server.command import build_parser, settings_of
from apt_diffusion.studio.command import parse_args

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """`(instruction, its words)`, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def of(steps: list[tuple[str, str]], name: str) -> list[str]:
    return [words for instruction, words in steps if instruction == name]


def test_the_image_is_pinned_small_and_not_roots(steps):
    bases = [words.split()[0] for words in of(steps, "FROM")]
    assert bases == ["python:3.12-slim-bookworm"] * 2  # what builds does not ship
    last = max(index for index, (name, _) in enumerate(steps) if name == "FROM")
    (user,) = of(steps[last:], "USER")
    assert user not in ("root", "0") and f"useradd --create-home --uid 1000 {user}" in " ".join(of(steps, "RUN"))
    assert all("--no-cache-dir" in words for words in of(steps, "RUN") if words.startswith("pip"))
    names = [name for name, _ in steps[last:]]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")
    assert {"HEALTHCHECK", "VOLUME", "EXPOSE", "ENTRYPOINT", "CMD"} <= set(names)


def test_what_is_copied_is_there_and_sent_to_the_builder(steps):
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for words in of(steps, "COPY"):
        if words.startswith("--from"):
            continue
        for source in words.split()[:-1]:
            assert (ROOT / source).exists() and source in sent, source


def test_its_command_and_that_of_the_docs_are_the_packages(steps):
    (entry,) = of(steps, "ENTRYPOINT")
    command, *flags = json.loads(of(steps, "CMD")[0])
    assert json.loads(entry) == ["apt-diffusion"] and command in COMMANDS
    args = parse_args(flags)
    assert (args.listen, args.port, str(args.adapters)) == ("0.0.0.0", 7860, "/data/adapters")
    text = re.sub(r"\\\n\s*", "", (ROOT / "docs" / "server.md").read_text())
    (line,) = re.findall(r"^docker run .* apt-diffusion (serve .*)$", text, re.MULTILINE)
    command, *flags = shlex.split(line)
    settings = settings_of(build_parser(None).parse_args(flags))
    assert command in COMMANDS and settings.keys == "/data/keys.json"


def test_the_health_check_tells_a_server_from_none(steps):
    words = json.loads(of(steps, "HEALTHCHECK")[0].partition("CMD ")[2])

    class Fine(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/healthz" else 503)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Fine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        for path, status in (("/healthz", 0), ("/", 1)):
            environment = os.environ | {"APT_HEALTH": address + path}
            assert subprocess.run(words, env=environment, capture_output=True).returncode == status
    finally:
        server.shutdown()
        server.server_close()
    assert subprocess.run(words, env=os.environ | {"APT_HEALTH": address}, capture_output=True).returncode == 1
