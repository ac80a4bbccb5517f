"""The studio with either embedded Stable Diffusion."""

import pytest

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
    text = str(build_site(studio).get_config_file())
    for words in (
        "the embedded model of emoji",
        "example-teddy bear",
        "a large noto fox on a striped green background",
    ):
        assert words in text
    assert Painter("miniature").embedded is EMBEDDED["miniature"]
