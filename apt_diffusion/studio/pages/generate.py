"""The page Generate."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ..charts import escape, progress
from ..drawings import Drawing
from ..figures import Figure, figures, of_drawing, of_image
from ..generation import Progress, Waiting
from ..order import Order
from ..python_code import python_code
from ..recipe import Settings, as_query, from_query
from ..studio import Studio
from ..visitors import visitor_of, who_of
from ..words import duration, waiting
from .compare import Compare
from .components import help_line, html, pictures
from .events import AT_ONCE, IN_BROWSER, in_turn, stop, told
from .presets import PresetsPart
from .settings import SettingsFields
from .start_picture import StartPicture
from .welcome import welcome

NO_ADAPTER = "No adapter chosen: this is the base model. Choose one, or train your own on the next page."
START_ACTION = ("start", "Start from it")
Shown = dict[str, list[Drawing]]  # by part


class GeneratePage:
    """Builds the page inside the current tab. `fields.adapters` is the list that a finished training must refresh."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.fields = SettingsFields(studio)
        small = studio.painter.size <= 256
        # Three parts, so that on a phone the pictures follow the button.
        with gr.Row(elem_classes="apt-page"):
            with gr.Column(elem_classes="apt-make"):
                self.fields.build_prompt()
                with gr.Row(elem_classes="apt-buttons"):
                    self.draw = gr.Button("Generate", variant="primary", elem_id="draw", min_width=110)
                    self.sweep = gr.Button("Strength sweep", elem_id="sweep", min_width=130)
                    self.stop = gr.Button("Stop", variant="stop", elem_id="stop-drawing", min_width=80)
                help_line(
                    "<b>Generate</b> draws with the adapters and without, from the same noise. <b>Strength sweep</b> "
                    "draws the first picture with the weights times 0 to 1.2. <b>Stop</b> ends either."
                )
            with gr.Column(elem_classes="apt-results"):
                self.status = html(progress("Ready."), elem_id="status")
                self.welcome = pictures("welcome", welcome(studio.painter.model), small=True)
                with gr.Row(elem_classes="apt-pair"):
                    self.adapted = pictures("adapted", visible=False, small=small)
                    self.base = pictures("base", visible=False, small=small)
                self.grid = pictures("grid", visible=False, small=small)
                self.link = html(elem_id="link")
                with gr.Accordion("Python code for these pictures", open=False):
                    self.code = gr.Code(
                        language="python", label="Draws the same pictures, pixel by pixel", elem_id="code",
                        interactive=False,
                    )  # fmt: skip
            with gr.Column(elem_classes="apt-more"):
                self.fields.build_more()
                self.start = StartPicture(studio)
                self.compare = Compare()
                self.presets = PresetsPart(studio, self.fields)
        self.chosen = gr.State([])  # the adapters that the weights belong to
        self.remembered = gr.BrowserState({}, storage_key="apt-studio-settings", secret="apt-studio")
        self.restored = gr.Textbox(visible="hidden", elem_id="restored", label="Settings of a picture")
        self._connect()

    @property
    def filled(self) -> list[Any]:
        """What `fill` may change."""
        return [*self.fields.fields.values(), self.chosen, self.status]

    def _connect(self) -> None:
        inputs = {*self.fields.fields.values(), *self.start.inputs, *self.compare.inputs}
        outputs = [
            self.status, self.welcome, self.adapted, self.base, self.grid, self.code, self.link, self.fields.seed
        ]  # fmt: skip
        drawing = in_turn([self.draw.click], self._on_draw, inputs, self.status, outputs)
        sweeping = in_turn([self.sweep.click], self._on_sweep, inputs, self.status, outputs)
        comparing = in_turn([self.compare.button.click], self._on_compare, inputs, self.status, outputs)
        stop(self.stop.click, [drawing, sweeping, comparing], self.status)
        self.fields.adapters.change(
            told(self.status)(self._on_choice),
            {self.fields.adapters, self.chosen, *self.fields.weights},
            [*self.fields.weights, self.chosen, self.status],
            **AT_ONCE,
        )
        names = list(self.fields.fields)
        controls = list(self.fields.fields.values())
        # What Gradio sets while the page is still being filled is nobody's wish.
        js = (
            "(...values) => document.body.dataset.filled ? "
            f"Object.fromEntries({names!r}.map((name, place) => [name, values[place]])) : values[{len(names)}]"
        )
        kept = [*controls, self.remembered]
        gr.on([control.change for control in controls], inputs=kept, outputs=self.remembered, js=js, **IN_BROWSER)
        self.restored.change(told(self.status)(self._on_restored), self.restored, self.filled, **AT_ONCE)
        self.presets.connect(self.status, self.filled, self.fill)
        self.start.connect(self.status)
        example = told(self.status)(self.fields.example)
        self.fields.tries.click(example, None, [self.fields.prompt, self.status], **AT_ONCE)
        for part in (self.adapted, self.base):
            part.click(told(self.status)(self._on_action), None, [*self.start.filled, self.status], **AT_ONCE)

    def connect(self, page: gr.Blocks) -> None:
        """Fills the page when it is opened: from its link, or from what the browser and the server remember."""
        outputs = [*self.filled, self.welcome, self.adapted, self.base, self.link, *self.presets.outputs]
        filled = page.load(told(self.status)(self._on_load), self.remembered, outputs, **AT_ONCE)
        filled.then(js="() => { document.body.dataset.filled = 'yes'; }", **IN_BROWSER)

    def fill(self, settings: Settings, request: gr.Request) -> dict:
        """Updates that put settings into the controls."""
        return self.fields.fill(settings, visitor_of(request), self.chosen)

    def _on_load(self, kept: Any, request: gr.Request) -> dict:
        visitor = visitor_of(request)
        library = self.studio.library
        query = {key: value for key, value in dict(request.query_params).items() if not key.startswith("_")}
        examples = [adapter.key for adapter in library.examples if adapter.kind == "stable_diffusion"]
        settings = {"adapters": examples[:1]} | self.fields.remembered(kept)
        update: dict[Any, Any] = {}
        if "prompt" in query:
            settings |= from_query(query)
            update[self.fields.new_seed] = "seed" not in settings
            update[self.status] = progress("These are the settings of the link.")
        if isinstance(kept, dict) and not query:
            ticks = {name: kept[name] for name in ("new_seed", "each_line") if isinstance(kept.get(name), bool)}
            update |= {self.fields.fields[name]: value for name, value in ticks.items()}
        update |= self.fill(settings, request) | self.presets.refreshed(visitor)
        drawings = [drawing for drawing in self.studio.drawings.of(visitor) if drawing.batch]
        if drawings:
            update |= self._latest([drawing for drawing in drawings if drawing.batch == drawings[0].batch])
        return update

    def _latest(self, drawings: list[Drawing]) -> dict:
        """The pictures of the last drawing, after a reload."""
        shown: Shown = {"adapted": [], "base": []}
        for drawing in reversed(drawings):
            shown[drawing.part].append(drawing)
        return {self.welcome: gr.update(visible=False), **self._figures(shown)}

    def _figures(self, shown: Shown) -> dict:
        update: dict[Any, Any] = {}
        titles = {"adapted": "With the adapters", "base": "Base model, same noise"}
        titles["base"] = titles["base"] if shown["adapted"] else "Base model"
        for part, place in (("adapted", self.adapted), ("base", self.base)):
            items = [_figure(drawing, titles[part]) for drawing in shown[part]]
            update[place] = gr.update(value=figures(items, titles[part]) if items else "", visible=bool(items))
        return update

    def _on_restored(self, said: str, request: gr.Request) -> dict:
        settings = self.studio.settings_in_text(said)
        note = "These are the settings of the picture"
        if settings.get("model") not in (None, self.studio.model_name):
            note += f", which another model has drawn: {settings['model'][:60]}"
        return self.fill(settings, request) | {
            self.fields.new_seed: False, self.status: progress(f"{note}.")
        }  # fmt: skip

    def _on_action(self, event: gr.EventData, request: gr.Request) -> dict:
        return self.start.take(event, visitor_of(request)) | {
            self.status: progress("The next picture starts from this one: see “Start from a picture”.")
        }

    def _on_draw(self, values: dict, request: gr.Request) -> Iterator[dict]:
        who = who_of(request)
        prompts = self.fields.prompts(values)
        start = self.start.settings(values)
        orders = [self.fields.order(values, who.visitor, prompt, **start) for prompt in prompts]
        for order in orders:
            self.studio.painter.check(order)  # all of them before the first is drawn
        shown: Shown = {"adapted": [], "base": []}
        batch = self.studio.drawings.new_batch()
        for number, order in enumerate(orders):
            many = f"Prompt {number + 1} of {len(orders)}: " if len(orders) > 1 else ""
            yield self._begun(order, many)
            for step in self.studio.painter.draw(order, who, again=number > 0):
                if isinstance(step, Waiting):
                    yield {self.status: progress(many + waiting(step.ahead, step.seconds))}
                    continue
                yield self._step(step, order, shown, many) | self._kept(who.visitor, step, order, shown, batch)
        note = "" if orders[-1].adapters else f" {NO_ADAPTER}"
        # Once more, as Gradio drops an update that is followed closely by another one.
        yield {self.status: progress(f"Done. Seed {orders[0].seed}.{note}"), **self._figures(shown)}

    def _begun(self, order: Order, many: str) -> dict:
        settings = self.studio.settings_of(order)
        return {
            self.fields.seed: order.seed, self.welcome: gr.update(visible=False), self.grid: gr.update(visible=False),
            self.code: python_code(self.studio.painter, order), self.link: link_html(settings),
            self.status: progress(f"{many}Starting …", 0),
        }  # fmt: skip

    def _step(self, step: Progress, order: Order, shown: Shown, many: str) -> dict:
        """Where a drawing is, with its preview: nothing of that is kept."""
        what = "with the adapters" if step.part == "adapted" else "with the base model"
        left = self.studio.turns.seconds_for(order.cost * (1 - step.step / step.steps))
        tail = "" if left is None or left < 3 else f", {duration(left)} left"
        line = progress(f"{many}Step {step.step} of {step.steps}, {what}{tail}", step.step / step.steps)
        update: dict[Any, Any] = {self.status: line}
        if step.pictures and not step.done:
            place = self.adapted if step.part == "adapted" else self.base
            before = [_figure(drawing, "") for drawing in shown[step.part]]
            previews = [of_image(picture, "unfinished", "…") for picture in step.pictures]
            title = "With the adapters" if step.part == "adapted" else "Base model"
            update[place] = gr.update(value=figures([*before, *previews], title), visible=True)
        return update

    def _kept(self, visitor: str, step: Progress, order: Order, shown: Shown, batch: int) -> dict:
        """Finished pictures: they are kept for their visitor, and shown from there."""
        if not step.done:
            return {}
        each = [
            self.studio.settings_of(order) | {"seed": seed, "count": 1} for seed in order.seeds
        ]  # fmt: skip
        shown[step.part] += self.studio.drawings.keep(visitor, step.part, step.pictures, each, batch)
        return self._figures(shown)

    def _on_sweep(self, values: dict, request: gr.Request) -> Iterator[dict]:
        yield from self._grid(values, request, *self.compare.sweep())

    def _on_compare(self, values: dict, request: gr.Request) -> Iterator[dict]:
        yield from self._grid(values, request, *self.compare.axes(values))

    def _grid(
        self, values: dict, request: gr.Request, top: str, top_values: list[str], side: str, side_values: list[str]
    ) -> Iterator[dict]:
        who = who_of(request)
        prompt = self.fields.prompts(values)[0]
        start = self.start.settings(values)
        order = self.fields.order(values, who.visitor, prompt, keep_seed=True, **start)  # of the pictures shown
        cells = self.compare.cells(order, top, top_values, side, side_values)
        for cell in (order, *cells):
            self.studio.painter.check(cell)  # all of them before the first is drawn
        drawn: list[Figure | None] = [None] * len(cells)
        yield self._begun(order, "") | {self.grid: gr.update(value="", visible=True)}
        batch = self.studio.drawings.new_batch(is_shown=False)
        for place, cell in enumerate(cells):
            share = place / len(cells)
            for step in self.studio.painter.draw(cell, who, with_base=False, again=place > 0):
                if isinstance(step, Waiting):
                    yield {self.status: progress(waiting(step.ahead, step.seconds), share)}
                elif step.done:
                    settings = [self.studio.settings_of(cell)]
                    (kept,) = self.studio.drawings.keep(who.visitor, step.part, step.pictures, settings, batch)
                    drawn[place] = of_drawing(kept, f"picture {place + 1}", "")
            line = progress(f"Picture {place + 1} of {len(cells)}", (place + 1) / len(cells))
            table = self.compare.table(top, top_values, side, side_values, drawn)
            yield {self.status: line, self.grid: gr.update(value=table, visible=True)}
        table = self.compare.table(top, top_values, side, side_values, drawn)
        yield {
            self.status: progress(f"Done. Seed {order.seed}."), self.grid: gr.update(value=table, visible=True)
        }  # fmt: skip

    def _on_choice(self, values: dict, request: gr.Request) -> dict:
        visitor = visitor_of(request)
        keys = [key for key in values[self.fields.adapters] or [] if isinstance(key, str)]
        known = dict(zip(values[self.chosen] or [], (values[slider] for slider in self.fields.weights), strict=False))
        pairs = [(self.studio.library.get(visitor, key).key, known.get(key, 1.0)) for key in keys]
        return self.fields.weights_of(visitor, pairs) | {self.chosen: keys}


def link_html(settings: Settings) -> str:
    """A link that holds the settings, with a button that copies it."""
    address = escape(f"/?{as_query(settings)}")
    return (
        f'<p class="apt-link"><a href="{address}">Link to these settings</a> '
        f'<button type="button" data-copy="{address}">Copy</button></p>'
    )


def _figure(drawing: Drawing, title: str) -> Figure:
    settings = drawing.settings
    says = f"{settings['prompt']}, seed {settings['seed']}" + (f" ({title.lower()})" if title else "")
    return of_drawing(drawing, says, f"seed {settings['seed']}", [(START_ACTION[0], drawing.id, START_ACTION[1])])
