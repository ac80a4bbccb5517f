"""The page Adapters: lists the adapters with their owners, and what an owner may do with each."""

from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from ..cards import card_html
from ..charts import escape, progress
from ..figures import adapter_address
from ..library import Adapter
from ..order import text
from ..studio import MAX_ADAPTER_BYTES, Studio
from ..visitors import visitor_of, who_of
from .components import Files, Textbox, help_line, html, pictures
from .events import AT_ONCE, MODEL_QUEUE, clicked, told
from .generate import GeneratePage

KINDS = {
    "stable_diffusion": "draws",
    "vilt": "answers (ViLT)",
    "meter": "answers (METER)",
    "clip": "classifies (CLIP)",
}


class AdaptersPage:
    """Builds the page inside the current tab; what is chosen goes to `generate`."""

    def __init__(self, studio: Studio, generate: GeneratePage) -> None:
        self.studio = studio
        self.generate = generate
        self.status = html(progress("All adapters that you can use here."), elem_id="adapters-status")
        self.cards = pictures("adapter-cards", small=studio.painter.size <= 256)
        with gr.Row(elem_classes="apt-columns"):
            with gr.Column(min_width=300):
                self.file = Files(
                    label="Add an adapter file", file_types=[".safetensors"], file_count="single", height=120,
                    elem_id="adapter-file",
                )  # fmt: skip
                help_line(
                    f"A .safetensors file of at most {MAX_ADAPTER_BYTES // 2**20} MB. It is tried on the model first, "
                    "and is only yours."
                )
            with gr.Column(min_width=300):
                self.new_name = Textbox(
                    label="New name", max_length=40, elem_id="new-name",
                    info="For the button Rename of one of your adapters.",
                )  # fmt: skip

    def connect(self, page: gr.Blocks, tab: gr.Tab, tabs: gr.Tabs) -> None:
        """Connects the controls; the list is read anew whenever its tab is opened."""
        outputs = [self.status, self.cards, self.generate.fields.adapters]
        tab.select(told(self.status)(self._on_open), None, outputs, **AT_ONCE)
        self.file.upload(told(self.status)(self._on_upload), self.file, [*outputs, self.file], **MODEL_QUEUE)
        chosen = [*outputs, tabs, *self.generate.filled]
        act = told(self.status)(self._on_action(tabs))
        self.cards.click(act, [self.new_name, self.generate.fields.adapters], chosen, **AT_ONCE)

    def view(self, visitor: str, said: str = "") -> dict:
        """The cards and the list of the page Generate as they are now."""
        adapters = [a for kind in KINDS for a in self.studio.library.visible(visitor, kind)]
        cards = "".join(self._card(adapter, visitor) for adapter in adapters)
        update: dict[Any, Any] = {
            self.cards: f'<div class="apt-cards">{cards}</div>',
            self.generate.fields.adapters: gr.Dropdown(choices=self.generate.fields.choices(visitor)),
        }
        return update | ({self.status: progress(said)} if said else {})

    def _on_open(self, request: gr.Request) -> dict:
        return self.view(visitor_of(request))

    def _on_upload(self, files: list[str], request: gr.Request) -> dict:
        if not files:
            raise ValueError("Choose a file first.")
        added = self.studio.add_adapter(visitor_of(request), Path(files[0]), who_of(request))
        return self.view(visitor_of(request), f"Added as {added.name}.") | {self.file: None}

    def _on_action(self, tabs: gr.Tabs) -> Any:
        def act(new_name: Any, chosen: Any, event: gr.EventData, request: gr.Request) -> dict:
            visitor, library = visitor_of(request), self.studio.library
            action, key = clicked(event)
            if action == "use":
                adapter = library.get(visitor, key)
                keys = [k for k in chosen or [] if k != key and isinstance(k, str)]
                settings = {"adapters": [*keys[:3], key], "weights": [1.0] * (len(keys[:3]) + 1)}
                settings |= {"prompt": adapter.prompt} if adapter.prompt else {}
                filled = self.generate.fill(settings, request)
                note = progress(f"{adapter.name} is chosen, and its words stand in the prompt.")
                return filled | {tabs: gr.Tabs(selected="generate"), self.generate.status: note}
            if action == "publish":
                said = (
                    f"Published: {library.publish(visitor, key).name}. Everybody who uses this studio can see it now."
                )
            elif action == "unpublish":
                library.unpublish(visitor, key)
                said = "Taken back: others do not see it any more."
            elif action == "rename":
                said = f"Its name is {library.rename(visitor, key, text(new_name)).name} now."
            elif action == "delete":
                library.delete(visitor, key)
                said = "Deleted."
            else:
                raise ValueError("This button is not there any more: reload the page.")
            return self.view(visitor, said)

        return act

    def _card(self, adapter: Adapter, visitor: str) -> str:
        name = escape(adapter.name)
        mine = adapter.published_by(visitor)
        whose = " (published by you)" if mine else adapter.label.removeprefix(adapter.name)
        samples = "".join(
            f'<img src="/studio/samples/{quote(adapter.key)}/{quote(file.name)}" loading="lazy" '
            f'alt="What {name} has drawn: {number}">'
            for number, file in enumerate(adapter.samples[:2], start=1)
        )
        trigger = f"<p>Its words: <q>{escape(adapter.prompt)}</q></p>" if adapter.prompt else ""
        buttons = [("use", "Use it")] if adapter.kind == "stable_diffusion" else []
        if adapter.is_own:
            buttons += [("publish", "Publish"), ("rename", "Rename"), ("delete", "Delete")]
        if mine:
            buttons.append(("unpublish", "Take back"))
        tools = "".join(
            f'<button type="button" data-action="{action}" data-id="{escape(adapter.key)}" '
            f'aria-label="{label}: {name}">{label}</button>'
            for action, label in buttons
        )
        return (
            f'<article class="apt-adapter" aria-label="{name}"><h3>{name}<small>{escape(whose)}</small></h3>'
            f'<p>{KINDS[adapter.kind]}</p>{trigger}<div class="apt-samples">{samples}</div>'
            f'<div class="apt-tools"><a href="{adapter_address(adapter.key)}" download '
            f'aria-label="Download {name}">Download</a>{tools}</div>'
            f"<details><summary>About {name}</summary>{card_html(adapter.card)}</details></article>"
        )
