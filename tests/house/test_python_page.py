"""The page on Python says of mixed batches, classes and settings what holds."""

import re
from pathlib import Path

import apt_diffusion as apt
from apt_diffusion import pipelines

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text()


def test_its_names_exist():
    for name in re.findall(r"from apt_diffusion\.pipelines import (\w+)", PAGE):
        assert getattr(pipelines, name).__name__ == name
    for name in set(re.findall(r"`(apt_\w+|prepared_apt|load_apt_weights|set_apt_adapters)", PAGE)):
        assert name in dir(apt) or name in vars(apt.APTLoaderMixin) or name in ("apt_scale", "apt_adapter_names")


def test_its_config_is_one():
    settings = re.search(r"`(APTConfig\(rank=4.*?\))`", PAGE, re.DOTALL).group(1)
    config = eval(settings, {"APTConfig": apt.APTConfig})
    assert config.at("mid_block.attentions.0.transformer_blocks.0.attn2").rank == 8
    assert config.at("up_blocks.1.attentions.0.transformer_blocks.0.attn2").num_prompts == 100
