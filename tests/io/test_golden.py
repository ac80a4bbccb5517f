"""Files that were written by former versions and are in the world: the studio's embedded examples."""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import apt_diffusion as apt
from apt_diffusion.io.files import read_adapter_file
from apt_diffusion.studio import library

EXAMPLES = Path(library.__file__).with_name("examples")
FILES = sorted(EXAMPLES.rglob("*.safetensors"))


@functools.cache
def pipeline_of(base_model):
    return apt.StableDiffusionAPTPipeline.from_pretrained(base_model)


def header(file):
    with safe_open(file, "pt") as content:
        return content.metadata()


def test_there_are_examples():
    assert len(FILES) >= 3


@pytest.mark.parametrize("file", [f for f in FILES if "unet" in header(f)["apt_config"]], ids=lambda f: f.parent.name)
def test_an_example_of_pictures_loads_and_is_written_again(file, tmp_path):
    miniature = pipeline_of(header(file)["base_model"])
    configs = json.loads(header(file)["apt_config"])
    stored = load_file(file)
    miniature.load_apt_weights(file, "golden")
    try:
        assert set(miniature.get_list_apt_adapters()) == set(configs)
        again = read_adapter_file(miniature.save_apt_weights(tmp_path, "golden"))
        assert again.tensors.keys() == stored.keys()
        assert all(torch.equal(again.tensors[key], tensor) for key, tensor in stored.items())
        for part, values in configs.items():
            kept = again.configs[part].to_dict()
            assert {key: kept[key] for key in values} == values
    finally:
        miniature.unload_apt_weights()


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.parent.name}/{f.parent.name}")
def test_every_example_is_read(file):
    adapter = read_adapter_file(file)
    assert adapter.tensors.keys() == load_file(file).keys()
    assert adapter.configs == {
        part: apt.APTConfig.from_dict(v) for part, v in json.loads(header(file)["apt_config"]).items()
    }
    modules = {key.rsplit(".", 1)[0] for key in adapter.tensors if ".apt" in key}
    places = {part: sum(name.startswith(f"{part}.") for name in modules) for part in adapter.configs if part}
    assert adapter.places in ({}, places)  # the oldest files do not say how many modules they adapt
