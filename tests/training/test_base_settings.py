"""A base model is trained as its own settings say, or refused: noise schedules, latents, parts of other classes."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from PIL import Image
from support.training_helpers import assert_same_adapter, losses, tensors, train

from apt_diffusion.training.text_to_image.bases import open_base
from apt_diffusion.training.text_to_image.latents import LatentSpace
from apt_diffusion.training.text_to_image.objectives import make_objective

# Noise schedules


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, HeunDiscreteScheduler, LCMScheduler])
def test_what_a_scheduler_does_not_say_is_its_own_classs_default(altered, scheduler_class):
    """DDPM's defaults are other betas than these classes have."""
    base = open_base(str(altered("scheduler", replaced=True, _class_name=scheduler_class.__name__)))
    objective = make_objective(base.scheduler())
    expected = scheduler_class().alphas_cumprod
    assert torch.allclose(objective.signal.double() ** 2, expected.double(), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "scheduler is FlowMatchHeunDiscreteScheduler"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "scheduler is ScoreSdeVeScheduler"),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}, "'flow_prediction'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "DPMSolverMultistepScheduler"),
        ({"_class_name": "TheirOwnScheduler"}, "TheirOwnScheduler, which diffusers does not have"),
        ({"_class_name": "DiffusionPipeline"}, "DiffusionPipeline, which diffusers does not have"),
        (
            {"_class_name": "DDIMScheduler", "prediction_type": "epsilon", "rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr with prediction type epsilon, but the last timestep is noise only",
        ),
        (
            {
                "_class_name": "EulerDiscreteScheduler",
                "prediction_type": "v_prediction",
                "timestep_type": "continuous",
            },
            "timestep_type 'continuous'",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "has invert_sigmas"),
    ],
)
def test_other_kinds_of_models_are_refused_before_weights_load(
    altered, instance_dir, tmp_path, no_models, settings, message
):
    model = altered("scheduler", replaced=True, **settings)
    with pytest.raises(ValueError, match="scheduler") as error:
        train(model, instance_dir, tmp_path / "out")
    assert message in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, LCMScheduler])
def test_velocity_with_zero_terminal_snr_in_closed_form(scheduler_class):
    """Lin et al. (arXiv 2305.08891, algorithm 1) in numpy: √ᾱ is shifted to end at 0 and scaled to start as before."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    scheduler = scheduler_class(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    objective = make_objective(scheduler)
    latents, noise = np.random.default_rng(0).standard_normal((2, 4, 4, 8, 8))
    timesteps = np.array([0, 250, 998, 999])
    a = root[timesteps].reshape(-1, 1, 1, 1)
    s = np.sqrt(1 - a**2)
    x, n, t = torch.tensor(latents).float(), torch.tensor(noise).float(), torch.tensor(timesteps)
    near = 1.2e-3 if scheduler_class is EulerDiscreteScheduler else 1e-4  # Euler's keeps √ᾱ at 2^-12
    inputs, times = objective.model_inputs(x, n, t)
    assert times.tolist() == timesteps.tolist()
    assert np.allclose(inputs, a * latents + s * noise, atol=near)
    assert np.allclose(objective.target(x, n, t), a * noise - s * latents, atol=near)
    assert np.allclose(inputs[-1], noise[-1], atol=near)  # no signal at all: the model must predict -x from the text
    assert np.allclose(objective.target(x, n, t)[-1], -latents[-1], atol=near)
    drawn = {objective.draw_timestep(np.random.default_rng(seed)) for seed in range(5000)}
    assert 999 in drawn


@pytest.mark.parametrize("scheduler_class", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_is_that_of_diffusers(scheduler_class, prediction_type):
    """A model that predicts the target exactly denoises exactly, by diffusers' own preconditioning."""
    scheduler = scheduler_class(prediction_type=prediction_type, sigma_data=0.7)
    objective = make_objective(scheduler)
    assert objective.num_timesteps == len(scheduler.sigmas) - 1
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 4, 4, 8, 8)
    timesteps = torch.tensor([0, 1, 500, 999])
    sigmas = scheduler.sigmas[:-1].flip(0)[timesteps]
    assert (sigmas[0].item(), sigmas[-1].item()) == pytest.approx((0.002, 80), rel=1e-2)
    inputs, times = objective.model_inputs(latents, noise, timesteps)
    target = objective.target(latents, noise, timesteps)
    for row, sigma in enumerate(sigmas):
        noisy = latents[row] + sigma * noise[row]
        torch.testing.assert_close(inputs[row], scheduler.precondition_inputs(noisy, sigma))
        torch.testing.assert_close(times[row], scheduler.precondition_noise(sigma))
        found = scheduler.precondition_outputs(noisy, target[row], sigma)
        torch.testing.assert_close(found, latents[row], rtol=1e-3, atol=1e-3)
    draws = [objective.draw_timestep(np.random.default_rng(seed)) for seed in range(200)]
    assert min(draws) < 50 and max(draws) > 950 and len(set(draws)) > 150


@pytest.mark.slow
def test_an_edm_base_trains_and_draws(altered, instance_dir, tmp_path):
    model = altered("scheduler", replaced=True, _class_name="EDMEulerScheduler", sigma_data=0.5)
    out = train(
        model, instance_dir, tmp_path / "out", max_train_steps=40, train_batch_size=4, learning_rate=2e-2,
        num_validation_images=1, num_inference_steps=2,
    )  # fmt: skip
    assert np.mean(losses(out)[-10:]) < np.mean(losses(out)[:10]) - 0.01
    assert (out / "samples" / "step-000040.png").is_file()


def test_min_snr_is_refused_where_it_means_nothing(altered, instance_dir, tmp_path, no_models):
    model = altered("scheduler", replaced=True, _class_name="EDMEulerScheduler")
    with pytest.raises(ValueError, match="--snr_gamma: EDMEulerScheduler has its own weighting"):
        train(model, instance_dir, tmp_path / "out", snr_gamma=5.0)


def test_a_prediction_type_is_never_guessed():
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler"):
        make_objective(FlowMatchHeunDiscreteScheduler())
    with pytest.raises(ValueError, match="'flow_prediction'"):
        make_objective(DPMSolverMultistepScheduler(prediction_type="flow_prediction"))


# Latents

SHIFTED = {"latents_mean": [0.5, -0.5, 1.0, 0.0], "latents_std": [2.0, 0.5, 1.0, 4.0]}


def test_the_map_to_the_denoisers_latents_is_that_of_diffusers():
    torch.manual_seed(0)
    mean, std = torch.randn(2, 2, 4, 3, 3)
    std = std.abs()
    plain = {"latent_channels": 4, "scaling_factor": 0.2}
    shift = LatentSpace(plain | {"shift_factor": 0.3})
    assert torch.allclose(
        shift.from_vae(mean, std), torch.stack([(mean - 0.3) * 0.2, std * 0.2], 1)
    )  # SD 3's pipeline
    both = LatentSpace(plain | SHIFTED)
    own_mean, own_std = (torch.tensor(SHIFTED[name]).view(4, 1, 1) for name in ("latents_mean", "latents_std"))
    expected = torch.stack([(mean - own_mean) * 0.2 / own_std, std * 0.2 / own_std], 1)  # SDXL's pipeline
    assert torch.allclose(both.from_vae(mean, std), expected)
    for space in (shift, both, LatentSpace(plain)):
        assert torch.allclose(space.to_vae(space.from_vae(mean, std)[:, 0]), mean, atol=1e-6)


def test_training_sees_the_shift_with_and_without_a_cache(altered, instance_dir, tmp_path):
    flags = {"max_train_steps": 3}
    plain = train(altered("vae"), instance_dir, tmp_path / "plain", **flags)
    model = altered("vae", shift_factor=2.0)
    shifted = train(model, instance_dir, tmp_path / "shifted", **flags)
    anew = train(model, instance_dir, tmp_path / "anew", **flags, **{"no-cache_latents": True})
    assert_same_adapter(shifted, anew, tolerance=2e-4)
    assert any(not torch.allclose(tensors(plain)[key], value) for key, value in tensors(shifted).items())


def test_latents_of_sdxl_are_its_pipelines(altered, tiny_sdxl_path):
    """Its pipeline applies mean and standard deviation itself."""
    base = open_base(str(altered("vae", tiny_sdxl_path, **SHIFTED)))
    assert not base.unapplied
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = base.vae()
    latents = base.latent_distribution(vae, pixels)[:, 0]
    own = (vae.encode(pixels).latent_dist.mean - torch.tensor(SHIFTED["latents_mean"]).view(1, 4, 1, 1)) * (
        vae.config.scaling_factor / torch.tensor(SHIFTED["latents_std"]).view(1, 4, 1, 1)
    )
    torch.testing.assert_close(latents, own)


@pytest.mark.parametrize("image_to_image", [False, True])
def test_samples_undo_a_shift_that_the_pipeline_ignores(altered, tiny_sd_path, tmp_path, caplog, image_to_image):
    """A VAE that shifts is, for the denoiser, the plain one whose convolutions next to the latents hold the shift."""
    shifted = open_base(str(altered("vae", shift_factor=2.0)))
    assert shifted.unapplied == ["shift_factor"] and "StableDiffusionAPTPipeline ignores it" in caplog.text
    plain = open_base(str(tiny_sd_path))
    assert not plain.unapplied
    folded = plain.vae()
    with torch.no_grad():
        folded.post_quant_conv.bias += 2.0 * folded.post_quant_conv.weight.sum((1, 2, 3))
        folded.quant_conv.bias[:4] -= 2.0  # of the means; the rest are variances
    folded.save_pretrained(tmp_path / "folded")
    reference = open_base(str(tiny_sd_path), vae=str(tmp_path / "folded"))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    states = {"prompt_embeds": torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(0))}
    found, expected, other = (
        base.draw(
            base.denoiser(torch.float32), (states, states), [3], 32,
            [Image.fromarray(pixels)] if image_to_image else None, num_inference_steps=4, guidance_scale=1.0,
        )[0]
        for base in (shifted, reference, plain)
    )  # fmt: skip
    assert np.abs(np.subtract(found, expected, dtype=int)).max() <= 1
    assert np.abs(np.subtract(found, other, dtype=int)).max() > 5


# Parts of other classes


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("vae", {"_class_name": "AutoencoderTiny"}, "has a AutoencoderTiny where this trainer needs a AutoencoderKL"),
        ("unet", {"_class_name": "UNetMotionModel"}, "has a UNetMotionModel"),
        ("text_encoder", {"model_type": "xlm-roberta"}, "text_encoder of .* is a 'xlm-roberta' model"),
    ],
)
def test_parts_of_other_classes_are_not_read_with_these_defaults(
    altered, instance_dir, tmp_path, no_models, part, settings, message
):
    with pytest.raises(ValueError, match=message):
        train(altered(part, **settings), instance_dir, tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("unet", {"addition_embed_type": "image"}, "UNet with further inputs .addition_embed_type 'image'"),
        ("unet", {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type 'text_proj'"),
        ("unet", {"num_class_embeds": 10}, "takes class labels: give --class_labels_conditioning timesteps"),
        ("unet", {"cross_attention_dim": 64}, "its UNet takes texts of width 64, its text encoders give 32"),
        ("text_encoder", {"vocab_size": 200}, "more than the 200 tokens that the text encoder has"),
    ],
)
def test_what_would_fail_in_the_first_step_is_refused_before_weights_load(
    altered, instance_dir, tmp_path, no_models, part, settings, message
):
    with pytest.raises(ValueError, match=message):
        train(altered(part, **settings), instance_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_kind_is_refused_by_its_name(instance_dir, tmp_path, no_models):
    with pytest.raises(ValueError, match="has a CLIPModel where this trainer needs a UNet2DConditionModel"):
        train("miniature-clip", instance_dir, tmp_path / "out")


def test_a_diffusion_transformer_is_refused_by_its_name(instance_dir, tmp_path, no_models):
    index = {"_class_name": "ChromaPipeline", "transformer": ["diffusers", "ChromaTransformer2DModel"]}
    (tmp_path / "chroma").mkdir()
    (tmp_path / "chroma" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"chroma is a ChromaPipeline, whose denoiser is a diffusion transformer"):
        train(tmp_path / "chroma", instance_dir, tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("scheduler", {"_class_name": None}, "scheduler is None, which diffusers does not have"),
        ("scheduler", {"beta_schedule": "none"}, "scheduler_config.json makes no DDIMScheduler"),
        ("scheduler", {"num_train_timesteps": "many"}, "scheduler_config.json makes no DDIMScheduler"),
        ("vae", {"latents_mean": [0.0, 0.0]}, "latents_mean or latents_std of other than 4 channels"),
        ("vae", {"scaling_factor": 0}, "says scaling_factor 0: latents need a number but 0"),
    ],
)
def test_damaged_settings_are_told_in_a_sentence(altered, part, settings, message):
    with pytest.raises(ValueError, match=message):
        open_base(str(altered(part, **settings))).scheduler()


@pytest.mark.parametrize(("sample_size", "expected"), [([8, 16], 8), (None, 512 // 4), (8, 8)])
def test_the_size_of_a_unet_is_a_number_a_pair_or_left_out(altered, sample_size, expected):
    base = open_base(str(altered("unet", sample_size=sample_size)))
    assert base.check_resolution(None) == min(512, expected * base.stride)


def test_a_vae_that_does_not_say_its_scale_has_its_classs(altered):
    model = altered("vae", scaling_factor=None)
    assert "scaling_factor" not in json.loads((model / "vae" / "config.json").read_text())
    assert open_base(str(model)).latent_space.scale == 0.18215


def test_a_half_precision_base_trains_float32_adapters(tiny_sd_path, instance_dir, tmp_path):
    from apt_diffusion import StableDiffusionAPTPipeline

    StableDiffusionAPTPipeline.from_pretrained(tiny_sd_path, dtype=torch.float16).save_pretrained(tmp_path / "half")
    flags = {"train_text_encoder": True, "max_train_steps": 3}
    half = train(tmp_path / "half", instance_dir, tmp_path / "out", **flags)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in tensors(half).values())
    assert np.allclose(losses(half), losses(train(tiny_sd_path, instance_dir, tmp_path / "whole", **flags)), rtol=0.02)
