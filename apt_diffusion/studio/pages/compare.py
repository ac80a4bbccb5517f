"""The part of the page Generate that draws a grid: one setting along the columns, another along the rows."""

from collections.abc import Sequence

import gradio as gr

from .. import figures
from ..axes import AXES, STRENGTHS, cells_of, values_of
from ..order import Order, text
from .components import Dropdown, Textbox, help_line

NOTHING = "nothing"
SWEEP = "Strength of all adapters"


class Compare:
    """Builds its controls where it is made."""

    def __init__(self) -> None:
        with gr.Accordion("Compare settings in a grid", open=False):
            self.top = Dropdown(
                list(AXES), value="Guidance", label="Columns", elem_id="compare-top",
                info="A setting that differs from column to column.",
            )  # fmt: skip
            self.top_values = Textbox(
                label="Its values", elem_id="compare-top-values", max_length=500,
                info="With commas between them; empty for an example. “Words” replaces the first by the others.",
            )  # fmt: skip
            self.side = Dropdown(
                [NOTHING, *AXES], value=NOTHING, label="Rows", elem_id="compare-side",
                info="A second setting, or nothing.",
            )  # fmt: skip
            self.side_values = Textbox(
                label="Its values", elem_id="compare-side-values", max_length=500, info="As for the columns."
            )
            self.button = gr.Button("Draw the grid", elem_id="compare")
            help_line("One picture for each pair of values, all with the seed that is shown.")

    @property
    def inputs(self) -> list:
        """What `axes` reads."""
        return [self.top, self.top_values, self.side, self.side_values]

    def axes(self, values: dict) -> tuple[str, list[str], str, list[str]]:
        """The axes that were chosen, with their values."""
        top, side = text(values[self.top]), text(values[self.side])
        side = "" if side == NOTHING else side
        rows = values_of(side, text(values[self.side_values])) if side else []
        return top, values_of(top, text(values[self.top_values])), side, rows

    @staticmethod
    def sweep() -> tuple[str, list[str], str, list[str]]:
        """The axes of the strength sweep."""
        return SWEEP, values_of(SWEEP, STRENGTHS), "", []

    @staticmethod
    def cells(order: Order, top: str, top_values: list[str], side: str, side_values: list[str]) -> list[Order]:
        """The orders of the grid."""
        return cells_of(order, top, top_values, side, side_values)

    @staticmethod
    def table(
        top: str, top_values: list[str], side: str, side_values: list[str],
        drawn: Sequence[figures.Figure | None],
    ) -> str:  # fmt: skip
        """The grid as far as it is drawn."""
        title = f"{top} →" + (f"   {side} ↓" if side else "")
        return figures.table(title, top_values, side_values or [""], drawn)
