"""`train_apt_sd.py` on Stable Diffusion 3: flow matching, three text encoders, and what is refused."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from PIL import Image
from support.training_helpers import assert_same_adapter, losses, tensors, train

from apt_diffusion import StableDiffusion3APTPipeline
from apt_diffusion.miniature import STABLE_DIFFUSION_3
from apt_diffusion.training.text_to_image.bases import open_base
from apt_diffusion.training.text_to_image.flow import WEIGHTING_SCHEMES, FlowObjective, Weighting
from apt_diffusion.training.text_to_image.objectives import make_objective

MODEL = "miniature-sd3"
SMALL = {"resolution": 32, "max_sequence_length": 24}


@pytest.fixture
def go(instance_dir, tmp_path):
    def run(out, model=MODEL, **flags):
        return train(model, instance_dir, tmp_path / out, **(SMALL | flags))

    return run


@pytest.fixture
def altered_sd3(tmp_path):
    """A copy of the embedded model; `change` edits its `model_index.json`."""

    def copy(change):
        folder = tmp_path / "altered"
        shutil.copytree(STABLE_DIFFUSION_3, folder)
        index = json.loads((folder / "model_index.json").read_text())
        change(index, folder)
        (folder / "model_index.json").write_text(json.dumps(index))
        return str(folder)

    return copy


# The objective


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_noise_levels_targets_and_weights_are_those_of_diffusers_trainer(shift, scheme):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    objective = make_objective(scheduler, weighting=Weighting(scheme))
    latents, noise = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind()
    chosen = torch.tensor([0, 3, 500, 900, 999])  # rising noise
    sigmas = scheduler.sigmas.flip(0)[chosen].view(-1, 1, 1, 1)
    noisy, times = objective.model_inputs(latents, noise, chosen)
    torch.testing.assert_close(noisy, (1 - sigmas) * latents + sigmas * noise)
    torch.testing.assert_close(times, scheduler.timesteps.flip(0)[chosen])
    assert times[0] < times[-1] == 1000 and torch.equal(objective.target(latents, noise, chosen), noise - latents)
    errors = objective.errors(latents, noise, chosen)
    plain = (latents - noise).square().flatten(1).mean(1)
    weights = compute_loss_weighting_for_sd3(scheme, sigmas.flatten())
    torch.testing.assert_close(errors, plain * weights)


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_noise_levels_are_drawn_as_often_as_by_diffusers(scheme):
    weighting = Weighting(scheme, logit_mean=0.3, logit_std=0.8, mode_scale=1.1)
    objective = FlowObjective(FlowMatchEulerDiscreteScheduler(), weighting)
    draws = np.random.default_rng(0)
    ours = [objective.draw_timestep(draws) for _ in range(20_000)]
    torch.manual_seed(0)
    places = compute_density_for_timestep_sampling(scheme, 20_000, logit_mean=0.3, logit_std=0.8, mode_scale=1.1)
    theirs = 999 - (places * 1000).long().clamp(0, 999)  # their table begins with the noisiest
    shares = np.linspace(0.05, 0.95, 10)
    assert np.abs(np.quantile(ours, shares) - np.quantile(theirs.numpy(), shares)).max() < 20
    assert min(ours) >= 0 and max(ours) <= 999


def test_dynamic_shifting_trains_on_the_unshifted_table():
    objective = make_objective(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True))
    assert math.isclose(objective.sigmas[499].item(), 0.5, abs_tol=1e-6)


def test_min_snr_is_refused():
    with pytest.raises(ValueError, match="--snr_gamma: flow matching has weightings of its own"):
        make_objective(FlowMatchEulerDiscreteScheduler(), 5.0)


def test_training_latents_are_shifted_as_by_diffusers(tmp_path):
    """`(posterior.sample() - vae.config.shift_factor) * vae.config.scaling_factor`, as in its trainers."""
    shutil.copytree(STABLE_DIFFUSION_3, tmp_path / "shifted")
    file = tmp_path / "shifted" / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift_factor": 0.0609, "scaling_factor": 1.5305}))
    base = open_base(str(tmp_path / "shifted"))
    vae = base.vae()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = base.latent_distribution(vae, pixels).unbind(1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sample = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(1))
    torch.testing.assert_close(mean + std * noise, (sample - 0.0609) * 1.5305)


# Texts


@pytest.mark.parametrize("with_t5", [True, False])
def test_embeddings_are_those_of_the_pipeline(altered_sd3, with_t5):
    model = MODEL
    if not with_t5:
        model = altered_sd3(lambda index, _: index.update(text_encoder_3=[None, None], tokenizer_3=[None, None]))
    base = open_base(model, max_sequence_length=24)
    from apt_diffusion.training.text_to_image.prompts import Prompts

    encoders = base.text_encoders(torch.float32)
    assert set(encoders) == {"text_encoder", "text_encoder_2"} | ({"text_encoder_3"} if with_t5 else set())
    with torch.no_grad():
        found = Prompts([("", "a red circle"), ("", "")], base)(["a red circle", ""], encoders)
        nothing = {} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}
        pipe = StableDiffusion3Pipeline.from_pretrained(base.path, dtype=torch.float32, **nothing)
        expected = pipe.encode_prompt("a red circle", None, None, max_sequence_length=24)
    for index, name in ((0, "prompt_embeds"), (2, "pooled_prompt_embeds")):
        torch.testing.assert_close(found[name][:1], expected[index])
        torch.testing.assert_close(found[name][1:], expected[index + 1])


# Runs


def test_the_loss_of_a_step_is_that_of_the_stock_transformer(go, instance_dir, monkeypatch):
    """The first step sees the base model: its loss from the inputs that the transformer was given."""
    from diffusers import SD3Transformer2DModel

    calls, latents = [], []
    forward, inputs_of = SD3Transformer2DModel.forward, FlowObjective.model_inputs

    def record(self, **inputs):
        output = forward(self, **inputs)
        calls.append(({name: value for name, value in inputs.items()}, output[0]))
        return output

    def note(self, pictures, *rest):
        latents.append(pictures)
        return inputs_of(self, pictures, *rest)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", record)
    monkeypatch.setattr(FlowObjective, "model_inputs", note)
    out = go("out", max_train_steps=1, weighting_scheme="none")
    (inputs, prediction) = calls[0]
    pipe = StableDiffusion3Pipeline.from_pretrained(STABLE_DIFFUSION_3, dtype=torch.float32)
    own = {name: value.detach() if torch.is_tensor(value) else value for name, value in inputs.items()}
    with torch.no_grad():
        stock = forward(pipe.transformer, **own)
        embeds = pipe.encode_prompt("a sks glyph", None, None, max_sequence_length=24)
    torch.testing.assert_close(prediction, stock[0])
    torch.testing.assert_close(own["encoder_hidden_states"], embeds[0].expand(2, -1, -1))
    torch.testing.assert_close(own["pooled_projections"], embeds[2].expand(2, -1))
    # The noise is what takes the pictures' latents to the noisy ones; so is the velocity, and from it the loss.
    sigmas = (own["timestep"] / 1000).view(-1, 1, 1, 1)
    noise = (own["hidden_states"] - (1 - sigmas) * latents[0]) / sigmas
    expected = (stock[0] - (noise - latents[0])).square().mean().item()
    assert math.isclose(losses(out)[0], expected, rel_tol=1e-3)


def test_a_resumed_run_ends_bit_for_bit_where_it_would_have(go):
    flags = {"max_train_steps": 6, "checkpointing_steps": 3, "weighting_scheme": "mode", "validation_split": 0.2}
    whole = go("whole", **flags)
    go("part", **flags | {"max_train_steps": 3})
    resumed = go("part", **flags, resume_from_checkpoint="latest")
    assert_same_adapter(whole, resumed)
    assert losses(whole) == losses(resumed)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({}, {"transformer.apt", "transformer.apt_text"}),
        ({"streams": ["query"]}, {"transformer.apt"}),
        ({"target_modules": ["attn"]}, {"transformer.apt"}),
        (
            {"train_text_encoder": True},
            {"transformer.apt", "transformer.apt_text", "text_encoder.apt", "text_encoder_2.apt"},
        ),
        ({"train_text_encoder": True, "no_train_unet": True}, {"text_encoder.apt", "text_encoder_2.apt"}),
        (
            {"gradient_checkpointing": True, "cache_latents": True, "loss_type": "huber", "streams": ["query"]},
            {"transformer.apt"},
        ),
    ],
)
def test_what_is_trained(go, flags, parts):
    found = tensors(go("out", **flags))
    names = {f"{key.split('.')[0]}.{next(p for p in key.split('.') if p.startswith('apt'))}" for key in found}
    assert names == parts
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_samples_are_what_the_pipeline_draws_with_the_adapter(go, tmp_path):
    out = go("out", num_validation_images=1, num_inference_steps=3, learning_rate=0.1, max_train_steps=3)
    pipe = StableDiffusion3APTPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        return pipe(
            "a sks glyph", height=32, width=32, num_inference_steps=3, guidance_scale=7.5, max_sequence_length=24,
            generator=torch.Generator().manual_seed(0),
        ).images[0]  # fmt: skip

    plain = np.asarray(draw(), dtype=int)
    pipe.load_apt_weights(out)
    expected = np.asarray(draw(), dtype=int)
    assert np.abs(expected - plain).max() > 10
    (file,) = (out / "samples").iterdir()
    grid = np.asarray(Image.open(file).convert("RGB"), dtype=int)
    places = ((y, x) for y in range(grid.shape[0] - 191) for x in range(grid.shape[1] - 191))  # six times as large
    assert min(np.abs(grid[y : y + 192 : 6, x : x + 192 : 6] - expected).max() for y, x in places) <= 1


def test_samples_that_start_from_a_picture_are_as_large_as_the_training_squares():
    base = open_base(MODEL, max_sequence_length=24)
    config = base.transformer
    texts = {
        "prompt_embeds": torch.zeros(1, 101, config["joint_attention_dim"]),
        "pooled_prompt_embeds": torch.zeros(1, config["pooled_projection_dim"]),
    }
    start = [Image.new("RGB", (40, 40), "red")]
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0}
    (image,) = base.draw(base.denoiser(torch.float32), (texts, texts), [0], 32, start, **settings)
    assert image.size == (32, 32)


def test_pictures_of_the_class_are_drawn_by_the_base(go, tmp_path):
    go(
        "out", with_prior_preservation=True, class_data_dir=tmp_path / "class", class_prompt="a circle",
        num_class_images=2, num_inference_steps=2,
    )  # fmt: skip
    assert len(list((tmp_path / "class").glob("*.png"))) == 2


# Refusals


def test_bases_that_cannot_be_trained_are_told_before_weights_load(go, altered_sd3, no_models):
    with pytest.raises(ValueError, match=r"multiple of 8, at most 128, got 36"):
        go("out", resolution=36)
    with pytest.raises(ValueError, match=r"at most 128, got 256"):
        go("out", resolution=256)
    with pytest.raises(ValueError, match="--snr_gamma: flow matching"):
        go("out", snr_gamma=5.0)
    with pytest.raises(ValueError, match="several, which differ"):
        go("out", tokenizer_name="x")
    model = altered_sd3(lambda index, _: index.update(text_encoder_2=[None, None]))
    with pytest.raises(ValueError, match=r"has only the text encoders .* training needs both of CLIP"):
        go("out", model=model)


def test_a_transformer_of_another_family_is_named(go, altered_sd3, no_models):
    model = altered_sd3(lambda index, _: index.update(_class_name="AuraFlowPipeline"))
    with pytest.raises(ValueError, match=r"is a AuraFlowPipeline, .* takes Stable Diffusion 1, 2, XL, 3"):
        go("out", model=model)


def test_text_encoders_of_another_model_are_told(go, altered_sd3, no_models):
    def narrow(index, folder):
        file = folder / "transformer" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pooled_projection_dim": 64}))

    with pytest.raises(ValueError, match="do not belong together"):
        go("out", model=altered_sd3(narrow))
