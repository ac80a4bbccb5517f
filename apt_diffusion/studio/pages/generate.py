"""The page Generate."""

import random
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import gradio as gr
from PIL import Image

from ..charts import progress
from ..generation import MAX_ADAPTERS, MAX_IMAGES, MAX_SEED, MAX_STEPS, Order, Progress, python_code
from ..studio import Studio
from ..visitors import visitor_of
from .downloads import offer
from .events import AT_ONCE, help_line, in_turn, stop, told

EXAMPLES = [
    "a photo of sks dog on a beach at sunset",
    "a watercolour painting of a lighthouse in a storm",
    "a bowl of cherries on a wooden table, morning light",
]
NO_ADAPTER = "No adapter chosen: this is the base model. Choose one, or train your own on the next page."


class GeneratePage:
    """Builds the page inside the current tab. `adapters` is the list that a finished training must refresh."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        painter = studio.painter
        examples = list(painter.embedded.prompts if painter.embedded else EXAMPLES)
        with gr.Row(elem_classes="apt-columns"):
            with gr.Column(scale=4, min_width=300):
                self.prompt = gr.Textbox(
                    label="Prompt", info="What the picture should show.", lines=2, max_length=1000,
                    value=examples[0], elem_id="prompt",
                )  # fmt: skip
                gr.Examples(examples, self.prompt, label="Examples to try")
                self.adapters = gr.Dropdown(
                    [], multiselect=True, max_choices=MAX_ADAPTERS, label="Adapters", elem_id="adapters",
                    info="What the model has been taught. Several are mixed, each with its own weight.",
                )  # fmt: skip
                self.weights = [_weight_slider() for _ in range(MAX_ADAPTERS)]
                with gr.Row():
                    self.draw = gr.Button("Generate", variant="primary", elem_id="draw", min_width=110)
                    self.sweep = gr.Button("Strength sweep", elem_id="sweep", min_width=130)
                    self.stop = gr.Button("Stop", variant="stop", elem_id="stop-drawing", min_width=80)
                help_line(
                    "<b>Generate</b> draws with the adapters and without, from the same noise. <b>Strength sweep</b> "
                    "draws the first picture with the weights times 0 to 1.2. <b>Stop</b> ends either."
                )
                with gr.Row():
                    self.seed = gr.Number(
                        0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed", min_width=120,
                        info="The same seed and settings give the same picture.",
                    )  # fmt: skip
                    self.new_seed = gr.Checkbox(
                        True, label="New seed every time", min_width=120, elem_id="new-seed",
                        info="Untick it to keep the seed shown.",
                    )  # fmt: skip
                self.count = gr.Slider(
                    1, MAX_IMAGES, painter.embedded.num_images if painter.embedded else 1, step=1,
                    label="Number of pictures",
                    info="Each has its own seed: the one shown, the next, and so on.", elem_id="count",
                )  # fmt: skip
                with gr.Accordion("More settings", open=False):
                    self.negative_prompt = gr.Textbox(
                        label="Negative prompt", info="What the picture should not show.", max_length=1000
                    )
                    self.steps = gr.Slider(
                        1, MAX_STEPS, painter.default_steps, step=1, label="Steps", elem_id="steps",
                        info="Denoising steps: more are slower and, up to a point, better.",
                    )  # fmt: skip
                    self.guidance = gr.Slider(
                        1, 15, painter.default_guidance, step=0.5, label="Guidance",
                        info="How strictly the prompt is followed.",
                    )  # fmt: skip
                    self.width, self.height = _size_slider("Width", painter.size), _size_slider("Height", painter.size)
            with gr.Column(scale=6, min_width=300):
                self.status = gr.HTML(progress("Ready."), elem_id="status", padding=False)
                classes = "apt-pictures apt-small" if painter.size <= 256 else "apt-pictures"
                shown = {"format": "png", "object_fit": "contain", "elem_classes": classes, "height": "auto"}
                with gr.Row():
                    self.adapted = gr.Gallery(
                        label="With the adapters", columns=2, min_width=240, elem_id="adapted", visible=False,
                        buttons=["download", "fullscreen"], **shown,
                    )  # fmt: skip
                    self.base = gr.Gallery(
                        label="Base model", columns=2, min_width=240, elem_id="base",
                        buttons=["download", "fullscreen"], **shown,
                    )  # fmt: skip
                self.strengths = gr.Gallery(
                    label="Strength sweep: the first picture’s noise, weights × 0 to 1.2", columns=7,
                    elem_id="strengths", buttons=["download", "fullscreen"], visible=False, **shown,
                )  # fmt: skip
                with gr.Accordion("Python code for these pictures", open=False):
                    self.code = gr.Code(
                        language="python", label="Draws the same pictures, pixel by pixel", elem_id="code",
                        interactive=False,
                    )  # fmt: skip
                with gr.Accordion("About the adapters", open=False):
                    self.card = gr.Markdown(
                        "Choose an adapter to read its card.", elem_id="card", elem_classes="apt-card", max_height=420
                    )
                    self.download = gr.File(label="Download", interactive=False, visible=False, elem_id="downloads")
                    with gr.Column(visible=False) as self.publishing:
                        self.publish = gr.Button("Publish your adapters to everybody here", size="sm")
                        help_line(
                            "Copies those of the chosen ones that are yours, with cards and samples, to where "
                            "everybody here sees them. Whoever runs this studio can take them away again."
                        )
        self.chosen = gr.State([])  # the adapters that the weights belong to
        self._connect()

    def _connect(self) -> None:
        inputs = {
            self.prompt, self.negative_prompt, self.adapters, *self.weights, self.steps, self.guidance, self.width,
            self.height, self.seed, self.new_seed, self.count,
        }  # fmt: skip
        outputs = [self.status, self.adapted, self.base, self.strengths, self.code, self.seed]
        on_draw = [self.draw.click, self.prompt.submit]
        drawing = in_turn(on_draw, self._on_draw, inputs, self.status, outputs)
        sweeping = in_turn([self.sweep.click], self._on_sweep, inputs, self.status, outputs)
        stop(self.stop.click, [drawing, sweeping], self.status)
        about = [*self.weights, self.chosen, self.card, self.download, self.publishing, self.status]
        self.adapters.change(
            told(self.status)(self._on_choice), {self.adapters, self.chosen, *self.weights}, about, **AT_ONCE
        )
        self.publish.click(told(self.status)(self._on_publish), self.adapters, [self.status, self.adapters], **AT_ONCE)

    def connect(self, page: gr.Blocks) -> None:
        """Connects what visitors do with what the page shows."""
        page.load(told(self.status)(self._on_load), None, [self.adapters, self.status], **AT_ONCE)

    def _on_load(self, request: gr.Request) -> dict:
        examples = [adapter.key for adapter in self.studio.library.examples if adapter.kind == "stable_diffusion"]
        return {self.adapters: gr.Dropdown(choices=self.choices(visitor_of(request)), value=examples[:1])}

    def choices(self, visitor: str) -> list[tuple[str, str]]:
        """What the list of adapters offers this visitor."""
        return [(adapter.label, adapter.key) for adapter in self.studio.library.visible(visitor)]

    def _order(self, values: dict, visitor: str, new_seed: bool) -> Order:
        seed = random.randrange(MAX_SEED) if new_seed else int(values[self.seed] or 0)
        return self.studio.order(
            visitor,
            values[self.adapters] or [],
            [float(values[weight]) for weight in self.weights],
            prompt=values[self.prompt] or "",
            negative_prompt=values[self.negative_prompt] or "",
            steps=int(values[self.steps]),
            guidance=float(values[self.guidance]),
            width=int(values[self.width]),
            height=int(values[self.height]),
            seed=seed,
            count=int(values[self.count]),
        )

    def _on_draw(self, values: dict, request: gr.Request) -> Iterator[dict]:
        order = self._order(values, visitor_of(request), values[self.new_seed])
        yield {
            self.seed: order.seed, self.strengths: gr.skip(),
            self.adapted: gr.Gallery([], visible=bool(order.adapters)),
            self.base: gr.Gallery([], label="Base model, same noise" if order.adapters else "Base model"),
            self.code: python_code(self.studio.painter, order), self.status: progress("Starting …", 0),
        }  # fmt: skip
        for step in self.studio.painter.draw(order):
            what = "with the adapters" if step.part == "adapted" else "with the base model"
            update: dict[Any, Any] = {self.status: progress(*_words(step, what))}
            if step.pictures:
                update[self.adapted if step.part == "adapted" else self.base] = _captioned(step.pictures, order)
            yield update
        note = "" if order.adapters else f" {NO_ADAPTER}"
        yield {self.status: progress(f"Done. Seed {order.seed}.{note}")}

    def _on_sweep(self, values: dict, request: gr.Request) -> Iterator[dict]:
        order = self._order(values, visitor_of(request), new_seed=False)  # of the first picture that is shown
        yield {
            self.strengths: gr.Gallery(visible=True, value=[]),
            self.code: python_code(self.studio.painter, order, sweep=True), self.status: progress("Starting …", 0),
        }  # fmt: skip
        row: list[tuple[Image.Image, str]] = []
        for step in self.studio.painter.sweep(order):
            update: dict[Any, Any] = {self.status: progress(*_words(step, f"strength {step.strength:.1f}"))}
            if step.done:
                row.append((step.pictures[0], f"{step.strength:.1f}"))
                update[self.strengths] = list(row)
            yield update
        yield {self.status: progress(f"Done. Seed {order.seed}.")}

    def _on_choice(self, values: dict, request: gr.Request) -> dict:
        visitor = visitor_of(request)
        adapters = [self.studio.library.get(visitor, key) for key in values[self.adapters] or []]
        known = {key: values[weight] for key, weight in zip(values[self.chosen], self.weights, strict=False)}
        update: dict[Any, Any] = {self.chosen: [adapter.key for adapter in adapters]}
        for slider, adapter in zip_longest(self.weights, adapters):
            label = {} if adapter is None else {"label": f"Weight of {adapter.name}"}
            value = 1.0 if adapter is None else known.get(adapter.key, 1.0)
            update[slider] = gr.Slider(value=value, visible=adapter is not None, **label)
        cards = "\n\n---\n\n".join(adapter.card for adapter in adapters)
        update[self.card] = cards or "Choose an adapter to read its card."
        files = [offer(adapter) for adapter in adapters]
        update[self.download] = gr.update(value=files or None, visible=bool(files))
        update[self.publishing] = gr.update(visible=any(adapter.is_own for adapter in adapters))
        return update

    def _on_publish(self, keys: list[str], request: gr.Request) -> dict:
        visitor = visitor_of(request)
        own = [key for key in keys or [] if self.studio.library.get(visitor, key).is_own]
        names = [self.studio.library.publish(visitor, key).name for key in own]
        return {
            self.status: progress(f"Published: {', '.join(names)}. Everybody who uses this studio can see it now."),
            self.adapters: gr.Dropdown(choices=self.choices(visitor)),
        }


def _words(step: Progress, what: str) -> tuple[str, float]:
    return f"Step {step.step} of {step.steps}, {what}", step.step / step.steps


def _captioned(pictures: tuple[Image.Image, ...], order: Order) -> list[tuple[Image.Image, str]]:
    return [(picture, f"seed {seed}") for picture, seed in zip(pictures, order.seeds, strict=True)]


def _weight_slider() -> gr.Slider:
    info = "0 is the base model, 1 the adapter as it was trained."
    return gr.Slider(0, 1.5, 1.0, step=0.05, visible=False, label="Weight", info=info)


def _size_slider(side: str, size: int) -> gr.Slider:
    info = f"In pixels. The model was trained at {size}."
    return gr.Slider(max(8, size // 2), 2 * size, size, step=8, label=side, info=info)
