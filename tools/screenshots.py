#!/usr/bin/env python
"""Takes the pictures of docs/studio.md from the running studio: `python tools/screenshots.py` (some minutes).

Needs Chromium and Playwright (`pip install -e ".[test]"`).
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE = 600_000  # milliseconds
WIDE, NARROW = {"width": 1366, "height": 768}, {"width": 390, "height": 800}
TOKEN = "only for these pictures"


def wait_for(page: Page, where: str, pattern: str) -> None:
    page.wait_for_function(
        "([where, pattern]) => new RegExp(pattern).test(document.querySelector(where)?.innerText)",
        arg=[where, pattern],
        timeout=PATIENCE,
    )
    page.wait_for_timeout(800)


def save(page: Page, folder: Path, name: str) -> None:
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    page.screenshot(path=folder / f"studio-{name}.png", full_page=True)
    print(folder / f"studio-{name}.png", flush=True)


def generate(page: Page) -> None:
    page.wait_for_function("document.body.dataset.filled")
    page.uncheck("#new-seed input")
    page.fill("#seed input", "3")
    page.keyboard.press("Tab")
    page.click("#draw")
    wait_for(page, "#status", "Done")
    page.click("#sweep")
    page.wait_for_function("document.querySelectorAll('#grid img').length == 7", timeout=PATIENCE)
    wait_for(page, "#status", "Done")


def train(page: Page, steps: int) -> None:
    page.get_by_role("tab", name="Train").click()
    page.locator("button[id^=example-]").last.click()
    wait_for(page, "#train-status", "5 pictures")
    page.fill("#class-prompt :is(input, textarea)", "")  # its pictures would take some minutes
    page.fill("#train-steps input[type=number]", str(steps))
    page.keyboard.press("Tab")
    page.click("#train")
    wait_for(page, "#train-status", "Finished|failed")


def understand(page: Page) -> None:
    page.get_by_role("tab", name="Understand").click()
    look(page, "Classify", "class", example=2, button="#classify", done="Compared")


def ask(page: Page) -> None:
    look(page, "Ask", "ask", example=3, button="#ask", done="The answer")


def look(page: Page, tab: str, part: str, example: int, button: str, done: str) -> None:
    page.get_by_role("tab", name=tab).click()
    page.locator(f"#{part}-examples button:has(img)").nth(example).click()
    page.wait_for_selector(f"#{part}-picture img")
    page.wait_for_timeout(800)
    page.click(button)
    wait_for(page, f"#{part}-status", done)


def watch(page: Page) -> None:
    page.get_by_role("tab", name="Watch it draw").click()
    page.click("#watch")
    wait_for(page, "#watch-status", "Done")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--steps", type=int, default=400, help="of the training that is shown")
    parser.add_argument("--model", default="miniature-emoji")
    parser.add_argument("--also", action="store_true", help="dark and narrow ones, too, to look at")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as adapters, sync_playwright() as playwright:
        command = [sys.executable, ROOT / "app.py", "--port", str(port), "--adapters", adapters, "--model", args.model]
        server = subprocess.Popen([*command, "--admin-token", TOKEN])
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(address, timeout=5)
                    break
                except OSError:
                    time.sleep(0.5)
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            page = browser.new_page(viewport=WIDE)
            page.set_default_timeout(PATIENCE)
            page.goto(address)
            page.wait_for_selector("#draw")
            page.wait_for_timeout(2000)
            generate(page)
            save(page, args.output_dir, "generate")
            understand(page)
            save(page, args.output_dir, "understand")
            if page.input_value("#answerer input"):
                ask(page)
                save(page, args.output_dir, "ask")
            watch(page)
            save(page, args.output_dir, "watch")
            page.get_by_role("tab", name="Cost").click()
            wait_for(page, "#cost-summary", "less than")
            save(page, args.output_dir, "cost")
            train(page, args.steps)
            save(page, args.output_dir, "train")
            page.get_by_role("tab", name="Adapters").click()
            page.wait_for_selector("#adapter-cards article")
            page.wait_for_timeout(1000)
            save(page, args.output_dir, "adapters")
            owner = browser.new_page(viewport=WIDE)
            owner.goto(f"{address}/studio/admin")
            owner.fill("input[name=token]", TOKEN)
            owner.click("button")
            owner.wait_for_selector("table")
            save(owner, args.output_dir, "admin")
            if args.also:
                for look, settings in {"dark": {"color_scheme": "dark"}, "narrow": {"viewport": NARROW}}.items():
                    state = page.context.storage_state()
                    other = browser.new_context(**({"viewport": WIDE} | settings), storage_state=state).new_page()
                    other.set_default_timeout(PATIENCE)
                    other.goto(address)
                    other.wait_for_selector("#draw")
                    other.wait_for_timeout(2000)
                    for name in ("Generate", "Train", "Adapters", "Pictures", "Understand", "Cost"):
                        other.get_by_role("tab", name=name).click()
                        other.wait_for_timeout(1500)
                        save(other, args.output_dir, f"{name.lower()}-{look}")
            browser.close()
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
