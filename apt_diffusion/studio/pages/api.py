"""The API for programs: `generate` and `list_adapters`, documented on Gradio's API page; all else is private."""

import functools
from collections.abc import Callable
from typing import Any

import gradio as gr

from ..figures import adapter_address
from ..generation import Waiting
from ..order import MAX_IMAGES, MAX_SEED, MAX_STEPS, names, real, text, whole
from ..studio import Studio
from ..visitors import visitor_of, who_of
from .components import Number, Textbox
from .events import in_words

PUBLIC = {"api_visibility": "public", "show_progress": "hidden", "concurrency_id": "model", "concurrency_limit": None}


class Api:
    """Builds its hidden components where it is made."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        painter = studio.painter
        with gr.Column(visible=False):
            self.prompt = Textbox(label="prompt: what the picture shows")
            self.adapters = Textbox(
                label="adapters: keys of list_adapters, with weights: “example/mushroom:0.8, public/dog”; may be empty"
            )
            self.negative_prompt = Textbox(label="negative_prompt: what it does not show")
            self.seed = Number(0, label=f"seed: from 0 to {MAX_SEED}")
            self.steps = Number(painter.default_steps, label=f"steps: from 1 to {MAX_STEPS}")
            self.guidance = Number(painter.default_guidance, label="guidance: from 0 to 30")
            self.count = Number(1, label=f"count: pictures, from 1 to {MAX_IMAGES}")
            self.pictures = gr.Gallery(label="pictures", format="png")
            self.list = gr.JSON(label="adapters")
            self.run, self.look = gr.Button("generate"), gr.Button("list")
        inputs = [
            self.prompt, self.adapters, self.negative_prompt, self.seed, self.steps, self.guidance, self.count
        ]  # fmt: skip
        self.run.click(_said(self._generate), inputs, self.pictures, api_name="generate", **PUBLIC)
        self.look.click(_said(self._list), None, self.list, api_name="list_adapters", **PUBLIC)

    def _generate(
        self, prompt: Any, adapters: Any, negative_prompt: Any, seed: Any, steps: Any, guidance: Any, count: Any,
        request: gr.Request,
    ) -> list:  # fmt: skip
        """Draws pictures with the adapters."""
        who, painter = who_of(request), self.studio.painter
        pairs = [part.strip().rpartition(":") for part in text(adapters, "adapters").split(",") if part.strip()]
        keys = [key or name for key, _, name in pairs]
        order = self.studio.order(
            who.visitor, names(keys), [real(weight, "weight") if key else 1.0 for key, _, weight in pairs],
            prompt=text(prompt, "prompt"), negative_prompt=text(negative_prompt, "negative prompt"),
            seed=whole(seed, "seed"), steps=whole(steps, "number of steps"), guidance=real(guidance, "guidance"),
            count=whole(count, "number of pictures"), width=painter.size, height=painter.size,
        )  # fmt: skip
        for step in painter.draw(order, who, with_base=False):
            if not isinstance(step, Waiting) and step.done:
                return [(picture, f"seed {s}") for picture, s in zip(step.pictures, order.seeds, strict=True)]
        raise ValueError("The drawing was stopped.")

    def _list(self, request: gr.Request) -> list[dict[str, str]]:
        """The adapters that draw, with their keys, their words, and where to download them."""
        return [
            {"key": adapter.key, "name": adapter.name, "prompt": adapter.prompt, "file": adapter_address(adapter.key)}
            for adapter in self.studio.library.visible(visitor_of(request))
        ]


def _said(handler: Callable) -> Callable:
    """A handler whose errors are sentences for a program's user."""

    @functools.wraps(handler)
    def answer(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            raise gr.Error(in_words(error), print_exception=False) from None

    return answer
