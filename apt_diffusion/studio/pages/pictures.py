"""The page Pictures: what a visitor has drawn here, to be used again, saved and deleted."""

import gradio as gr

from ..charts import progress
from ..drawings import DAY, PER_VISITOR
from ..figures import Figure, figures, of_drawing
from ..studio import Studio
from ..visitors import visitor_of
from .components import help_line, html, pictures
from .events import AT_ONCE, clicked, told
from .generate import GeneratePage

BOUND = (
    f"The latest {PER_VISITOR.count} pictures are kept, for {PER_VISITOR.seconds // DAY} days, and nobody else sees "
    "them. Each carries its settings: dropped on the page Generate, it fills the controls again."
)


class PicturesPage:
    """Builds the page inside the current tab; settings go to `generate`."""

    def __init__(self, studio: Studio, generate: GeneratePage) -> None:
        self.studio = studio
        self.generate = generate
        self.status = html(progress("What you have drawn here."), elem_id="pictures-status")
        with gr.Row(elem_classes="apt-buttons"):
            html('<a class="apt-button" href="/studio/pictures.zip" download>Download all</a>')
            self.clear = gr.Button("Delete all", variant="stop", elem_id="clear-pictures", min_width=110)
        help_line(BOUND)
        self.shown = pictures("history", small=studio.painter.size <= 256)

    def connect(self, tab: gr.Tab, tabs: gr.Tabs) -> None:
        """Connects the controls; the pictures are read anew whenever their tab is opened."""
        outputs = [self.status, self.shown]
        tab.select(told(self.status)(self._on_open), None, outputs, **AT_ONCE)
        self.clear.click(told(self.status)(self._on_clear), None, outputs, **AT_ONCE)

        def act(event: gr.EventData, request: gr.Request) -> dict:
            action, name = clicked(event)
            visitor = visitor_of(request)
            if action == "delete":
                self.studio.drawings.delete(visitor, name)
                return self._view(visitor, "Deleted.")
            settings = self.studio.drawings.get(visitor, name).settings
            note = progress("These are the settings of the picture; the seed is kept.")
            return self.generate.fill(settings, request) | {
                tabs: gr.Tabs(selected="generate"), self.generate.status: note, self.generate.fields.new_seed: False,
            }  # fmt: skip

        self.shown.click(told(self.status)(act), None, [*outputs, tabs, *self.generate.filled], **AT_ONCE)

    def _view(self, visitor: str, said: str = "") -> dict:
        items = []
        for drawing in self.studio.drawings.of(visitor):
            try:
                settings = drawing.settings
            except ValueError:  # deleted meanwhile
                continue
            part = "" if drawing.part == "adapted" or not settings.get("adapters") else "base model, "
            says = f"{settings['prompt']} ({part}seed {settings['seed']})"
            actions = [("settings", drawing.id, "Use its settings"), ("delete", drawing.id, "Delete")]
            items.append(of_drawing(drawing, says, says, actions))
        line = said or f"{len(items)} pictures." if items else "Nothing is drawn yet."
        return {self.shown: _gallery(items), self.status: progress(line)}

    def _on_open(self, request: gr.Request) -> dict:
        return self._view(visitor_of(request))

    def _on_clear(self, request: gr.Request) -> dict:
        count = self.studio.drawings.clear(visitor_of(request))
        return self._view(visitor_of(request)) | {self.status: progress(f"{count} pictures are deleted.")}


def _gallery(items: list[Figure]) -> str:
    return figures(items, empty="Nothing is drawn yet: the page Generate does that.", columns=4)
