"""The page Understand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..charts import progress
from ..gates import overlay, stretched
from ..samples import CLASS_LABELS, class_pictures, question_pictures
from ..studio import Studio
from ..uploads import check_count, lines_of, open_picture
from ..visitors import visitor_of
from .downloads import examples_folder
from .events import AT_ONCE, help_line, in_turn, told

MAP_HELP = (
    "Bright where the prompts act most, dark where they act least: the gate *w* of each {unit}, the mean over all "
    "adapted attention modules, each divided by its own largest value first."
)
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
                self.question = gr.Textbox(
                    label="Question", info="Short questions, as in “what color is the circle?”", max_length=300,
                    elem_id="question",
                )  # fmt: skip
                self.answerer = gr.Dropdown(
                    [], label="Adapter", elem_id="answerer",
                    info="It brings its model (ViLT or METER) and the answers that it knows.",
                )  # fmt: skip
                self.ask = gr.Button("Ask", variant="primary", elem_id="ask")
                help_line("Answers with the adapter and without, and shows where it acted.")
                self.ask_examples = _examples(self.questions, "ask-examples", columns=4)
            with gr.Column(scale=6, min_width=300):
                self.ask_status = gr.HTML(progress("Choose a picture, and ask."), elem_id="ask-status", padding=False)
                with gr.Row():
                    self.answers = gr.Label(label="With the adapter", elem_id="answers", min_width=240)
                    self.answers_off = gr.Label(
                        label="The same answers, APT switched off", elem_id="answers-off", min_width=240
                    )
                self.ask_map = _map("ask-map")
                gr.Markdown(MAP_HELP.format(unit="patch"), elem_classes="apt-note")
                self._teach_your_own(OWN_ANSWERS)

    def _build_classify(self) -> None:
        with gr.Row(elem_classes="apt-columns"):
            with gr.Column(scale=4, min_width=300):
                self.class_picture = _upload("class-picture")
                self.labels = gr.Textbox(
                    "\n".join(CLASS_LABELS), label="Labels", lines=4, elem_id="labels",
                    info="What it may show, one per line.",
                )  # fmt: skip
                self.namer = gr.Dropdown(
                    [], label="Adapter (optional)", elem_id="namer",
                    info="It brings its CLIP. With one, the answers without it stand beside its own.",
                )  # fmt: skip
                with gr.Accordion("Examples of each label (few-shot, optional)", open=False):
                    self.shots = gr.File(
                        label="Example pictures", file_count="multiple", file_types=["image"], height=120,
                        elem_id="shots",
                    )  # fmt: skip
                    help_line("At least one of each label, or none at all.")
                    self.shot_labels = gr.Textbox(
                        label="What they show", lines=4, elem_id="shot-labels",
                        info="One label per line, in the order of the files. The picture is then compared with the "
                        "mean of each label's examples, not with its name.",
                    )  # fmt: skip
                self.classify = gr.Button("Classify", variant="primary", elem_id="classify")
                help_line("Says how probable each label is, with the adapter and without.")
                shown = [(file, f"picture {i}") for i, file in enumerate(self.class_pictures, start=1)]
                self.class_examples = _examples(shown, "class-examples", columns=3)
            with gr.Column(scale=6, min_width=300):
                self.class_status = gr.HTML(progress("Choose a picture."), elem_id="class-status", padding=False)
                with gr.Row():
                    self.classes = gr.Label(label="Base model", elem_id="classes", min_width=240)
                    self.classes_with = gr.Label(
                        label="With the adapter", elem_id="classes-with", min_width=240, visible=False
                    )
                self.class_map = _map("class-map", visible=False)
                self._teach_your_own(OWN_CLASSES)

    def _build_watch(self) -> None:
        with gr.Row(elem_classes="apt-columns"):
            with gr.Column(scale=4, min_width=300):
                self.watch_prompt = gr.Textbox(
                    label="Prompt", info="What to draw.", lines=2, max_length=1000, elem_id="watch-prompt"
                )
                self.watched = gr.Dropdown(
                    [], label="Adapter", elem_id="watched", info="Trained on the page Train, or from the folder."
                )
                self.watch_seed = gr.Number(
                    0, label="Seed", precision=0, minimum=0, info="Of the noise to start from."
                )
                self.watch = gr.Button("Draw and watch", variant="primary", elem_id="watch")
                help_line("Draws one picture, and shows where the adapter acted on its latents in each step.")
            with gr.Column(scale=6, min_width=300):
                self.watch_status = gr.HTML(progress("Choose an adapter."), elem_id="watch-status", padding=False)
                self.watch_maps = gr.Gallery(
                    label="The picture, and where the adapter acts in each step", columns=4, format="png",
                    height="auto", elem_id="watch-maps", elem_classes="apt-pictures apt-small", object_fit="contain",
                    buttons=["download", "fullscreen"],
                )  # fmt: skip
                gr.Markdown(MAP_HELP.format(unit="position of the latents"), elem_classes="apt-note")

    def _teach_your_own(self, text: str) -> None:
        with gr.Accordion("How to train such an adapter", open=False):
            gr.Markdown(text.format(folder=self.studio.library.folder.name), elem_classes="apt-card")

    def connect(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """Connects what visitors do with what the page shows."""
        lists = [self.answerer, self.namer, self.watched, self.ask_status]
        page.load(told(self.ask_status)(self._on_load), None, lists, **AT_ONCE)
        tab.select(told(self.ask_status)(self._on_select), None, lists, **AT_ONCE)
        self.ask_examples.select(self._on_ask_example, None, [self.ask_picture, self.question], **AT_ONCE)
        self.class_examples.select(self._on_class_example, None, self.class_picture, **AT_ONCE)
        self.watched.change(told(self.watch_status)(self._on_watched), self.watched, self.watch_prompt, **AT_ONCE)
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

    def _on_ask_example(self, event: gr.SelectData) -> tuple[str, str]:
        file, question = self.questions[event.index]
        return str(file), question

    def _on_class_example(self, event: gr.SelectData) -> str:
        return str(self.class_pictures[event.index])

    def _on_watched(self, key: str | None, request: gr.Request) -> dict:
        adapter = self.studio.library.get(visitor_of(request), key) if key else None
        return {self.watch_prompt: adapter.prompt if adapter else ""}

    def _on_ask(self, path: str | None, question: str, key: str | None, request: gr.Request) -> dict:
        if not key:
            raise ValueError("Choose an adapter first: it knows the answers.")
        visitor = visitor_of(request)
        adapter = next(
            (a for kind in KIND_NAMES for a in self.studio.library.visible(visitor, kind) if a.key == key), None
        )
        if adapter is None:
            raise ValueError("This adapter is not there any more: choose another one.")
        reading = self.studio.reader.ask(_picture(path), question or "", adapter)
        best = most_probable(reading.with_adapter or {})
        return {
            self.answers: reading.with_adapter, self.answers_off: reading.without, self.ask_map: reading.gates,
            self.ask_status: progress(f"The answer: {best}."),
        }  # fmt: skip

    def _on_classify(
        self, path: str | None, labels: str, key: str | None, shots: list[str] | None, shot_labels: str,
        request: gr.Request,
    ) -> dict:  # fmt: skip
        adapter = self.studio.library.get(visitor_of(request), key, "clip") if key else None
        reading = self.studio.reader.classify(
            _picture(path), lines_of(labels), _shots(shots or [], lines_of(shot_labels)), adapter
        )
        said = reading.with_adapter or reading.without
        how = "by the examples" if shots else "by their names"
        return {
            self.classes: reading.without, self.class_map: gr.Image(reading.gates, visible=adapter is not None),
            self.classes_with: gr.Label(reading.with_adapter, visible=adapter is not None),
            self.class_status: progress(f"Compared {how}: {most_probable(said)}."),
        }  # fmt: skip

    def _on_watch(self, prompt: str, key: str | None, seed: float, request: gr.Request) -> Iterator[dict]:
        painter = self.studio.painter
        order = self.studio.order(
            visitor_of(request), [key] if key else [], [1.0], prompt=prompt or "", steps=painter.default_steps,
            guidance=painter.default_guidance, width=painter.size, height=painter.size, seed=int(seed or 0),
        )  # fmt: skip
        for step in painter.watch(order):
            update: dict[Any, Any] = {
                self.watch_status: progress(f"Step {step.step} of {step.steps}", step.step / step.steps)
            }
            if step.maps is not None:
                picture, maps = step.pictures[0], stretched(step.maps)
                shown = [(picture, "the picture"), (overlay(picture, maps.mean(0).numpy()), "mean of all steps")]
                shown += [(overlay(picture, m.numpy()), f"step {i}") for i, m in enumerate(maps, start=1)]
                update = {self.watch_maps: shown, self.watch_status: progress(f"Done: {len(step.maps)} steps.")}
            yield update


def _upload(elem_id: str) -> gr.Image:
    image = gr.Image(
        label="Picture", type="filepath", sources=["upload", "clipboard"], height=260, elem_id=elem_id,
        elem_classes="apt-small",
    )  # fmt: skip
    # Gradio would decode the upload before `open_picture` has looked at it: a decompression bomb, for one.
    image.preprocess = lambda payload: payload.path if payload else None
    help_line("Drop it, choose a file, or paste it; or take one of the examples below.")
    return image


def _examples(pictures: list[tuple[Path, str]], elem_id: str, columns: int) -> gr.Gallery:
    """Pictures to choose, as buttons that have a name."""
    return gr.Gallery(
        [(str(file), caption) for file, caption in pictures], label="Examples to try", columns=columns, format="png",
        allow_preview=False, interactive=False, height="auto", buttons=[], elem_id=elem_id,
        elem_classes="apt-pictures apt-small", object_fit="contain",
    )  # fmt: skip


def _map(elem_id: str, visible: bool = True) -> gr.Image:
    return gr.Image(
        label="Where the adapter acts", interactive=False, format="png", height=280, elem_id=elem_id,
        elem_classes="apt-small", buttons=["download", "fullscreen"], visible=visible,
    )  # fmt: skip


def most_probable(probabilities: dict[str, float]) -> str:
    """The label with the largest probability."""
    return max(probabilities, key=lambda label: probabilities[label])


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
