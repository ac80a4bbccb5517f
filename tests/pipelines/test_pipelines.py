"""Every pipeline that people use: image to image, inpainting, SDXL, ControlNet and conversions."""

import contextlib

import numpy as np
import pytest
import torch
from conftest import make_unet, randomize
from support.pipeline_helpers import INPUTS, PICTURE, SMALL, convert, differ, draw, make_controlnet

import apt_diffusion as apt
from apt_diffusion.api import cores_of, hidden_apt


@pytest.fixture(params=INPUTS)
def any_pipe(request, tiny_sd_path, tiny_sdxl_path):
    cls = getattr(apt, request.param)
    pipeline = cls.from_pretrained(tiny_sdxl_path if "XL" in request.param else tiny_sd_path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_adapters_act_scale_save_load_and_leave(any_pipe, tmp_path):
    base = draw(any_pipe)
    apt.add_apt(any_pipe, SMALL)
    assert np.array_equal(draw(any_pipe), base)
    randomize(any_pipe)
    full = draw(any_pipe)
    half = draw(any_pipe, apt_scale=0.5)
    assert differ(full, base) and differ(half, base) and differ(half, full)
    assert np.array_equal(draw(any_pipe, apt_scale=0.0), base)
    parts = {name for name in ("unet", "text_encoder", "text_encoder_2") if name in any_pipe.components}
    assert set(any_pipe.get_list_apt_adapters()) == parts
    for part in parts:
        any_pipe.set_apt_adapters("default", {part: 0.0})
        assert differ(draw(any_pipe), full)
    any_pipe.save_apt_weights(tmp_path)
    any_pipe.unload_apt_weights()
    assert np.array_equal(draw(any_pipe), base) and any_pipe.get_list_apt_adapters() == {}
    any_pipe.load_apt_weights(tmp_path)
    assert np.array_equal(draw(any_pipe), full)


def test_save_pretrained_brings_adapters_back(any_pipe, tmp_path):
    apt.add_apt(any_pipe, SMALL, "style")
    randomize(any_pipe)
    expected = draw(any_pipe)
    any_pipe.save_pretrained(tmp_path)
    again = type(any_pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.get_active_apt_adapters() == ["style"] and np.array_equal(draw(again), expected)


def test_an_adapter_of_one_pipeline_loads_in_the_others(pipe, tiny_sd_path, tmp_path):
    apt.add_apt(pipe, SMALL)
    randomize(pipe)
    pipe.save_apt_weights(tmp_path)
    for name in ("StableDiffusionAPTImg2ImgPipeline", "StableDiffusionAPTInpaintPipeline"):
        converted = convert(getattr(apt, name), pipe)
        loaded = getattr(apt, name).from_pretrained(tiny_sd_path).load_apt_weights(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert converted.get_active_apt_adapters() == ["default"]
        assert np.array_equal(draw(loaded), draw(converted))
        assert differ(draw(loaded), draw(loaded, apt_scale=0.0))
        back = convert(apt.StableDiffusionAPTPipeline, loaded)
        assert np.array_equal(draw(back), draw(pipe))


def test_an_adapter_of_another_base_is_refused(any_pipe, pipe, tiny_sdxl_path, tmp_path):
    """SD's adapter on SDXL and the other way round: one error, nothing changed."""
    xl = apt.StableDiffusionXLAPTPipeline.from_pretrained(tiny_sdxl_path)
    donor = pipe if "XL" in type(any_pipe).__name__ else xl
    apt.add_apt(donor, SMALL)
    donor.save_apt_weights(tmp_path)
    base = draw(any_pipe)
    with pytest.raises(ValueError, match="made for the base model"):
        any_pipe.load_apt_weights(tmp_path)
    assert any_pipe.get_list_apt_adapters() == {} and np.array_equal(draw(any_pipe), base)


def test_controlnet_keeps_adapters_and_gives_them_back(pipe):
    from diffusers import StableDiffusionControlNetPipeline

    apt.add_apt(pipe, SMALL)
    randomize(pipe)
    text_to_image = draw(pipe)
    controlled = convert(StableDiffusionControlNetPipeline, pipe, controlnet=make_controlnet())
    inputs = {"image": PICTURE}
    with_both = draw(controlled, inputs=inputs)
    with apt.disable_apt(controlled):
        with_control = draw(controlled, inputs=inputs)
    assert differ(with_both, with_control) and differ(with_both, text_to_image)
    assert differ(with_both, draw(controlled, inputs=inputs, controlnet_conditioning_scale=0.0))
    back = convert(apt.StableDiffusionAPTPipeline, controlled)
    assert np.array_equal(draw(back), text_to_image)


def test_a_controlnet_is_made_of_an_adapted_unet(pipe):
    from diffusers import ControlNetModel

    apt.add_apt(pipe, SMALL)
    with hidden_apt(pipe.unet):
        controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16, 32))
    assert not list(cores_of(controlnet)) and len(list(cores_of(pipe.unet))) == 8


def test_what_an_adapter_folds_to_goes_where_the_activations_are(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no device "meta"
    unet = make_unet()
    apt.add_apt(unet, SMALL)
    core = next(cores_of(unet))
    states = torch.empty(2, 3, core.hidden_size, device="meta")
    assert core(states, states).device == states.device
    core.adapters_per_sample = ("default", {"default": 0.5})
    assert core(states, states).device == states.device


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(any_pipe, tmp_path, dtype):
    apt.add_apt(any_pipe, SMALL)
    randomize(any_pipe)
    expected = draw(any_pipe, apt_scale=0.2)  # the tiny SDXL's states exceed float16 at full strength
    any_pipe.save_apt_weights(tmp_path)
    any_pipe.unload_apt_weights()
    any_pipe.to(dtype)
    base = draw(any_pipe)
    any_pipe.load_apt_weights(tmp_path)
    assert {p.dtype for core in cores_of(any_pipe) for p in core.parameters()} == {torch.float32}
    picture = draw(any_pipe, apt_scale=0.2)
    assert np.isfinite(picture).all() and np.abs(picture - expected).mean() < 0.1
    assert differ(picture, base) and np.array_equal(draw(any_pipe, apt_scale=0.0), base)
