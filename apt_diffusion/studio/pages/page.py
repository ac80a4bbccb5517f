"""The page's JavaScript: behaviour that Gradio's components lack."""

import hashlib
from pathlib import Path

SCRIPT = Path(__file__).with_name("page.js")


def head() -> str:
    """Markup for the head of the page. The server marks the script as its own."""
    icon = "data:image/svg+xml," + (
        "%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Crect width='16' height='16' rx='3' "
        "fill='%230f766e'/%3E%3Ccircle cx='8' cy='8' r='4' fill='white'/%3E%3C/svg%3E"
    )
    version = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()[:12]
    return f'<link rel="icon" href="{icon}">\n<script src="/studio/page.js?{version}" defer></script>'
