"""Model cards as HTML, text only: a stranger's card loads nothing, links nowhere, and cannot imitate page headings."""

import functools
from typing import Any


@functools.cache
def _renderer() -> Any:
    from markdown_it import MarkdownIt

    # Pictures, links and HTML stay the text that they are.
    plain = MarkdownIt("commonmark", {"html": False}).enable("table")
    return plain.disable(["image", "link", "autolink", "reference", "entity"])


def card_html(markdown: str) -> str:
    """A card's Markdown as HTML without links, pictures or markup of its own."""
    html = _renderer().render(markdown)
    return f'<div class="apt-card">{html}</div>'
