"""The page Train."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from ..cards import card_html
from ..charts import curve, progress
from ..figures import adapter_address, figures
from ..framing import as_trained
from ..generation import Waiting
from ..order import real, text, whole
from ..samples import subject_pictures
from ..studio import Studio
from ..training import CLASS_PICTURES, Lesson, Status
from ..uploads import MAX_BYTES, MAX_PICTURES, check_count, lines_of, split_captions
from ..visitors import visitor_of, who_of
from ..words import waiting
from .components import Files, Number, Slider, Textbox, help_line, html, pictures
from .downloads import examples_folder
from .events import AT_ONCE, PICTURES_QUEUE, QUIET, told
from .generate import GeneratePage
from .train_views import FRAME_HELP, SAMPLE_TITLE, frames_html, sample_figures, status_html, words_help

PROMPT_HELP = (
    "A short phrase that will stand for your subject: a rare word that means nothing yet (sks), then what kind of "
    "thing it is, such as “a sks dog”. Use the same phrase in your prompts later."
)
CAPTIONS_HELP = (
    "One line per picture, in the order shown. A caption that names what is not the subject (“a sks dog on grass”) "
    "keeps the grass out of the subject. An empty line uses the phrase above."
)
POLL_SECONDS = 1.5


class TrainPage:
    """Builds the page inside the current tab; a finished adapter goes to `generate`."""

    def __init__(self, studio: Studio, generate: GeneratePage) -> None:
        self.studio = studio
        self.generate = generate
        with gr.Row(elem_classes="apt-page"):
            with gr.Column(elem_classes="apt-make"):
                self._build_pictures()
                self._build_buttons()
            with gr.Column(elem_classes="apt-results"):
                self.seen = pictures("seen")
                self.losses = html(curve("Loss", [], 1), elem_id="losses")
                self.samples = pictures("samples", small=studio.painter.size <= 256)
            with gr.Column(elem_classes="apt-more"):
                self._build_more()
        # What the browser has on show: polls send only what is new.
        self.shown = gr.State({})
        self.timer = gr.Timer(POLL_SECONDS, active=False)
        self.frames = gr.Textbox(visible="hidden", elem_id="frames", label="Where the frames stand")

    def _build_pictures(self) -> None:
        self.pictures = Files(
            label="Pictures of your subject", file_count="multiple", file_types=["image", ".txt"], height=130,
            elem_id="pictures",
        )  # fmt: skip
        help_line(
            f"From 3 to 10 are best; at most {MAX_PICTURES}, of {MAX_BYTES // 2**20} MB each. Several can be "
            "dropped, or chosen, at once. A .txt file of the same name is a picture's caption."
        )
        embedded = self.studio.painter.embedded
        with gr.Row(visible=embedded is not None, elem_classes="apt-examples"):
            help_line("No pictures at hand? Take five of a", "apt-inline")
            self.examples = {
                name: gr.Button(name, size="sm", min_width=70, elem_id=f"example-{name}")
                for name in (embedded.subjects if embedded else ())
            }
        self.name = Textbox(
            "my subject", label="Name of the adapter", info="By which you find it again.", max_length=60,
            elem_id="adapter-name",
        )  # fmt: skip
        self.prompt = Textbox(
            embedded.instance_prompt if embedded else "a photo of sks dog",
            label="What shall stand for your subject", info=PROMPT_HELP, max_length=200, elem_id="instance-prompt",
        )  # fmt: skip
        html(words_help(embedded.instance_prompt if embedded else "a sks dog"), elem_id="words-help")

    def _build_more(self) -> None:
        embedded = self.studio.painter.embedded
        most = self.studio.trainings.max_steps
        self.captions = Textbox(
            label="Captions (optional, but they help much)", info=CAPTIONS_HELP, lines=3, elem_id="captions"
        )
        self.class_prompt = Textbox(
            embedded.class_prompt if embedded else "", label="Kind of thing (optional)", max_length=200,
            elem_id="class-prompt",
            info="The phrase without the rare word, such as “a dog”. The model then draws "
            f"{CLASS_PICTURES} pictures of what it knows and trains on them, too, so that other dogs do not "
            "turn into yours. Leave it empty to save that time.",
        )  # fmt: skip
        self.steps = Slider(
            1, most, min(embedded.train_steps if embedded else 400, most), step=1, label="Training steps",
            elem_id="train-steps",
            info=f"With fewer than 100 little is learnt; at most {most} here.",
        )  # fmt: skip
        self.rate = Number(
            (embedded or Lesson).learning_rate,
            label="Learning rate",
            minimum=1e-6,
            maximum=0.1,
            info="0.0015 did best among emoji, 0.003 among shapes.",
        )

    def _build_buttons(self) -> None:
        self.status = html(progress("No training yet."), elem_id="train-status")
        with gr.Row(elem_classes="apt-buttons"):
            self.start = gr.Button("Train", variant="primary", elem_id="train", min_width=90)
            self.cancel = gr.Button("Stop", variant="stop", interactive=False, elem_id="cancel", min_width=80)
            self.resume = gr.Button("Continue", interactive=False, elem_id="resume", min_width=90)
        help_line(
            "<b>Train</b> goes on in the background: once its steps run, this page may be closed. <b>Stop</b> "
            "keeps the adapter as it is by then, and <b>Continue</b> goes on from there."
        )
        with gr.Column(visible=False) as self.result:
            self.use = gr.Button("Draw with it", variant="primary", elem_id="use-adapter")
            help_line("Chooses it on the page Generate.")
            self.download = html(elem_id="download-adapter")
            with gr.Accordion("Its card", open=False):
                self.card = html(elem_id="own-card", max_height=420)

    def connect(self, page: gr.Blocks, tabs: gr.Tabs, generate_tab: str) -> None:
        """Connects the controls; a training that runs is found again when the page is opened."""
        views = [
            self.status, self.losses, self.samples, self.result, self.card, self.download, self.start, self.cancel,
            self.resume, self.timer, self.shown, self.generate.fields.adapters,
        ]  # fmt: skip
        self.pictures.change(
            told(self.status, (self.seen, ""))(self._on_pictures),
            [self.pictures, self.class_prompt, self.captions],
            [self.seen, self.captions, self.frames, self.status],
            **PICTURES_QUEUE,
        )
        for name, button in self.examples.items():
            outputs = [self.pictures, self.captions, self.name, self.status]
            button.click(told(self.status)(self._example(name)), None, outputs, **AT_ONCE)
        lesson = [
            self.pictures, self.captions, self.name, self.prompt, self.class_prompt, self.steps, self.rate, self.frames
        ]  # fmt: skip
        self.start.click(told(self.status)(self._on_start), lesson, views, concurrency_limit=8, **QUIET)
        self.cancel.click(told(self.status)(self._on_cancel), self.shown, views, **AT_ONCE)
        self.resume.click(told(self.status)(self._on_resume), self.shown, views, **AT_ONCE)
        self.timer.tick(told(self.status)(self._on_tick), self.shown, views, **AT_ONCE)
        page.load(told(self.status)(self._on_tick), self.shown, views, **AT_ONCE)
        self.use.click(
            told(self.status)(self._on_use(tabs, generate_tab)),
            None,
            [tabs, *self.generate.filled, self.status],
            **AT_ONCE,
        )

    def _example(self, name: str) -> Callable[[], dict]:
        def chosen() -> dict:
            embedded = self.studio.painter.embedded
            assert embedded is not None  # only then is there a button
            return {
                self.pictures: [str(file) for file in subject_pictures(embedded, name, examples_folder())],
                self.captions: "\n".join(embedded.subjects[name]),
                self.name: name,
            }

        return chosen

    def _on_pictures(self, files: list[str], class_prompt: Any, captions: Any) -> dict:
        if not files:
            return {self.seen: "", self.frames: "", self.status: gr.skip()}
        paths, sidecars = split_captions(files)
        check_count(len(paths))
        painter = self.studio.painter
        size = min(painter.size, 512)  # the trainer's default
        count = CLASS_PICTURES if text(class_prompt).strip() else 0
        seen = as_trained(paths, size, painter.stride, count)
        line = f"{len(seen)} pictures, cut to {size} × {size} pixels."
        update = {self.seen: frames_html(seen, size) + FRAME_HELP, self.frames: "", self.status: progress(line)}
        if any(sidecars):
            update[self.captions] = "\n".join(sidecars)
        return update

    def _on_start(
        self, files: list[str], captions: Any, name: Any, prompt: Any, class_prompt: Any, steps: Any, rate: Any,
        frames: Any, request: gr.Request,
    ) -> Iterator[dict]:  # fmt: skip
        if not files:
            raise ValueError("Add some pictures of your subject first.")
        self.studio.check_trainable()
        lesson = Lesson(
            text(name, "name"), text(prompt, "prompt"), text(class_prompt, "kind of thing").strip(),
            whole(steps, "number of steps"), real(rate, "learning rate"),
        )  # fmt: skip
        who = who_of(request)
        paths, _ = split_captions(files)  # their captions stand in the field by now
        places = frames_in(text(frames))
        self.studio.trainings.check(who.visitor, lesson, who.address)
        if lesson.class_prompt:
            for drawn in self.studio.draw_class_pictures(who):
                if isinstance(drawn, Waiting):
                    yield {self.status: progress(waiting(drawn.ahead, drawn.seconds))}
                else:
                    said = f"The model draws what it knows: {drawn} of {CLASS_PICTURES} pictures"
                    yield {self.status: progress(said, drawn / CLASS_PICTURES)}
        yield {self.status: progress("Starting …")}
        self.studio.trainings.start(
            who.visitor, paths, lines_of(text(captions, "captions")), lesson, who.address, places
        )
        yield self._view(who.visitor, {})

    def _on_cancel(self, shown: dict, request: gr.Request) -> dict:
        self.studio.trainings.cancel(visitor_of(request))
        return self._view(visitor_of(request), shown)

    def _on_resume(self, shown: dict, request: gr.Request) -> dict:
        self.studio.trainings.resume(visitor_of(request))
        return self._view(visitor_of(request), shown)

    def _on_tick(self, shown: dict, request: gr.Request) -> dict:
        return self._view(visitor_of(request), shown)

    def _view(self, visitor: str, shown: dict) -> dict:
        """What has changed since `shown`."""
        status = self.studio.trainings.status(visitor)
        choices = self.generate.fields.choices(visitor)
        update: dict[Any, Any] = {}
        now: dict[str, Any] = {"choices": choices}
        if "choices" in shown and choices != shown["choices"]:  # at first the page Generate fills it
            update[self.generate.fields.adapters] = gr.Dropdown(choices=choices)
        if status is None:
            return update | {self.shown: now, self.timer: gr.Timer(active=False)}
        now |= {"job": status.name, "state": status.state, "step": status.step, "samples": len(status.samples)}
        update |= {self.status: status_html(status), self.timer: gr.Timer(active=not status.is_over), self.shown: now}
        if (now["job"], now["step"]) != (shown.get("job"), shown.get("step")):
            update[self.losses] = curve("Loss", status.losses, status.lesson.steps)
        if (now["job"], now["samples"]) != (shown.get("job"), shown.get("samples")):
            update[self.samples] = figures(sample_figures(status), SAMPLE_TITLE)
        if (now["job"], now["state"]) != (shown.get("job"), shown.get("state")):
            update |= self._buttons(status) | self._result(visitor, status)
        return update

    def _buttons(self, status: Status) -> dict:
        return {
            self.start: gr.update(interactive=status.is_over),
            self.cancel: gr.update(interactive=status.state in ("starting", "running")),
            self.resume: gr.update(interactive=status.state in ("stopped", "failed")),
        }

    def _result(self, visitor: str, status: Status) -> dict:
        own = {adapter.key: adapter for adapter in self.studio.library.visible(visitor)}
        adapter = own.get(f"own/{status.name}")
        if not status.is_over or adapter is None:
            return {self.result: gr.update(visible=False)}
        link = f'<a class="apt-button" href="{adapter_address(adapter.key)}" download>Download the adapter</a>'
        return {self.result: gr.update(visible=True), self.card: card_html(adapter.card), self.download: link}

    def _on_use(self, tabs: gr.Tabs, generate_tab: str) -> Callable[[gr.Request], dict]:
        def use(request: gr.Request) -> dict:
            visitor = visitor_of(request)
            status = self.studio.trainings.status(visitor)
            adapter = self.studio.library.get(visitor, f"own/{status.name}" if status else "")
            settings = {"adapters": [adapter.key], "weights": [1.0], "prompt": adapter.prompt}
            return self.generate.fill(settings, request) | {tabs: gr.Tabs(selected=generate_tab)}

        return use


def frames_in(said: str) -> list[float | None]:
    """Where the page's frames stand; nothing where none was moved.

    Raises:
        ValueError: for anything but a list of places from 0 to 1.
    """
    try:
        values = json.loads(said or "[]")
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, list) or len(values) > MAX_PICTURES:
        raise ValueError("The frames make no sense: choose the pictures anew.")
    places = [None if value is None else real(value, "place of a frame") for value in values]
    if not all(place is None or 0 <= place <= 1 for place in places):
        raise ValueError("The frames make no sense: choose the pictures anew.")
    return places
