"""The page Understand."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..charts import progress
from ..figures import figures, of_image
from ..gates import overlay, stretched
from ..generation import Waiting
from ..order import names, text, whole
from ..samples import CLASS_LABELS, class_pictures, question_pictures
from ..studio import Studio
from ..understanding import Reading
from ..uploads import check_count, lines_of, open_picture
from ..visitors import visitor_of, who_of
from ..words import duration, waiting
from .components import Dropdown, Files, Number, Picture, Textbox, help_line, html, pictures
from .downloads import examples_folder
from .events import AT_ONCE, clicked, in_turn, told
from .understand_views import ASK_HELP, CLASS_HELP, MAP_HELP, map_html, scores_html, steps_html

OWN_ANSWERS = """For the embedded ViLT, in a checkout of apt-diffusion:

    python -m apt_diffusion.miniature.tasks vqa --output_dir data/vqa
    accelerate launch train/train_apt_vqa.py --model_name_or_path miniature-vilt --data_dir data/vqa \\
        --output_dir {folder}/answers --max_train_steps 200 --learning_rate 2e-3 --init identity \\
        --hidden_dropout_prob 0 --no-augment

Then load this page again. `miniature-meter`, and real ViLT and METER, work the same way."""
OWN_CLASSES = """For the embedded CLIP, in a checkout of apt-diffusion:

    python -m apt_diffusion.miniature.tasks classification --output_dir data/classes
    accelerate launch train/train_apt_clip.py --model_name_or_path miniature-clip --data_dir data/classes \\
        --output_dir {folder}/classes --protocol few_shot --optimizer adamw --learning_rate 1e-3 \\
        --train_batch_size 16 --max_train_steps 200 --no-augment

Then load this page again. A real CLIP works the same way."""
KIND_NAMES = {"vilt": "ViLT", "meter": "METER"}


class UnderstandPage:
    """Builds the page inside the current tab."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.questions = question_pictures(examples_folder())
        self.class_pictures = class_pictures(examples_folder())
        with gr.Tabs():
            with gr.Tab("Ask"):
                self._build_ask()
            with gr.Tab("Classify"):
                self._build_classify()
            with gr.Tab("Watch it draw"):
                self._build_watch()

    def _build_ask(self) -> None:
        with gr.Row(elem_classes="apt-columns"):
            with gr.Column(scale=4, min_width=300):
                self.ask_picture = _upload("ask-picture")
                self.question = Textbox(
                    label="Question", info="Short questions, as in “what color is the circle?”", max_length=300,
                    elem_id="question",
                )  # fmt: skip
                self.answerer = Dropdown(
                    [], label="Adapter", elem_id="answerer",
                    info="It brings its model (ViLT or METER) and the answers that it knows.",
                )  # fmt: skip
                self.ask = gr.Button("Ask", variant="primary", elem_id="ask")
                help_line("Answers with the adapter and without, and shows where it acted.")
                self.ask_examples = _examples(self.questions, "ask-examples", columns=4)
            with gr.Column(scale=6, min_width=300):
                self.ask_status = html(progress("Choose a picture, and ask."), elem_id="ask-status")
                with gr.Row():
                    self.answers = html(elem_id="answers", min_width=240)
                    self.answers_off = html(elem_id="answers-off", min_width=240)
                html(ASK_HELP)
                self.ask_map = html(elem_id="ask-map", elem_classes="apt-small")
                html(MAP_HELP.format(unit="patch"))
                self._teach_your_own(OWN_ANSWERS)

    def _build_classify(self) -> None:
        with gr.Row(elem_classes="apt-columns"):
            with gr.Column(scale=4, min_width=300):
                self.class_picture = _upload("class-picture")
                self.labels = Textbox(
                    "\n".join(CLASS_LABELS), label="Labels", lines=4, elem_id="labels",
                    info="What it may show, one per line.",
                )  # fmt: skip
                self.namer = Dropdown(
                    [], label="Adapter (optional)", elem_id="namer",
                    info="It brings its CLIP. With one, the answers without it stand beside its own.",
                )  # fmt: skip
                with gr.Accordion("Examples of each label (few-shot, optional)", open=False):
                    self.shots = Files(
                        label="Example pictures", file_count="multiple", file_types=["image"], height=120,
                        elem_id="shots",
                    )  # fmt: skip
                    help_line("At least one of each label, or none at all.")
                    self.shot_labels = Textbox(
                        label="What they show", lines=4, elem_id="shot-labels",
                        info="One label per line, in the order of the files. The picture is then compared with the "
                        "mean of each label's examples, not with its name.",
                    )  # fmt: skip
                self.classify = gr.Button("Classify", variant="primary", elem_id="classify")
                help_line("Says how probable each label is, with the adapter and without.")
                shown = [(file, f"picture {i}") for i, file in enumerate(self.class_pictures, start=1)]
                self.class_examples = _examples(shown, "class-examples", columns=3)
            with gr.Column(scale=6, min_width=300):
                self.class_status = html(progress("Choose a picture."), elem_id="class-status")
                with gr.Row():
                    self.classes = html(elem_id="classes", min_width=240)
                    self.classes_with = html(elem_id="classes-with", min_width=240, visible=False)
                html(CLASS_HELP)
                self.class_map = html(elem_id="class-map", elem_classes="apt-small", visible=False)
                self._teach_your_own(OWN_CLASSES)

    def _build_watch(self) -> None:
        with gr.Row(elem_classes="apt-columns"):
            with gr.Column(scale=4, min_width=300):
                self.watch_prompt = Textbox(
                    label="Prompt", info="What to draw.", lines=2, max_length=1000, elem_id="watch-prompt"
                )
                self.watched = Dropdown(
                    [], label="Adapter", elem_id="watched", info="Trained on the page Train, or from the folder."
                )
                self.watch_seed = Number(0, label="Seed", precision=0, minimum=0, info="Of the noise to start from.")
                self.watch = gr.Button("Draw and watch", variant="primary", elem_id="watch")
                help_line("Draws one picture, and shows where the adapter acted on its latents in each step.")
            with gr.Column(scale=6, min_width=300):
                self.watch_status = html(progress("Choose an adapter."), elem_id="watch-status")
                self.watch_maps = html(elem_id="watch-maps", elem_classes="apt-small")
                html(MAP_HELP.format(unit="position of the latents"))

    def _teach_your_own(self, text: str) -> None:
        with gr.Accordion("How to train such an adapter", open=False):
            gr.Markdown(text.format(folder=self.studio.library.folder.name), elem_classes="apt-card")

    def connect(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """Connects the controls; the lists of adapters are read anew whenever the tab is opened."""
        lists = [self.answerer, self.namer, self.watched, self.ask_status]
        page.load(told(self.ask_status)(self._on_load), None, lists, **AT_ONCE)
        tab.select(told(self.ask_status)(self._on_select), None, lists, **AT_ONCE)
        on_ask, on_class = told(self.ask_status)(self._on_ask_example), told(self.class_status)(self._on_class_example)
        self.ask_examples.click(on_ask, None, [self.ask_picture, self.question, self.ask_status], **AT_ONCE)
        self.class_examples.click(on_class, None, [self.class_picture, self.class_status], **AT_ONCE)
        outputs = [self.watch_prompt, self.watch_status]
        self.watched.change(told(self.watch_status)(self._on_watched), self.watched, outputs, **AT_ONCE)
        in_turn(
            [self.ask.click, self.question.submit], self._on_ask, [self.ask_picture, self.question, self.answerer],
            self.ask_status, [self.ask_status, self.answers, self.answers_off, self.ask_map],
        )  # fmt: skip
        in_turn(
            [self.classify.click], self._on_classify,
            [self.class_picture, self.labels, self.namer, self.shots, self.shot_labels],
            self.class_status, [self.class_status, self.classes, self.classes_with, self.class_map],
        )  # fmt: skip
        in_turn(
            [self.watch.click], self._on_watch, [self.watch_prompt, self.watched, self.watch_seed],
            self.watch_status, [self.watch_status, self.watch_maps],
        )  # fmt: skip

    def _choices(self, visitor: str) -> dict[gr.Dropdown, list[tuple[str, str]]]:
        library = self.studio.library
        answerers = [
            (f"{adapter.label}, for {KIND_NAMES[adapter.kind]}", adapter.key)
            for kind in KIND_NAMES
            for adapter in library.visible(visitor, kind)
            if "answers" in adapter.metadata
        ]
        namers = [*((a.label, a.key) for a in library.visible(visitor, "clip")), ("No adapter", "")]
        drawers = [(a.label, a.key) for a in library.visible(visitor)]
        return {self.answerer: answerers, self.namer: namers, self.watched: drawers}

    def _on_load(self, request: gr.Request) -> dict:
        return {
            menu: gr.Dropdown(choices=entries, value=entries[0][1] if entries else None)
            for menu, entries in self._choices(visitor_of(request)).items()
        }

    def _on_select(self, request: gr.Request) -> dict:
        """What was trained meanwhile; what is chosen stays chosen."""
        return {menu: gr.Dropdown(choices=entries) for menu, entries in self._choices(visitor_of(request)).items()}

    def _on_ask_example(self, event: gr.EventData) -> dict:
        file, question = self.questions[_index(event, len(self.questions))]
        return {self.ask_picture: str(file), self.question: question}

    def _on_class_example(self, event: gr.EventData) -> dict:
        return {self.class_picture: str(self.class_pictures[_index(event, len(self.class_pictures))])}

    def _on_watched(self, key: Any, request: gr.Request) -> dict:
        adapter = self.studio.library.get(visitor_of(request), text(key)) if key else None
        return {self.watch_prompt: adapter.prompt if adapter else ""}

    def _on_ask(self, path: str | None, question: Any, key: Any, request: gr.Request) -> dict:
        if not key:
            raise ValueError("Choose an adapter first: it knows the answers.")
        who = who_of(request)
        adapter = self.studio.library.find(who.visitor, text(key))
        reading = self.studio.reader.ask(_picture(path), text(question), adapter, who)
        with_adapter = reading.with_adapter or {}
        best = max(with_adapter, key=with_adapter.__getitem__)
        return {
            self.answers: scores_html("With the adapter", with_adapter),
            self.answers_off: scores_html("The same answers, APT switched off", reading.without),
            self.ask_map: _map(reading),
            self.ask_status: progress(f"The answer: {best}."),
        }

    def _on_classify(
        self, path: str | None, labels: Any, key: Any, shots: list[str], shot_labels: Any, request: gr.Request
    ) -> dict:
        who = who_of(request)
        adapter = self.studio.library.get(who.visitor, text(key), "clip") if key else None
        reading = self.studio.reader.classify(
            _picture(path), lines_of(text(labels)), _shots(shots, lines_of(text(shot_labels))), adapter, who
        )
        said = reading.with_adapter or reading.without
        how = "by the examples" if shots else "by their names"
        is_adapted = adapter is not None
        return {
            self.classes: scores_html("Base model", reading.without),
            self.class_map: gr.update(value=_map(reading), visible=is_adapted),
            self.classes_with: gr.update(
                value=scores_html("With the adapter", reading.with_adapter or {}), visible=is_adapted
            ),
            self.class_status: progress(f"Compared {how}: {max(said, key=said.__getitem__)}."),
        }

    def _on_watch(self, prompt: Any, key: Any, seed: Any, request: gr.Request) -> Iterator[dict]:
        painter, who = self.studio.painter, who_of(request)
        order = self.studio.order(
            who.visitor, names(key or None), [1.0], prompt=text(prompt, "prompt"), steps=painter.default_steps,
            guidance=painter.default_guidance, width=painter.size, height=painter.size, seed=whole(seed, "seed"),
        )  # fmt: skip
        for step in painter.watch(order, who):
            if isinstance(step, Waiting):
                yield {self.watch_status: progress(waiting(step.ahead, step.seconds))}
                continue
            left = self.studio.turns.seconds_for(order.cost * (1 - step.step / step.steps))
            tail = "" if left is None or left < 3 else f", {duration(left)} left"
            update: dict[Any, Any] = {
                self.watch_status: progress(f"Step {step.step} of {step.steps}{tail}", step.step / step.steps)
            }
            if step.maps is not None:
                picture, maps = step.pictures[0], stretched(step.maps)
                overlays = [overlay(picture, values.numpy()) for values in (maps.mean(0), *maps)]
                update = {
                    self.watch_maps: steps_html(picture, overlays),
                    self.watch_status: progress(f"Done: {len(step.maps)} steps."),
                }
            yield update


def _index(event: gr.EventData, count: int) -> int:
    _, name = clicked(event)
    if not name.isdecimal() or not 0 <= int(name) < count:
        raise ValueError("This example is not there any more: reload the page.")
    return int(name)


def _map(reading: Reading) -> str:
    return map_html(reading.gates) if reading.gates is not None else ""


def _upload(elem_id: str) -> Picture:
    image = Picture(
        label="Picture", type="filepath", sources=["upload", "clipboard"], height=240, elem_id=elem_id,
        elem_classes="apt-small",
    )  # fmt: skip
    help_line("Drop it, choose a file, or paste it; or take one of the examples below.")
    return image


def _examples(files: list[tuple[Path, str]], elem_id: str, columns: int) -> gr.HTML:
    """Pictures to choose, as buttons that have a name."""
    items = []
    for number, (file, caption) in enumerate(files):
        with Image.open(file) as picture:
            shown = of_image(picture.convert("RGB"), f"example {number + 1}: {caption}", caption, lossless=True)
        items.append(dataclasses.replace(shown, pick=("example", str(number))))
    return pictures(elem_id, figures(items, "Examples to try", columns=columns), small=True)


def _picture(path: str | None) -> Image.Image:
    if not path:
        raise ValueError("Choose a picture first.")
    return open_picture(path)


def _shots(paths: list[str], labels: list[str]) -> list[tuple[Image.Image, str]]:
    if len(paths) != len(labels):
        raise ValueError(f"There are {len(paths)} example pictures and {len(labels)} labels for them.")
    if paths:
        check_count(len(paths))
    return [(open_picture(path), label) for path, label in zip(paths, labels, strict=True)]
