"""New words in the studio: uploaded with their adapter, drawn with, published and downloaded."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.new_words import save_with_words
from support.studio_helpers import ANNA, SCRIPT

from apt_diffusion.io.files import read_adapter_file
from apt_diffusion.studio.generation import NOBODY, Progress
from apt_diffusion.studio.studio import Studio
from apt_diffusion.words import words_of

SETTINGS = {"prompt": "a <sks> glyph", "steps": 3, "guidance": 3.0, "width": 16, "height": 16, "seed": 5}


@pytest.fixture
def studio(tiny_sd_path, tmp_path):
    return Studio(str(tiny_sd_path), tmp_path / "adapters", SCRIPT)


def drawn(studio, keys: list[str]) -> np.ndarray:
    order = studio.order(ANNA, keys, [0.8] * len(keys), **SETTINGS)
    steps = list(studio.painter.draw(order, with_base=False))
    return np.asarray(next(step.pictures[0] for step in steps if isinstance(step, Progress) and step.done))


def test_an_adapter_with_words_is_as_good_as_any(studio, pipe, tmp_path):
    file = save_with_words(pipe, tmp_path / "mine.safetensors", ["<sks>"], 1)
    added = studio.add_adapter(ANNA, file, NOBODY)
    pipe.load_apt_weights(file, "mine")
    pipe.set_apt_adapters("mine", 0.8)
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "width": 16, "height": 16}
    expected = pipe(SETTINGS["prompt"], generator=torch.Generator().manual_seed(5), **settings).images[0]
    assert np.array_equal(drawn(studio, [added.key]), np.asarray(expected))
    assert words_of(studio.painter.pipe.text_encoder) is None  # the next visitor finds the base model
    plain = drawn(studio, [])
    published = studio.library.publish(ANNA, added.key)
    assert np.array_equal(drawn(studio, [published.key]), np.asarray(expected))
    assert np.array_equal(drawn(studio, []), plain)
    (tmp_path / "again.safetensors").write_bytes(published.as_download())
    again, before = (read_adapter_file(one, with_words=True) for one in (tmp_path / "again.safetensors", file))
    assert again.words == ["<sks>"] and torch.equal(again.word_rows["text_encoder"], before.word_rows["text_encoder"])
    with safe_open(tmp_path / "again.safetensors", framework="pt") as content:
        assert json.loads(content.metadata()["apt_words"]) == ["<sks>"]


def test_two_adapters_with_one_word_are_not_mixed(studio, pipe, tmp_path):
    keys = []
    for seed, name in enumerate(("first", "second")):
        file = save_with_words(pipe, tmp_path / f"{name}.safetensors", ["<sks>"], seed)
        keys.append(studio.add_adapter(ANNA, file, NOBODY).key)
    with pytest.raises(ValueError, match="Two of the adapters have the word '<sks>': ask for one"):
        drawn(studio, keys)
    assert drawn(studio, keys[:1]).shape == (16, 16, 3)
    assert studio.painter.pipe.get_list_apt_adapters() == {}
