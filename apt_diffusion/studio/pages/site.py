"""All pages as one site, and how it is served."""

import contextlib
import io
import logging
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from ..doors import Doors
from ..studio import Studio
from ..uploads import MAX_BYTES
from ..visitors import VisitorCookie
from .cost import CostPage
from .generate import GeneratePage
from .style import CSS, theme
from .train import TrainPage
from .understand import UnderstandPage

logger = logging.getLogger(__name__)

HEADER = """<h1>APT studio</h1>
<p>Teach a model a subject, watch it learn, compare, download. {model}</p>"""
CACHE_SECONDS = (600, 6 * 3600)  # how often Gradio's copies of pictures are looked at, and how old they may get


def build_site(studio: Studio, queue_size: int = 32) -> gr.Blocks:
    """The pages. Whatever uses the model waits in one queue of `queue_size` places."""
    name = studio.painter.model
    if studio.painter.embedded:
        model = studio.painter.embedded.title
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


def serve(site: gr.Blocks, share: bool = False, **settings: Any) -> None:
    """Serves until it is interrupted. Nothing is served but the pages and Gradio's own copies of what they show.

    Args:
        site: of `build_site`.
        share: through a tunnel of gradio.live, too; where there is none, a sentence says so, and it goes on without.
        settings: more of Gradio's `launch`.

    Raises:
        OSError: where the address cannot be had.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # advertisements, and many lines where there is no tunnel
        _, address, public = _launch(site, share=share, **settings)
    print(f"The studio is open at {address} (Ctrl-C ends it).", flush=True)
    if public:
        print(f"For a week everybody who has this link can use it: {public}", flush=True)
    elif share:
        logger.error(
            "There is no public link: gradio.live cannot be reached, or its tunnel program cannot be downloaded. "
            "The studio goes on without."
        )
    site.block_thread()


def _launch(site: gr.Blocks, **settings: Any) -> tuple[Any, str, str | None]:
    return site.launch(
        theme=theme(),
        css=CSS,
        max_file_size=MAX_BYTES,
        footer_links=[],
        run_history=False,  # on a shared computer the next person would see it
        ssr_mode=False,
        show_error=True,
        enable_monitoring=False,
        prevent_thread_lock=True,
        quiet=True,
        app_kwargs={"middleware": [Middleware(VisitorCookie), Middleware(Doors, get_upload_folder())]},
        **settings,
    )
