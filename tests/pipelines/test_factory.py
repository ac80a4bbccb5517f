"""`apt_pipeline`: APT on any pipeline class of diffusers, and what diffusers itself then does with such a class."""

import importlib
import json
import pickle

import diffusers
import numpy as np
import pytest
import torch
from conftest import draw, randomize
from support.pipeline_helpers import MASK, PICTURE

import apt_diffusion as apt
from apt_diffusion.pipelines.mixin import APTLoaderMixin

SMALL = apt.APTConfig(num_prompts=6, rank=2)
CONTRACT = [
    "StableDiffusion3APTPipeline", "FluxAPTPipeline", "Flux2APTPipeline", "Flux2KleinAPTPipeline",
    "QwenImageAPTPipeline", "ZImageAPTPipeline", "PixArtSigmaAPTPipeline", "SanaAPTPipeline",
]  # fmt: skip


@pytest.fixture
def adapted(pipe):
    apt.add_apt(pipe, SMALL, "a")
    randomize(pipe)
    return pipe


@pytest.mark.parametrize("name", CONTRACT)
def test_the_transformers_pipelines_are_importable(name):
    cls = getattr(apt, name)
    assert cls.__name__ == name and issubclass(cls, getattr(diffusers, name.replace("APT", "")))
    assert {"prompt", "apt_scale", "apt_adapter_names"} <= set(
        importlib.import_module("inspect").signature(cls.__call__).parameters
    )
    assert pickle.loads(pickle.dumps(cls)) is cls is apt.apt_pipeline(getattr(diffusers, name.replace("APT", "")))


def test_names_stand_between_family_and_task():
    names = {
        "StableDiffusionPipeline": "StableDiffusionAPTPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline": "StableDiffusionXLAPTControlNetImg2ImgPipeline",
        "StableDiffusionPAGPipeline": "StableDiffusionAPTPAGPipeline",
        "StableDiffusionPAGInpaintPipeline": "StableDiffusionAPTPAGInpaintPipeline",
    }
    for stock, name in names.items():
        assert apt.apt_pipeline(getattr(diffusers, stock)).__name__ == name


def test_a_class_of_ones_own(pipe):
    class Mine(diffusers.StableDiffusionPipeline):
        """A user's subclass."""

    cls = apt.apt_pipeline(Mine)
    assert issubclass(cls, Mine) and cls is apt.apt_pipeline(Mine) is apt.apt_pipeline(cls)
    assert json.loads(cls(**pipe.components, requires_safety_checker=False).to_json_string())["_class_name"] == "Mine"
    for wrong in (pipe, torch.nn.Linear, "StableDiffusionPipeline"):
        with pytest.raises(TypeError, match="takes a diffusers pipeline class"):
            apt.apt_pipeline(wrong)


def test_auto_pipelines_know_ours(adapted):
    """`from_pipe` of diffusers' auto classes finds a pipeline by its class name, in tables of its own."""
    expected = draw(adapted)
    img2img = diffusers.AutoPipelineForImage2Image.from_pipe(adapted)
    assert type(img2img) is apt.StableDiffusionAPTImg2ImgPipeline
    inpaint = diffusers.AutoPipelineForInpainting.from_pipe(img2img)
    assert type(inpaint) is apt.StableDiffusionAPTInpaintPipeline
    for other, inputs in ((img2img, {}), (inpaint, {"mask_image": MASK})):
        other.set_progress_bar_config(disable=True)
        pictures = [
            other(
                "a sks glyph", image=PICTURE, num_inference_steps=2, strength=1.0, output_type="np",
                generator=torch.Generator().manual_seed(0), apt_scale=scale, **inputs,
            ).images
            for scale in (1.0, 0.0)
        ]  # fmt: skip
        assert np.abs(pictures[0] - pictures[1]).max() > 1e-3
    back = diffusers.AutoPipelineForText2Image.from_pipe(inpaint)
    back.set_progress_bar_config(disable=True)
    assert type(back) is apt.StableDiffusionAPTPipeline and np.array_equal(draw(back), expected)


def test_auto_pipelines_find_the_families_variants(adapted):
    from support.pipeline_helpers import make_controlnet

    controlled = diffusers.AutoPipelineForText2Image.from_pipe(adapted, controlnet=make_controlnet(adapted.unet))
    assert type(controlled).__name__ == "StableDiffusionAPTControlNetPipeline"
    assert isinstance(controlled, diffusers.StableDiffusionControlNetPipeline)
    assert controlled.get_active_apt_adapters() == ["a"]
    plain = diffusers.AutoPipelineForText2Image.from_pipe(controlled, controlnet=None)
    assert type(plain) is apt.StableDiffusionAPTPipeline


def test_stock_pipelines_are_found_as_before(adapted):
    stock = diffusers.StableDiffusionPipeline(**adapted.components, requires_safety_checker=False)
    _ = adapted.config
    assert type(diffusers.AutoPipelineForImage2Image.from_pipe(stock)) is diffusers.StableDiffusionImg2ImgPipeline


def test_a_saved_folder_opens_with_the_auto_class(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    auto = diffusers.AutoPipelineForText2Image.from_pretrained(tmp_path)
    assert type(auto) is diffusers.StableDiffusionPipeline
    ours = apt.StableDiffusionAPTPipeline.from_pipe(auto).load_apt_weights(tmp_path / "apt_adapters" / "a")
    ours.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(ours), draw(adapted))


def test_a_class_by_hand_is_the_same(pipe):
    """The mixin before the stock class, as in a subclass that was written before the factory."""
    cls = type("ByHand", (APTLoaderMixin, diffusers.StableDiffusionPipeline), {})
    assert json.loads(cls.from_pipe(pipe).to_json_string())["_class_name"] == "StableDiffusionPipeline"
