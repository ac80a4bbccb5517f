"""What several tests of the text-to-image trainer use."""

import json
import shutil

import pytest


@pytest.fixture
def no_models(monkeypatch):
    """Loading any weights fails the test."""
    from apt_diffusion.training.text_to_image.stable_diffusion import StableDiffusionBase

    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for part in ("unet", "vae", "text_encoder", "pipeline"):
        monkeypatch.setattr(StableDiffusionBase, part, fail)


@pytest.fixture
def altered(tiny_sd_path, tmp_path):
    """Copies the tiny Stable Diffusion and changes settings of one of its parts; `None` takes one away."""

    def copy(part: str, source=tiny_sd_path, replaced=False, **settings):
        folder = tmp_path / f"base-{part}"
        shutil.copytree(source, folder, dirs_exist_ok=True)
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        config = ({} if replaced else json.loads(file.read_text())) | settings
        file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
        return folder

    return copy
