"""The part of the page Generate for image to image and inpainting: a start picture with an optional brush mask."""

import base64
import binascii
import io
from typing import Any

import gradio as gr
from PIL import Image, ImageOps

from ..charts import escape
from ..figures import data_address
from ..order import real, text
from ..studio import Studio
from ..uploads import check_header, open_picture
from .components import Picture, Slider, help_line, html
from .downloads import copy_of
from .events import PICTURES_QUEUE, clicked, told

BRUSH_SIDE = 384  # pixels of the long side of what is painted on
MASK_PREFIX = "data:image/png;base64,"
NO_PICTURE = '<p class="apt-empty">Choose a picture above; then paint here what shall be drawn anew.</p>'


class StartPicture:
    """Builds its controls where it is made."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Accordion("Start from a picture", open=False, elem_id="start"):
            self.picture = Picture(
                label="Picture", type="filepath", sources=["upload", "clipboard"], height=200,
                elem_id="start-picture", elem_classes="apt-small",
            )  # fmt: skip
            help_line("Drop it, choose a file, or paste it. It is cut to the size of the pictures.")
            self.change = Slider(
                0.05, 1, 0.6, step=0.05, label="Change", elem_id="change",
                info="How much of it is drawn anew: little keeps the picture, 1 only its rough colours.",
            )  # fmt: skip
            self.brush = html(NO_PICTURE, elem_id="brush")
            help_line("Paint over a part, and only that part is drawn anew. Without paint, all of it.")
            self.mask = gr.Textbox(visible="hidden", elem_id="mask", label="What is painted")

    @property
    def inputs(self) -> list:
        """What `settings` reads."""
        return [self.picture, self.change, self.mask]

    @property
    def filled(self) -> list:
        """What `take` changes."""
        return [self.picture]

    def connect(self, status: gr.HTML) -> None:
        """A chosen picture appears below the brush."""
        self.picture.change(
            told(status)(self._on_picture), self.picture, [self.brush, self.mask, status], **PICTURES_QUEUE
        )

    def take(self, event: gr.EventData, visitor: str) -> dict:
        """A picture of the visitor's becomes the one to start from."""
        _, name = clicked(event)
        drawing = self.studio.drawings.get(visitor, name)
        return {self.picture: copy_of(drawing.file, drawing.download_name)}

    def settings(self, values: dict) -> dict[str, Any]:
        """What an order needs of these controls; nothing where no picture is chosen."""
        path = values[self.picture]
        if not path:
            return {}
        start: dict[str, Any] = {"picture": open_picture(path), "change": real(values[self.change], "change")}
        mask = mask_of(text(values[self.mask], "mask"))
        return start | ({"mask": mask} if mask is not None else {})

    def _on_picture(self, path: str | None) -> dict:
        if not path:
            return {self.brush: NO_PICTURE, self.mask: ""}
        picture = open_picture(path)
        picture = ImageOps.contain(picture, (BRUSH_SIDE, BRUSH_SIDE), Image.Resampling.BILINEAR)
        width, height = picture.size
        canvas = (
            f'<div class="apt-brush"><img src="{escape(data_address(picture))}" alt="The picture to start from">'
            f'<canvas width="{width}" height="{height}" aria-label="Paint what shall be drawn anew"></canvas></div>'
            '<div class="apt-tools"><label>Brush <input type="range" min="4" max="80" value="28" '
            'aria-label="Size of the brush"></label><button type="button" data-clear>Clear</button></div>'
        )
        return {self.brush: canvas, self.mask: ""}


def mask_of(address: str) -> Image.Image | None:
    """The mask that the brush has sent, `None` where nothing is painted.

    Raises:
        ValueError: for anything but a small PNG.
    """
    if not address:
        return None
    try:
        content = base64.b64decode(address.removeprefix(MASK_PREFIX), validate=True)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            check_header("The mask", *image.size, most=4 * BRUSH_SIDE**2)
            mask = image.convert("L")
    except (binascii.Error, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError("The mask cannot be read: clear it, and paint it again.") from error
    return mask if mask.getbbox() else None
