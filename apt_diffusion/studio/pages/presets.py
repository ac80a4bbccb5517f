"""The part of the page Generate that keeps settings under a name."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from ..charts import progress
from ..order import text
from ..studio import Studio
from ..visitors import visitor_of
from .components import Dropdown, Textbox, help_line
from .events import AT_ONCE, told
from .settings import SettingsFields


class PresetsPart:
    """Builds its controls where it is made."""

    def __init__(self, studio: Studio, fields: SettingsFields) -> None:
        self.studio = studio
        self.fields = fields
        with gr.Accordion("Presets", open=False):
            self.preset = Dropdown([], label="Preset", elem_id="preset", info="Puts its settings into the controls.")
            self.name = Textbox(
                label="Name", max_length=40, elem_id="preset-name", info="To keep the settings as they are now."
            )
            with gr.Row():
                self.save = gr.Button("Keep", size="sm", elem_id="preset-save")
                self.delete = gr.Button("Delete", size="sm", elem_id="preset-delete")
            help_line("<b>Keep</b> saves under that name, <b>Delete</b> takes the chosen preset of yours away.")

    @property
    def outputs(self) -> list:
        """What `refreshed` changes."""
        return [self.preset]

    def refreshed(self, visitor: str, chosen: str | None = None) -> dict:
        """The list as it is now."""
        return {self.preset: Dropdown(choices=list(self.studio.presets.of(visitor)), value=chosen)}

    def connect(self, status: gr.HTML, filled: list, fill: Callable[[Any, gr.Request], dict]) -> None:
        """Connects the controls.

        Args:
            status: where sentences go.
            filled: what `fill` may change.
            fill: puts settings into the controls.
        """

        def on_choice(name: Any, request: gr.Request) -> dict:
            if not name:
                return {status: gr.skip()}
            return fill(self.studio.presets.get(visitor_of(request), text(name)), request)

        def on_save(values: dict, request: gr.Request) -> dict:
            visitor = visitor_of(request)
            name = self.studio.presets.keep(visitor, text(values[self.name]), self.fields.settings(values))
            return self.refreshed(visitor) | {status: progress(f"Kept as “{name}”.")}

        def on_delete(name: Any, request: gr.Request) -> dict:
            visitor = visitor_of(request)
            self.studio.presets.delete(visitor, text(name))
            return self.refreshed(visitor) | {status: progress("The preset is deleted.")}

        self.preset.input(told(status)(on_choice), self.preset, filled, **AT_ONCE)
        inputs = {self.name, *self.fields.fields.values()}
        self.save.click(told(status)(on_save), inputs, [status, self.preset], **AT_ONCE)
        self.delete.click(told(status)(on_delete), self.preset, [status, self.preset], **AT_ONCE)
