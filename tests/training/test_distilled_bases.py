"""Distilled bases: what tells them, how samples are drawn, and the guidance that a consistency model's UNet takes."""

import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from support.training_helpers import header, losses, train

from apt_diffusion.training.text_to_image.sampling import guidance_embedding, sampling_of

TRAILING = {"timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("name", "scheduler", "steps", "guidance"),
    [
        ("someone/model", LCMScheduler(), 4, 1),
        ("someone/model", TCDScheduler(), 4, 1),
        ("stabilityai/sd-turbo", EulerDiscreteScheduler(**TRAILING), 4, 1),
        ("stabilityai/sdxl-turbo", EulerAncestralDiscreteScheduler(**TRAILING), 4, 1),
        ("dreamshaperXL_lightningDPMSDE.safetensors", EulerDiscreteScheduler(**TRAILING), 4, 1),
        ("stabilityai/stable-diffusion-3.5-large-turbo", FlowMatchEulerDiscreteScheduler(), 8, 1),
        (
            "/models/Hyper-SD15",
            DDIMScheduler(**TRAILING),
            25,
            7.5,
        ),  # the scheduler is an ordinary one: said, not guessed
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", DDIMScheduler(), 25, 7.5),
        ("someone/trailing", EulerDiscreteScheduler(**TRAILING), 25, 7.5),
        ("turbo/hyperrealism", EulerDiscreteScheduler(**TRAILING), 25, 7.5),
        ("someone/HyperRealism", EulerDiscreteScheduler(**TRAILING), 25, 7.5),
        ("someone/Hyper_Realistic_v2", EulerDiscreteScheduler(**TRAILING), 25, 7.5),
    ],
)
def test_steps_and_guidance_follow_from_scheduler_and_name(name, scheduler, steps, guidance):
    found = sampling_of(name, scheduler)
    assert (found.steps, found.guidance) == (steps, guidance)
    is_named = any(word in name.lower().split("/")[-1] for word in ("turbo", "lightning", "hyper-"))
    assert (found.distilled is not None) == (is_named or scheduler.__class__ in (LCMScheduler, TCDScheduler))


def test_samples_of_an_lcm_base_are_drawn_in_few_steps_unless_the_user_says_otherwise(
    altered, instance_dir, tmp_path, caplog
):
    model = altered("scheduler", replaced=True, _class_name="LCMScheduler")
    out = train(model, instance_dir, tmp_path / "own", num_validation_images=1)
    settings = json.loads(header(out)["training"])
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (4, 1.0)
    notes = [record.message for record in caplog.records if "distilled (LCMScheduler)" in record.message]
    assert len(notes) == 1 and "4 steps and a guidance of 1." in notes[0] and "Long training undoes" in notes[0]
    out = train(model, instance_dir, tmp_path / "given", num_inference_steps=2, guidance_scale=1.5)
    settings = json.loads(header(out)["training"])
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (2, 1.5)


def test_an_ordinary_base_has_the_usual_settings(go, caplog):
    settings = json.loads(header(go())["training"])
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (25, 7.5)
    assert "distilled" not in caplog.text


@pytest.mark.parametrize("width", [16, 17])
def test_the_guidance_is_embedded_as_by_diffusers(pipe, width):
    expected = StableDiffusionPipeline.get_guidance_scale_embedding(pipe, torch.tensor([6.5, 6.5]), width)
    torch.testing.assert_close(guidance_embedding(7.5, width, torch.zeros(2, 3)), expected)


def test_the_unet_of_a_consistency_model_is_trained_at_the_guidance_of_the_samples(
    altered, instance_dir, tmp_path, monkeypatch
):
    model = altered("scheduler", replaced=True, _class_name="LCMScheduler")
    config = UNet2DConditionModel.load_config(model / "unet")
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config | {"time_cond_proj_dim": 16}).save_pretrained(model / "unet")
    seen = []
    forward = UNet2DConditionModel.forward

    def watched(self, *args, **kwargs):
        if kwargs.get("timestep_cond") is not None and torch.is_grad_enabled():
            seen.append(kwargs["timestep_cond"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    first = train(model, instance_dir, tmp_path / "own")
    assert all(torch.equal(one, guidance_embedding(8.0, 16, one)) for one in seen) and len(seen) == 2
    other = train(model, instance_dir, tmp_path / "given", guidance_scale=2.0)
    assert losses(first) != losses(other)
