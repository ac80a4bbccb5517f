"""Renders pictures with captions as HTML: one figure per picture, with its action buttons."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from PIL import Image

from .charts import escape
from .drawings import Drawing


@dataclass(frozen=True)
class Figure:
    """One picture.

    Args:
        source: its address, of this server or `data:`.
        says: what it shows, for those who do not see it.
        caption: below it.
        download: address under which it is saved, if it can be.
        actions: buttons below it, `(action, id, label)`.
        pick: `(action, id)` where the picture itself is a button.
    """

    source: str
    says: str
    caption: str = ""
    download: str = ""
    actions: Sequence[tuple[str, str, str]] = field(default=())
    pick: tuple[str, str] | None = None


def figures(items: Sequence[Figure], title: str = "", empty: str = "", columns: int = 2) -> str:
    """A group of figures under a title; a line where there is none yet."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    body = "".join(map(_figure, items)) or (f'<p class="apt-empty">{escape(empty)}</p>' if empty else "")
    return f'<section class="apt-figures" style="--columns:{columns}">{head}<div>{body}</div></section>'


def table(title: str, top: Sequence[str], side: Sequence[str], cells: Sequence[Figure | None]) -> str:
    """Figures in rows and columns that have headings; those not drawn yet are empty."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in top)
    rows = []
    for number, name in enumerate(side):
        row = cells[number * len(top) : (number + 1) * len(top)]
        drawn = "".join(f"<td>{_figure(cell) if cell else ''}</td>" for cell in row)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{drawn}</tr>')
    return (
        f'<section class="apt-figures apt-table" tabindex="0" aria-label="{escape(title)}"><h3>{escape(title)}</h3>'
        f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></section>"
    )


def of_drawing(drawing: Drawing, says: str, caption: str, actions: Sequence[tuple[str, str, str]] = ()) -> Figure:
    """A picture that is kept for its visitor."""
    address = f"/studio/pictures/{drawing.id}.png"
    return Figure(address, says, caption, f"{address}?save", actions)


def of_image(image: Image.Image, says: str, caption: str = "", lossless: bool = False) -> Figure:
    """A picture that is only shown: nothing of it is kept on the server."""
    return Figure(data_address(image, lossless), says, caption)


def data_address(image: Image.Image, lossless: bool = False) -> str:
    """The picture itself as an address."""
    stream = io.BytesIO()
    if lossless:
        image.save(stream, "PNG")
    else:
        image.save(stream, "WEBP", quality=80)
    kind = "png" if lossless else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def adapter_address(key: str) -> str:
    """Where an adapter is downloaded."""
    return f"/studio/adapters/{quote(key, safe='/')}"


def _figure(figure: Figure) -> str:
    picture = f'<img src="{escape(figure.source)}" alt="{escape(figure.says)}" loading="lazy">'
    if figure.download:
        picture = f'<a href="{escape(figure.source)}" target="_blank" title="Open it in full size">{picture}</a>'
    if figure.pick:
        action, name = map(escape, figure.pick)
        picture = f'<button type="button" class="apt-pick" data-action="{action}" data-id="{name}">{picture}</button>'
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    tools = "".join(
        f'<button type="button" data-action="{escape(action)}" data-id="{escape(name)}" '
        f'aria-label="{escape(label)}: {escape(figure.says)}">{escape(label)}</button>'
        for action, name, label in figure.actions
    )
    if figure.download:
        tools = (
            f'<a href="{escape(figure.download)}" download aria-label="Download: {escape(figure.says)}">Download</a>'
            f"{tools}"
        )
    tools = f'<div class="apt-tools">{tools}</div>' if tools else ""
    return f"<figure>{picture}{caption}{tools}</figure>"
