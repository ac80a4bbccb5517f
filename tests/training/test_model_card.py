"""Model cards: what visitors and pictures' owners have written stays text, wherever the card is rendered."""

import re

import pytest
from huggingface_hub import ModelCard

from apt_diffusion.training.model_card import code, plain, write_model_card

HOSTILE = [
    "a `sks` dog",
    "``` \n</code><img src=http://evil.example/x.png>\n# Pay here\n[click](http://evil.example)",
    "` ![x](http://evil.example/y.png) <script>alert(1)</script> | a | b |\n\n## Heading",
    "![x](http://evil.example/z.png)",
    "`",
    "<b>bold</b> & http://evil.example www.evil.example",
]


def rendered(markdown: str) -> str:
    """As the hub would: CommonMark with tables, HTML allowed."""
    markdown_it = pytest.importorskip("markdown_it")
    body = re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.DOTALL)
    return markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(body)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_prompt_is_code_in_the_card_and_nothing_else(tmp_path, text):
    card = write_model_card(
        tmp_path, title=text, base_model="miniature", summary="A summary.", usage=f"pipe({text!r})", tags=["x"],
        settings={"instance_prompt": text, "steps": 3}, command=f"train --instance_prompt {text!r}\n{text}",
        triggers=[text], samples={tmp_path / "a.png": text}, license="mit", metrics={text: 0.5},
    ).read_text(encoding="utf-8")  # fmt: skip
    # What the hub puts in its place, and the one picture that is ours.
    html = rendered(card).replace("<Gallery />", "").replace('<img src="a.png" alt="samples" />', "")
    assert ModelCard(card).data.widget == [{"text": text, "output": {"url": "a.png"}}]
    assert not re.search(r"<(img|script|b|a)\b", html), html
    assert re.findall(r"<h[1-6]>", html) == ["<h1>", "<h2>", "<h2>", "<h2>"]
    assert html.count("<table>") == 2


@pytest.mark.parametrize("text", HOSTILE)
def test_code_and_plain_text_say_what_they_were_given(text):
    unescaped = rendered(code(text)).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    said = re.fullmatch(r"<p><code>(.*)</code></p>\n", unescaped.replace("&quot;", '"'), re.DOTALL)[1]
    assert said.strip() == " ".join(text.split())
    shown = rendered(plain(text)).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert shown == f"<p>{' '.join(text.split())}</p>\n"
