"""The controls for the settings of a drawing on the page Generate: layout, labels, and filling them with values."""

import random
from itertools import zip_longest
from typing import Any

import gradio as gr

from ...pipelines.samplers import OWN
from ..charts import escape
from ..order import BLOCKS, MAX_ADAPTERS, MAX_IMAGES, MAX_SEED, MAX_STEPS, Order, names, real, text, whole
from ..recipe import Settings, checked
from ..studio import Studio
from .components import Checkbox, Dropdown, Number, Slider, Textbox, pictures
from .events import clicked

EXAMPLES = (
    "a photo of sks dog on a beach at sunset",
    "a watercolour painting of a lighthouse in a storm",
    "a bowl of cherries on a wooden table, morning light",
)
BLOCK_NAMES = {
    "text_encoder": "Text encoder", "down": "First layers", "mid": "Middle layers", "up": "Last layers"
}  # fmt: skip


class SettingsFields:
    """The controls. `build_prompt` and `build_more` make them where they are called."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.blocks: dict[str, Slider] = {}
        embedded = studio.painter.embedded
        self.examples = embedded.prompts if embedded else EXAMPLES
        self.num_images = embedded.num_images if embedded else 1

    def build_prompt(self) -> None:
        """What is asked for, and which adapters draw it."""
        self.prompt = Textbox(
            label="Prompt", lines=2, max_length=1000, value=self.examples[0], elem_id="prompt",
            info="What the picture should show. Ctrl+Enter generates; <apt:name:0.8> adds an adapter.",
        )  # fmt: skip
        self.adapters = Dropdown(
            [], multiselect=True, max_choices=MAX_ADAPTERS, label="Adapters", elem_id="adapters",
            info="What the model has been taught. Several are mixed, each with its own weight.",
        )  # fmt: skip
        self.weights = [
            Slider(
                0, 1.5, 1.0, step=0.05, visible=False, label="Weight", elem_id=f"weight-{number}",
                info="0 is the base model, 1 the adapter as it was trained.",
            )
            for number in range(1, MAX_ADAPTERS + 1)
        ]  # fmt: skip

    def build_more(self) -> None:
        """How it is drawn."""
        painter = self.studio.painter
        buttons = "".join(
            f'<button type="button" data-action="try" data-id="{number}">{escape(example)}</button>'
            for number, example in enumerate(self.examples)
        )
        self.tries = pictures("tries", f'<div class="apt-tools"><span>Prompts to try:</span>{buttons}</div>')
        with gr.Row():
            self.seed = Number(
                0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed", min_width=120,
                info="The same seed and settings give the same picture.",
            )  # fmt: skip
            self.new_seed = Checkbox(
                True, label="New seed every time", min_width=120, elem_id="new-seed",
                info="Untick it to keep the seed shown.",
            )  # fmt: skip
        self.count = Slider(
            1, MAX_IMAGES, self.num_images, step=1, label="Number of pictures",
            info="Each has its own seed: the one shown, the next, and so on.", elem_id="count",
        )  # fmt: skip
        with gr.Accordion("More settings", open=False):
            self.each_line = Checkbox(
                False, label="Each line of the prompt is a prompt of its own", elem_id="each-line",
                info="They are drawn one after another.",
            )  # fmt: skip
            self.negative_prompt = Textbox(
                label="Negative prompt", info="What the picture should not show.", max_length=1000,
                elem_id="negative-prompt",
            )  # fmt: skip
            self.sampler = Dropdown(
                [OWN, *painter.samplers], value=OWN, label="Sampler", elem_id="sampler",
                info="How noise becomes a picture: same prompt and seed, somewhat other pictures.",
            )  # fmt: skip
            self.steps = Slider(
                1, MAX_STEPS, painter.default_steps, step=1, label="Steps", elem_id="steps",
                info="Denoising steps: more are slower and, up to a point, better.",
            )  # fmt: skip
            self.guidance = Slider(
                1, 15, painter.default_guidance, step=0.5, label="Guidance", elem_id="guidance",
                info="How strictly the prompt is followed.",
            )  # fmt: skip
            self.width, self.height = _size_slider("Width", painter.size), _size_slider("Height", painter.size)
        with gr.Accordion("Strength by block", open=False):
            for name in BLOCKS:
                self.blocks[name] = Slider(
                    0, 1.5, 1.0, step=0.05, label=BLOCK_NAMES[name], elem_id=f"block-{name.replace('_', '-')}",
                    info="A factor on the weights of all adapters there: 0 switches them off, 1 changes nothing.",
                )  # fmt: skip

    @property
    def fields(self) -> dict[str, Any]:
        """The controls by the name of their setting; weights and blocks by numbered names."""
        return {
            "prompt": self.prompt, "negative_prompt": self.negative_prompt, "adapters": self.adapters,
            "steps": self.steps, "guidance": self.guidance, "width": self.width, "height": self.height,
            "seed": self.seed, "new_seed": self.new_seed, "count": self.count, "sampler": self.sampler,
            "each_line": self.each_line,
            **{f"weight_{number}": slider for number, slider in enumerate(self.weights)},
            **{f"block_{name}": slider for name, slider in self.blocks.items()},
        }  # fmt: skip

    def prompts(self, values: dict) -> list[str]:
        """What is drawn, one after another."""
        written = text(values[self.prompt], "prompt")
        lines = [line.strip() for line in written.splitlines() if line.strip()]
        if values[self.each_line] is not True or not lines:
            return [written]
        if len(lines) > MAX_IMAGES:
            raise ValueError(f"At most {MAX_IMAGES} prompts can be drawn one after another, not {len(lines)}.")
        return lines

    def example(self, event: gr.EventData) -> dict:
        """A prompt to try stands in the field."""
        _, name = clicked(event)
        if not name.isdecimal() or int(name) >= len(self.examples):
            raise ValueError("This prompt is not there any more: reload the page.")
        return {self.prompt: self.examples[int(name)]}

    def order(self, values: dict, visitor: str, prompt: str, keep_seed: bool = False, **more: Any) -> Order:
        """The order that the controls make.

        Args:
            values: of the components.
            visitor: who sees the adapters.
            prompt: one of `prompts`.
            keep_seed: draw with the seed that is shown, whatever is ticked.
            more: of the order.
        """
        is_new = values[self.new_seed] is True and not keep_seed
        factors = {name: real(values[slider], f"strength of the block {name}") for name, slider in self.blocks.items()}
        sampler = text(values[self.sampler], "sampler")
        return self.studio.order(
            visitor,
            names(values[self.adapters], "adapters"),
            [real(values[weight], "weight") for weight in self.weights],
            prompt=prompt,
            negative_prompt=text(values[self.negative_prompt], "negative prompt"),
            steps=whole(values[self.steps], "number of steps"),
            guidance=real(values[self.guidance], "guidance"),
            width=whole(values[self.width], "width"),
            height=whole(values[self.height], "height"),
            seed=random.randrange(MAX_SEED) if is_new else whole(values[self.seed], "seed"),
            count=whole(values[self.count], "number of pictures"),
            sampler="" if sampler == OWN else sampler,
            blocks=tuple((name, factor) for name, factor in factors.items() if factor != 1),
            **more,
        )

    def settings(self, values: dict) -> Settings:
        """The controls as settings, for a preset."""
        return {
            "prompt": text(values[self.prompt], "prompt"),
            "negative_prompt": text(values[self.negative_prompt], "negative prompt"),
            "adapters": names(values[self.adapters], "adapters"),
            "weights": [real(weight, "weight") for weight in (values[slider] for slider in self.weights)],
            "steps": values[self.steps], "guidance": values[self.guidance], "width": values[self.width],
            "height": values[self.height], "count": values[self.count],
            "sampler": text(values[self.sampler], "sampler"),
            "blocks": {name: values[slider] for name, slider in self.blocks.items()},
        }  # fmt: skip

    def remembered(self, kept: Any) -> Settings:
        """What a browser has remembered of the controls, as settings; nothing where it makes no sense."""
        if not isinstance(kept, dict):
            return {}
        weights = [kept[name] for name in (f"weight_{i}" for i in range(MAX_ADAPTERS)) if name in kept]
        blocks = {name: kept[f"block_{name}"] for name in BLOCKS if f"block_{name}" in kept}
        values = {key: value for key, value in kept.items() if value is not None}
        try:
            return checked(values | {"weights": weights, "blocks": blocks})
        except ValueError:
            return {}

    def fill(self, settings: Settings, visitor: str, chosen: gr.State) -> dict:
        """Updates that put settings into the controls; adapters that this visitor does not see are left out."""
        simple = ("prompt", "negative_prompt", "steps", "guidance", "width", "height", "seed", "count")
        update: dict[Any, Any] = {getattr(self, name): settings[name] for name in simple if name in settings}
        if "sampler" in settings:
            known = settings["sampler"] in self.studio.painter.samplers
            update[self.sampler] = settings["sampler"] if known else OWN
        for name, slider in self.blocks.items():
            if "blocks" in settings:
                update[slider] = settings["blocks"].get(name, 1.0)
        if "adapters" in settings:
            choices = self.choices(visitor)
            seen = {key for _, key in choices}
            pairs = zip_longest(settings["adapters"][:MAX_ADAPTERS], settings.get("weights", [])[:MAX_ADAPTERS])
            kept = [(key, 1.0 if weight is None else weight) for key, weight in pairs if key in seen]
            update[self.adapters] = Dropdown(choices=choices, value=[key for key, _ in kept])
            update |= self.weights_of(visitor, kept) | {chosen: [key for key, _ in kept]}
        return update

    def weights_of(self, visitor: str, pairs: list[tuple[str, float]]) -> dict:
        """Updates of the weights' sliders for adapters by key."""
        update: dict[Any, Any] = {}
        for slider, pair in zip_longest(self.weights, pairs):
            if pair is None:
                update[slider] = Slider(value=1.0, visible=False)
            else:
                adapter = self.studio.library.get(visitor, pair[0])
                update[slider] = Slider(value=pair[1], visible=True, label=f"Weight of {adapter.name}")
        return update

    def choices(self, visitor: str) -> list[tuple[str, str]]:
        """What the list of adapters offers this visitor."""
        return [(adapter.label, adapter.key) for adapter in self.studio.library.visible(visitor)]


def _size_slider(side: str, size: int) -> Slider:
    info = f"In pixels. The model was trained at {size}."
    return Slider(max(8, size // 2), 2 * size, size, step=8, label=side, info=info, elem_id=side.lower())
