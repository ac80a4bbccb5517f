"""The page Cost: parameters and multiply-accumulates of APT and other methods on well-known models."""

from typing import Any

import gradio as gr

from ..charts import bars, escape
from ..costs import MODELS, compare, conclusion, in_units, saving
from ..order import text, whole
from .components import Dropdown, Slider, html
from .events import AT_ONCE, told


class CostPage:
    """Builds the page inside the current tab."""

    def __init__(self) -> None:
        first = next(iter(MODELS))
        with gr.Row(elem_classes="apt-columns"):
            with gr.Column(scale=4, min_width=300):
                self.model = Dropdown(
                    list(MODELS), value=first, label="Model", elem_id="cost-model",
                    info="Whose attention modules are adapted.",
                )  # fmt: skip
                self.prompts = Slider(
                    1, 800, 200, step=1, label="Prompts", elem_id="cost-prompts",
                    info="Per attention module. 200 in the paper's tables.",
                )  # fmt: skip
                self.rank = Slider(
                    1, 64, 4, step=1, label="Rank", info="Of APT's map from prompts to keys, and of LoRA's matrices.",
                    elem_id="cost-rank",
                )  # fmt: skip
                self.tokens = Slider(
                    16, 8192, MODELS[first].tokens, step=1, label="Tokens", info=MODELS[first].tokens_mean,
                    elem_id="cost-tokens",
                )  # fmt: skip
            with gr.Column(scale=6, min_width=300):
                self.status = html(elem_id="cost-summary")
                self.macs = html(elem_id="cost-macs")
                self.parameters = html(elem_id="cost-parameters")
                gr.Markdown(
                    "What each method adds to the frozen model, in closed form (`apt_diffusion.costs`). LoRA costs "
                    "nothing once its matrices are merged into the weights; then it cannot be mixed or switched per "
                    "picture. Adapters have a bottleneck of 96."
                )

    def connect(self, page: gr.Blocks) -> None:
        """The charts follow the controls."""
        inputs: list[Any] = [self.model, self.prompts, self.rank, self.tokens]
        outputs = [self.status, self.macs, self.parameters]
        self.model.change(told(self.status)(self._on_model), self.model, [self.tokens, self.status], **AT_ONCE)
        triggers = [page.load, *(component.change for component in inputs)]
        gr.on(triggers, told(self.status)(self._on_change), inputs, outputs, trigger_mode="always_last", **AT_ONCE)

    def _on_model(self, model: Any) -> dict:
        if model not in list(MODELS):
            raise ValueError(f"Choose one of {', '.join(MODELS)}.")
        return {self.tokens: Slider(value=MODELS[model].tokens, info=MODELS[model].tokens_mean)}

    def _on_change(self, model: Any, prompts: Any, rank: Any, tokens: Any) -> dict:
        table = compare(
            text(model), whole(prompts, "number of prompts"), whole(rank, "rank"), whole(tokens, "number of tokens")
        )
        macs = [(label, costs.macs, in_units(costs.macs)) for label, costs in table.items()]
        parameters = [(label, costs.parameters, in_units(costs.parameters)) for label, costs in table.items()]
        return {
            self.status: f'<p class="apt-summary">{escape(saving(table))}</p><p>{escape(conclusion(table))}</p>',
            self.macs: bars("Multiply-accumulates per forward pass", macs, "APT"),
            self.parameters: bars("Parameters to train and store", parameters, "APT"),
        }
