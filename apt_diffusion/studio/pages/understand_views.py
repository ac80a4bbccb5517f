"""What the page Understand shows, as HTML: scores as bars, maps with a legend, and a slider over the steps."""

import functools

import numpy as np
from PIL import Image

from ..charts import bars, escape
from ..figures import data_address
from ..gates import colors

ASK_HELP = (
    '<details class="apt-note"><summary>What do the scores say?</summary><p>Each bar is the probability that the '
    "model gives to that answer, by itself: several answers may be good, so they need not add up to 100 %. The "
    "right side has the same head with APT switched off; where both sides differ, the adapter made the difference."
    "</p></details>"
)
CLASS_HELP = (
    '<details class="apt-note"><summary>What do the scores say?</summary><p>The model compares the picture with every '
    "label, and the bars say how it shares 100 % among them. A high bar means “more like this than like the other "
    "labels”, not “surely this”: with labels that all do not fit, one of them still wins.</p></details>"
)
MAP_HELP = (
    '<p class="apt-note">Bright where the prompts act most, dark where they act least: the gate <i>w</i> of each '
    "{unit}, the mean over all adapted attention modules, each divided by its own largest value first.</p>"
)


def scores_html(title: str, scores: dict[str, float]) -> str:
    """Probabilities as bars from 0 to 100 %, in the order that they have."""
    best = max(scores, key=scores.__getitem__, default="")
    return bars(title, [(label, value, f"{value:.0%}") for label, value in scores.items()], best, most=1.0)


def map_html(shown: Image.Image) -> str:
    """Where an adapter acts on a picture."""
    picture = f'<img src="{escape(data_address(shown))}" alt="The picture under the map of where the adapter acts">'
    return f'<figure class="apt-map"><figcaption>Where the adapter acts</figcaption>{picture}{legend_html()}</figure>'


def steps_html(picture: Image.Image, overlays: list[Image.Image]) -> str:
    """A picture, and a slider over the maps: first their mean, then one for each step."""
    frames = "".join(
        f'<img src="{escape(data_address(image))}" alt="{_step(number)}"{" hidden" if number else ""}>'
        for number, image in enumerate(overlays)
    )
    plain = data_address(picture, lossless=max(picture.size) <= 128)
    return (
        f'<div class="apt-steps"><figure class="apt-map"><figcaption>The picture</figcaption>'
        f'<img src="{escape(plain)}" alt="The picture that was drawn"></figure>'
        f'<figure class="apt-map"><figcaption data-says>{_step(0)}</figcaption>{frames}{legend_html()}'
        f'<label>Step <input type="range" min="0" max="{len(overlays) - 1}" value="0" data-steps '
        f'aria-label="Step whose map is shown; 0 is the mean of all steps"></label></figure></div>'
    )


@functools.cache
def legend_html() -> str:
    """The colours of the maps, from little to much."""
    bar = Image.fromarray(colors(np.linspace(0, 1, 128)[None]))
    return (
        f'<span class="apt-legend"><span>least</span><img src="{data_address(bar, lossless=True)}" '
        'alt="Colours from dark, least, to bright, most"><span>most</span></span>'
    )


def _step(number: int) -> str:
    return f"step {number}" if number else "mean of all steps"
