"""All pages as one site, and how it is served."""

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from ..studio import Studio
from ..uploads import MAX_BYTES
from ..visitors import VisitorCookie
from .cost import CostPage
from .generate import GeneratePage
from .style import CSS, theme
from .train import TrainPage
from .understand import UnderstandPage

HEADER = """<h1>APT studio</h1>
<p>Teach a model a subject, watch it learn, compare, download. {model}</p>"""
CACHE_SECONDS = (600, 6 * 3600)  # how often Gradio's copies of pictures are looked at, and how old they may get


def build_site(studio: Studio, queue_size: int = 32) -> gr.Blocks:
    """The pages. Whatever uses the model waits in one queue of `queue_size` places."""
    name = studio.painter.model
    if studio.painter.is_miniature:
        model = "the embedded miniature model"
    else:
        model = Path(name).name if Path(name).is_dir() else name  # where it lies is nobody's business
    with gr.Blocks(title="APT studio", analytics_enabled=False, delete_cache=CACHE_SECONDS) as site:
        gr.HTML(HEADER.format(model=f"Base model: {escape(model)}."), elem_classes="apt-header")
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                generate = GeneratePage(studio)
            with gr.Tab("Train", id="train"):
                train = TrainPage(studio, generate)
            with gr.Tab("Understand", id="understand") as understand_tab:
                understand = UnderstandPage(studio)
            with gr.Tab("Cost", id="cost"):
                cost = CostPage()
        generate.connect(site)
        train.connect(site, tabs, "generate")
        understand.connect(site, understand_tab)
        cost.connect(site)
    return site.queue(max_size=queue_size, default_concurrency_limit=4)


def serve(site: gr.Blocks, **settings: Any) -> Any:
    """Starts the server. Nothing is served but the pages and Gradio's own copies of what they show."""
    return site.launch(
        theme=theme(),
        css=CSS,
        max_file_size=MAX_BYTES,
        footer_links=[],
        run_history=False,  # on a shared computer the next person would see it
        ssr_mode=False,
        show_error=True,
        enable_monitoring=False,
        app_kwargs={"middleware": [Middleware(VisitorCookie)]},
        **settings,
    )
