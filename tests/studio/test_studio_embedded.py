"""The studio with either embedded Stable Diffusion."""

import pytest
import torch

from apt_diffusion.studio.embedded import EMBEDDED
from apt_diffusion.studio.generation import Painter
from apt_diffusion.studio.samples import subject_pictures


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_subject_has_as_many_pictures_as_captions(name, tmp_path):
    embedded = EMBEDDED[name]
    for subject, captions in embedded.subjects.items():
        pictures = subject_pictures(embedded, subject, tmp_path)
        assert len(pictures) == len(captions) == 5
        assert [file.with_suffix(".txt").read_text().strip() for file in pictures] == list(captions)
        assert all(embedded.instance_prompt.removeprefix("a ") in caption for caption in captions)
        assert subject_pictures(embedded, subject, tmp_path) == pictures  # the second visitor's


def test_emoji_are_drawn_as_suits_their_model_and_pages_offer_them(tmp_path):
    pytest.importorskip("gradio")
    from pathlib import Path

    from apt_diffusion.studio.pages.site import build_site
    from apt_diffusion.studio.studio import Studio

    studio = Studio("miniature-emoji", tmp_path, Path("train/train_apt_sd.py"))
    assert (studio.painter.default_steps, studio.painter.default_guidance) == (15, 3.0)
    config = build_site(studio).get_config_file()
    for words in (
        "the embedded model of emoji",
        "example-teddy bear",
        "a large noto fox on a striped green background",
    ):
        assert words in str(config)
    assert Painter("miniature").embedded is EMBEDDED["miniature"]
    fields = {part["props"].get("label"): part["props"].get("value") for part in config["components"]}
    assert (fields["Training steps"], fields["Learning rate"]) == (150, 1.5e-3)  # of the comparison in docs/emoji.md


def test_a_transformer_draws_from_noise_and_from_a_picture_and_says_what_it_cannot(tmp_path):
    import numpy as np
    from diffusers import StableDiffusion3Pipeline
    from PIL import Image

    from apt_diffusion.miniature import resolve_model
    from apt_diffusion.studio.generation import Progress
    from apt_diffusion.studio.order import Order

    painter = Painter("miniature-sd3")
    settings = {"prompt": "a red circle on a blue background", "steps": 3, "guidance": 3.0, "seed": 5}
    size = {"width": painter.size, "height": painter.size}

    def draw(**changes):
        steps = painter.draw(Order(**settings, **size, **changes))
        return next(np.asarray(s.pictures[0]) for s in steps if isinstance(s, Progress) and s.done)

    stock = StableDiffusion3Pipeline.from_pretrained(resolve_model("miniature-sd3"), dtype=torch.float32)
    generator = [torch.Generator().manual_seed(5)]
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "generator": generator}
    expected = stock(settings["prompt"], **call, **size).images[0]
    assert np.array_equal(draw(), np.asarray(expected))
    assert not np.array_equal(draw(picture=Image.new("RGB", (64, 64), "white")), np.asarray(expected))
    assert painter.samplers == ["Euler", "Heun"]
    with pytest.raises(ValueError, match="for models with a UNet"):
        draw(blocks=(("up", 0.5),))


def test_all_models_of_a_studio_share_its_queue_and_its_limits(tmp_path):
    pytest.importorskip("gradio")
    from pathlib import Path

    from apt_diffusion.studio.limits import Limits
    from apt_diffusion.studio.studio import Studio

    studio = Studio("miniature", tmp_path, Path("train/train_apt_sd.py"), Limits(queue=3))
    assert studio.painter.turns is studio.turns is studio.reader.turns and studio.turns.places == 3


@pytest.mark.slow
def test_the_three_trained_emoji_adapters_draw_what_they_are_called(tmp_path):
    from apt_diffusion import StableDiffusionAPTPipeline
    from apt_diffusion.miniature.emoji.judge import load_judge
    from apt_diffusion.miniature.emoji.subjects import TEST_PROMPTS, folder_of, judge_pictures, read_pictures
    from apt_diffusion.miniature.grade import draw
    from apt_diffusion.studio.library import Library

    pipeline = StableDiffusionAPTPipeline.from_pretrained("miniature-emoji")
    pipeline.set_progress_bar_config(disable=True)
    prompts, judge = TEST_PROMPTS[:2], load_judge()
    base = draw(pipeline, list(prompts))
    shown = {adapter.name: adapter for adapter in Library(tmp_path, "miniature-emoji").visible("0" * 32)}
    assert set(shown) == {"teddy-bear", "robot", "castle"}
    for name in ("teddy bear", "robot", "castle"):
        pipeline.load_apt_weights(shown[name.replace(" ", "-")].load(), adapter_name=name.replace(" ", "-"))
        pictures = draw(pipeline, list(prompts))
        pipeline.unload_apt_weights()
        taught = read_pictures(folder_of(name))
        assert judge_pictures(judge, pictures, base, name, taught, prompts).recognised == {"ground": 1.0}
