"""What the first screen shows before anything is drawn."""

import functools
from pathlib import Path

from PIL import Image

from ..figures import figures, of_image

PICTURES = Path(__file__).parent / "welcome"
# What the embedded models have drawn with the examples of the package: file name, prompt, what was learnt.
DRAWN = {
    "miniature": ("miniature", "a sks glyph on a red background", "a mushroom"),
    "miniature-emoji": ("emoji", "a large sks toy on a pink background", "a teddy bear"),
}


@functools.cache
def welcome(model: str) -> str:
    """A finished pair of pictures, with an adapter and without; for other models than embedded ones that of emoji."""
    name, prompt, learnt = DRAWN.get(model, DRAWN["miniature-emoji"])
    items = []
    for part, caption in (
        ("adapted", f"With an adapter that has learnt {learnt}"),
        ("base", "The same noise without it"),
    ):
        with Image.open(PICTURES / f"{name}-{part}.png") as picture:
            items.append(of_image(picture, f"An example. {caption}.", caption, lossless=True))
    return figures(items, f"For example: “{prompt}”")
