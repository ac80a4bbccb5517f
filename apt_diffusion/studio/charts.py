"""Bars and curves as HTML and SVG: they follow the page's width and its light or dark colours."""

from collections.abc import Sequence
from html import escape as escape_html

# Gradio's templates read these, too.
_TEMPLATE_SIGNS = {"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;", "\\": "&#92;"}


def escape(text: str) -> str:
    """A text that stays one, in HTML, in its attributes, and in the templates of the pages."""
    return "".join(_TEMPLATE_SIGNS.get(character, character) for character in escape_html(text))


def bars(title: str, rows: Sequence[tuple[str, float, str]], highlight: str = "", most: float | None = None) -> str:
    """Horizontal bars `(label, value ≥ 0, what it says)`; the whole width is `most`, or else the largest value."""
    largest = most or max((value for _, value, _ in rows), default=0) or 1
    lines = []
    for label, value, text in rows:
        marked = " apt-marked" if label == highlight else ""
        lines.append(
            f'<div class="apt-bar{marked}"><span class="apt-bar-label">{escape(label)}</span>'
            f'<span class="apt-bar-track"><span class="apt-bar-fill" style="width:{100 * value / largest:.2f}%">'
            f'</span></span><span class="apt-bar-value">{escape(text)}</span></div>'
        )
    return f'<figure class="apt-bars"><figcaption>{escape(title)}</figcaption>{"".join(lines)}</figure>'


def curve(title: str, points: Sequence[tuple[int, float]], last: int) -> str:
    """The losses of a training as they come: every step faint, and their running mean.

    Args:
        title: above it.
        points: `(step, loss)`.
        last: the step at the right edge.
    """
    width, height, left, bottom = 640, 240, 44, 26
    if not points:
        return (
            f'<figure class="apt-curve"><figcaption>{escape(title)}</figcaption><p>No step is done yet.</p></figure>'
        )
    ordered = sorted(loss for _, loss in points)
    top = max(ordered[int(0.99 * (len(ordered) - 1))] * 1.1, 1e-9)  # one outlier does not flatten the rest

    def place(step: float, loss: float) -> str:
        x = left + (width - left - 8) * step / max(last, 1)
        y = (height - bottom) - (height - bottom - 10) * min(loss / top, 1)
        return f"{x:.1f},{y:.1f}"

    shown = points[:: max(1, len(points) // 500)]
    window = max(1, len(points) // 20)
    means = []
    for index in range(0, len(points), max(1, len(points) // 200)):
        recent = [loss for _, loss in points[max(0, index - window + 1) : index + 1]]
        means.append((points[index][0], sum(recent) / len(recent)))
    grid = "".join(
        f'<line x1="{left}" x2="{width - 8}" y1="{y}" y2="{y}"/><text x="{left - 6}" y="{y + 4}">{value:.2g}</text>'
        for value, y in ((top * part, (height - bottom) - (height - bottom - 10) * part) for part in (0, 0.5, 1))
    )
    label = escape(f"{title}: {points[-1][1]:.4f} at step {points[-1][0]} of {last}")
    return (
        f'<figure class="apt-curve"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f'<g class="apt-grid">{grid}</g>'
        f'<polyline class="apt-faint" points="{" ".join(place(*point) for point in shown)}"/>'
        f'<polyline class="apt-mean" points="{" ".join(place(*point) for point in means)}"/>'
        f'<text class="apt-axis" x="{left}" y="{height - 6}">0</text>'
        f'<text class="apt-axis apt-end" x="{width - 8}" y="{height - 6}">step {last}</text></svg></figure>'
    )


def progress(text: str, share: float | None = None) -> str:
    """A status line that screen readers announce, with a bar where the share of the work done is known."""
    bar = "" if share is None else f'<progress max="1" value="{min(max(share, 0), 1):.3f}"></progress>'
    return f'<div class="apt-status" role="status" aria-live="polite"><span>{escape(text)}</span>{bar}</div>'


def problem(text: str) -> str:
    """What went wrong, as a sentence in the page."""
    return f'<div class="apt-status apt-problem" role="alert">{escape(text)}</div>'
