"""Assembles all pages of the studio into one Gradio app."""

import gradio as gr

from ..charts import escape
from ..studio import Studio
from .adapters import AdaptersPage
from .api import Api
from .components import html
from .cost import CostPage
from .generate import GeneratePage
from .pictures import PicturesPage
from .train import TrainPage
from .understand import UnderstandPage

HEADER = """<h1>APT studio</h1>
<p>Teach an image model a new subject from a few pictures, watch it learn, and compare what it draws. {model}</p>"""
DELETE_CACHE = (600, 6 * 3600)  # how often Gradio looks at uploads, and how old they may get


def build_site(studio: Studio) -> gr.Blocks:
    """The pages. Who uses the model waits in the studio's queue, not in Gradio's."""
    with gr.Blocks(title="APT studio", analytics_enabled=False, delete_cache=DELETE_CACHE) as site:
        model = f"Base model: {escape(studio.model_name)}."
        html(HEADER.format(model=model), elem_classes="apt-header")
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                generate = GeneratePage(studio)
            with gr.Tab("Train", id="train"):
                train = TrainPage(studio, generate)
            with gr.Tab("Adapters", id="adapters") as adapters_tab:
                adapters = AdaptersPage(studio, generate)
            with gr.Tab("Pictures", id="pictures") as pictures_tab:
                pictures = PicturesPage(studio, generate)
            with gr.Tab("Understand", id="understand") as understand_tab:
                understand = UnderstandPage(studio)
            with gr.Tab("Cost", id="cost"):
                cost = CostPage()
        generate.connect(site)
        train.connect(site, tabs, "generate")
        adapters.connect(site, adapters_tab, tabs)
        pictures.connect(pictures_tab, tabs)
        understand.connect(site, understand_tab)
        cost.connect(site)
        Api(studio)
    return site.queue(max_size=None, default_concurrency_limit=8)
