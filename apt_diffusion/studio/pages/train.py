"""The page Train."""

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from PIL import Image

from ..charts import curve, problem, progress
from ..framing import as_trained
from ..samples import subject_pictures
from ..studio import Studio
from ..training import CLASS_PICTURES, Lesson, Status
from ..uploads import MAX_BYTES, MAX_PICTURES, check_count, lines_of
from ..visitors import visitor_of
from .downloads import examples_folder, offer
from .events import AT_ONCE, help_line, told
from .generate import GeneratePage

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
        painter = studio.painter
        embedded = painter.embedded
        most = studio.trainings.max_steps
        with gr.Row(elem_classes="apt-columns"):
            with gr.Column(scale=4, min_width=300):
                self.pictures = gr.File(
                    label="Pictures of your subject", file_count="multiple", file_types=["image"], height=150,
                    elem_id="pictures",
                )  # fmt: skip
                help_line(
                    f"From 3 to 10 are best; at most {MAX_PICTURES}, of {MAX_BYTES // 2**20} MB each. Several can be "
                    "dropped, or chosen, at once."
                )
                with gr.Row(visible=embedded is not None, elem_classes="apt-examples"):
                    help_line("No pictures at hand? Take five of a", "apt-inline")
                    self.examples = {
                        name: gr.Button(name, size="sm", min_width=70, elem_id=f"example-{name}")
                        for name in (embedded.subjects if embedded else ())
                    }
                self.name = gr.Textbox(
                    "my subject", label="Name of the adapter", info="By which you find it again.", max_length=60,
                    elem_id="adapter-name",
                )  # fmt: skip
                self.prompt = gr.Textbox(
                    embedded.instance_prompt if embedded else "a photo of sks dog",
                    label="What shall stand for your subject", info=PROMPT_HELP, max_length=200,
                    elem_id="instance-prompt",
                )  # fmt: skip
                self.captions = gr.Textbox(
                    label="Captions (optional, but they help much)", info=CAPTIONS_HELP, lines=4, elem_id="captions"
                )
                self.class_prompt = gr.Textbox(
                    embedded.class_prompt if embedded else "", label="Kind of thing (optional)", max_length=200,
                    info="The phrase without the rare word, such as “a dog”. The model then draws "
                    f"{CLASS_PICTURES} pictures of what it knows and trains on them, too, so that other dogs do not "
                    "turn into yours. Leave it empty to save that time.",
                )  # fmt: skip
                self.steps = gr.Slider(
                    1, most, min(embedded.train_steps if embedded else 400, most), step=1, label="Training steps",
                    elem_id="train-steps",
                    info=f"With fewer than 100 little is learnt; at most {most} here.",
                )  # fmt: skip
                self.rate = gr.Number(
                    3e-3, label="Learning rate", minimum=1e-6, maximum=0.1, info="0.003 did best in our measurements."
                )
                with gr.Row():
                    self.start = gr.Button("Train", variant="primary", elem_id="train", min_width=100)
                    self.cancel = gr.Button("Stop", variant="stop", interactive=False, elem_id="cancel")
                    self.resume = gr.Button("Continue", interactive=False, elem_id="resume", min_width=100)
                help_line(
                    "<b>Train</b> starts in the background: this page may be closed. <b>Stop</b> keeps the adapter as "
                    "it is by then, and <b>Continue</b> goes on from there."
                )
            with gr.Column(scale=6, min_width=300):
                self.status = gr.HTML(progress("No training yet."), elem_id="train-status", padding=False)
                with gr.Column(visible=False) as self.result:
                    with gr.Row():
                        self.use = gr.Button("Draw with it", variant="primary", elem_id="use-adapter")
                        self.download = gr.DownloadButton("Download the adapter", elem_id="download-adapter")
                    help_line("Chooses it on the page Generate, or saves its file on your computer.")
                    with gr.Accordion("Its card", open=False):
                        self.card = gr.Markdown(elem_id="own-card", elem_classes="apt-card", max_height=420)
                classes = "apt-pictures apt-small" if painter.size <= 256 else "apt-pictures"
                self.seen = gr.Gallery(
                    label="Your pictures as the trainer will see them", columns=6, format="png", height="auto",
                    elem_id="seen", elem_classes=classes, buttons=["fullscreen"], object_fit="contain",
                )  # fmt: skip
                self.losses = gr.HTML(curve("Loss", [], 1), elem_id="losses", padding=False)
                self.samples = gr.Gallery(
                    label="Samples during the training, the newest first", columns=2, format="png", height="auto",
                    elem_id="samples", elem_classes="apt-pictures apt-wide", buttons=["download", "fullscreen"],
                    object_fit="contain",
                )  # fmt: skip
        # What the browser has on show: polls send only what is new.
        self.shown = gr.State({})
        self.timer = gr.Timer(POLL_SECONDS, active=False)

    def connect(self, page: gr.Blocks, tabs: gr.Tabs, generate_tab: str) -> None:
        """Connects what visitors do with what the page shows."""
        views = [
            self.status, self.losses, self.samples, self.result, self.card, self.download, self.start, self.cancel,
            self.resume, self.timer, self.shown, self.generate.adapters,
        ]  # fmt: skip
        self.pictures.change(
            told(self.status, (self.seen, None))(self._on_pictures), [self.pictures, self.class_prompt],
            [self.seen, self.status], show_progress="minimal", api_visibility="private",
        )  # fmt: skip
        for name, button in self.examples.items():
            button.click(self._example(name), None, [self.pictures, self.captions, self.name], **AT_ONCE)
        lesson = [
            self.pictures, self.captions, self.name, self.prompt, self.class_prompt, self.steps, self.rate, self.shown
        ]  # fmt: skip
        not_queued = {"concurrency_limit": 4, "show_progress": "hidden", "api_visibility": "private"}
        self.start.click(told(self.status)(self._on_start), lesson, views, **not_queued)
        self.cancel.click(told(self.status)(self._on_cancel), self.shown, views, **AT_ONCE)
        self.resume.click(told(self.status)(self._on_resume), self.shown, views, **AT_ONCE)
        self.timer.tick(told(self.status)(self._on_tick), self.shown, views, **AT_ONCE)
        page.load(told(self.status)(self._on_tick), self.shown, views, **AT_ONCE)
        self.use.click(
            told(self.status)(self._on_use(tabs, generate_tab)),
            None,
            [tabs, self.generate.adapters, self.status],
            **AT_ONCE,
        )

    def _example(self, name: str) -> Callable[[], dict]:
        def pictures() -> dict:
            embedded = self.studio.painter.embedded
            assert embedded is not None  # only then is there a button
            return {
                self.pictures: [str(file) for file in subject_pictures(embedded, name, examples_folder())],
                self.captions: "\n".join(embedded.subjects[name]),
                self.name: name,
            }

        return pictures

    def _on_pictures(self, files: list[str] | None, class_prompt: str) -> dict:
        if not files:
            return {self.seen: None, self.status: gr.skip()}
        check_count(len(files))
        painter = self.studio.painter
        size = min(painter.size, 512)  # the trainer's default
        count = CLASS_PICTURES if class_prompt.strip() else 0
        cuts = as_trained(files, size, painter.stride, count)
        text = f"{len(cuts)} pictures, cut to {size} × {size} pixels."
        return {self.seen: [(cut, str(i)) for i, cut in enumerate(cuts, start=1)], self.status: progress(text)}

    def _on_start(
        self, files: list[str] | None, captions: str, name: str, prompt: str, class_prompt: str, steps: float,
        rate: float, shown: dict, request: gr.Request,
    ) -> Iterator[dict]:  # fmt: skip
        if not files:
            raise ValueError("Add some pictures of your subject first.")
        lesson = Lesson(name, prompt, class_prompt.strip(), int(steps), float(rate or 0))
        visitor = visitor_of(request)
        # The first time, an embedded model draws its class pictures now.
        yield {self.status: progress("Starting; the model may first draw what it knows …")}
        self.studio.trainings.start(visitor, files, lines_of(captions), lesson)
        yield self._view(visitor, {})

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
        choices = self.generate.choices(visitor)
        update: dict[Any, Any] = {}
        now: dict[str, Any] = {"choices": choices}
        if choices != shown.get("choices"):
            update[self.generate.adapters] = gr.Dropdown(choices=choices)
        if status is None:
            return update | {self.shown: now, self.timer: gr.Timer(active=False)}
        now |= {"job": status.name, "state": status.state, "step": status.step, "samples": len(status.samples)}
        update |= {self.status: self._words(status), self.timer: gr.Timer(active=not status.is_over), self.shown: now}
        if (now["job"], now["step"]) != (shown.get("job"), shown.get("step")):
            update[self.losses] = curve("Loss", status.losses, status.lesson.steps)
        if (now["job"], now["samples"]) != (shown.get("job"), shown.get("samples")):
            update[self.samples] = [Image.open(path) for path in reversed(status.samples)]
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
        return {
            self.result: gr.update(visible=True), self.card: adapter.card,
            self.download: gr.update(value=offer(adapter)),
        }  # fmt: skip

    def _on_use(self, tabs: gr.Tabs, generate_tab: str) -> Callable[[gr.Request], dict]:
        def use(request: gr.Request) -> dict:
            visitor = visitor_of(request)
            status = self.studio.trainings.status(visitor)
            key = f"own/{status.name}" if status else ""
            self.studio.library.get(visitor, key)
            return {
                tabs: gr.Tabs(selected=generate_tab),
                self.generate.adapters: gr.Dropdown(choices=self.generate.choices(visitor), value=[key]),
            }

        return use

    @staticmethod
    def _words(status: Status) -> str:
        lesson = status.lesson
        share = status.step / lesson.steps
        match status.state:
            case "starting":
                return progress("Loading the model …", share)
            case "running" if status.step >= lesson.steps:
                return progress("Saving, and drawing the last samples …", share)
            case "running":
                left = "" if status.seconds_left is None else f", {_duration(status.seconds_left)} left"
                return progress(f"Step {status.step} of {lesson.steps}{left}", share)
            case "stopping":
                return progress("Stopping after this step …", share)
            case "stopped":
                kept = f"The adapter of step {status.step} is kept" if status.step else "Nothing was learnt yet"
                return progress(f"Stopped. {kept}; “Continue” goes on from there.", share)
            case "finished":
                return progress(f"Finished: {status.name} can be used on the page Generate.", 1)
        return problem(f"The training failed: {status.problem}")


def _duration(seconds: float) -> str:
    if seconds < 10:
        return "a few seconds"
    if seconds < 90:
        return f"about {round(seconds)} seconds"
    return f"about {round(seconds / 60)} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"
