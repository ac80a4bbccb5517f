"""Gradio's components as the pages use them: what they send is checked where it is used, in words for people."""

import contextlib
from collections.abc import Iterator
from typing import Any

import gradio as gr
from gradio import component_meta


@contextlib.contextmanager
def _no_stubs() -> Iterator[None]:
    """Gradio writes a `.pyi` file next to the module of every new component; not into this package."""
    writing = component_meta.create_or_modify_pyi
    component_meta.create_or_modify_pyi = lambda *args: None
    try:
        yield
    finally:
        component_meta.create_or_modify_pyi = writing


with _no_stubs():

    class Slider(gr.Slider):
        """A slider whose value may be anything: its limits are the browser's."""

        is_template = True

        def preprocess(self, payload: Any) -> Any:
            """The value as it was sent."""
            return payload

    class Number(gr.Number):
        """A number that may be anything: its limits are the browser's."""

        is_template = True

        def preprocess(self, payload: Any) -> Any:
            """The value as it was sent."""
            return payload

    class Dropdown(gr.Dropdown):
        """A list whose value may be anything: what it offers differs between visitors."""

        is_template = True

        def preprocess(self, payload: Any) -> Any:
            """The value as it was sent."""
            return payload

    class Textbox(gr.Textbox):
        """A text that may be anything."""

        is_template = True

        def preprocess(self, payload: Any) -> Any:
            """The value as it was sent."""
            return payload

    class Checkbox(gr.Checkbox):
        """A tick that may be anything."""

        is_template = True

        def preprocess(self, payload: Any) -> bool:
            """Whether it is ticked."""
            return payload is True

    class Picture(gr.Image):
        """An upload that nothing decodes before it was checked: Gradio would decode a decompression bomb."""

        is_template = True

        def preprocess(self, payload: Any) -> str | None:
            """The path of the upload."""
            return payload.path if payload else None

    class Files(gr.File):
        """Uploads as paths."""

        is_template = True

        def preprocess(self, payload: Any) -> list[str]:
            """The paths of the uploads."""
            if payload is None:
                return []
            return [file.path for file in getattr(payload, "root", [payload])]


def html(value: str = "", **settings: Any) -> gr.HTML:
    """Markup of our own, without the look that Gradio gives to text."""
    return gr.HTML(value, padding=False, apply_default_css=False, **settings)


def help_line(text: str, *classes: str) -> gr.HTML:
    """A line below, or in the row of, controls that have no help line of their own."""
    return html(f"<p>{text}</p>", elem_classes=["apt-help", *classes])


def pictures(elem_id: str, value: str = "", visible: bool = True, small: bool = False) -> gr.HTML:
    """A place for figures (`apt_diffusion.studio.figures`). Buttons in it raise `click` with their `data-` values."""
    classes = ["apt-figures-box", "apt-small"] if small else ["apt-figures-box"]
    return html(value, elem_id=elem_id, elem_classes=classes, visible=visible, js_on_load=CLICKS)


CLICKS = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-action]');
  if (button) trigger('click', {...button.dataset});
});
"""
