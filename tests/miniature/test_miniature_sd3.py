"""The embedded Stable Diffusion 3: its files, its pictures, its parts, its objective and the script that makes it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from transformers import CLIPTextModel

from apt_diffusion.miniature import STABLE_DIFFUSION, STABLE_DIFFUSION_3, resolve_model
from apt_diffusion.miniature.grade import draw, grade, load_grader, row_scenes
from apt_diffusion.miniature.models import WORDS
from apt_diffusion.miniature.transformer import (
    SHIFT,
    T5_WORDS,
    CountedJointAttnProcessor,
    encode_captions,
    flow_loss,
    make_flow_scheduler,
    make_t5,
    make_t5_tokenizer,
    make_transformer,
    sample_repeats,
    sample_sigmas,
)
from apt_diffusion.miniature.world import caption

ROOT = Path(__file__).parents[2]
CAPTIONS = ["a small red circle on a blue background", "a pink star inside a green square on a black background"]


@pytest.fixture(scope="module")
def sd3():
    """As a user without this library would load it."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(resolve_model("miniature-sd3"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_files_are_small_and_not_pickled():
    files = [file for file in STABLE_DIFFUSION_3.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12 * 2**20
    assert {file.suffix for file in files} == {".json", ".safetensors", ".md"}


@pytest.mark.parametrize(
    ("row", "least"),
    [("one shape, plain, small", 5), ("one shape, held-out colour", 5), ("two shapes, plain", 5)],
)
def test_it_draws_what_a_caption_says(sd3, row, least):
    scenes = row_scenes(6, seed=11)[row]
    pictures = draw(sd3, [caption(scenes, index) for index in range(6)], steps=12, max_sequence_length=16)
    assert grade(load_grader(), pictures, scenes)["all right"] * 6 >= least - 1e-6


def test_seeds_decide_and_the_number_of_paddings_does_not(sd3):
    first, again, longer, other = (
        draw(sd3, CAPTIONS[:1], seed, steps=6, max_sequence_length=length)
        for seed, length in ((3, 16), (3, 16), (3, 77), (4, 16))
    )
    assert torch.equal(first, again)
    assert (first - longer).square().mean().sqrt() < 0.1 < (first - other).square().mean().sqrt()


def test_autoencoder_and_first_text_encoder_are_those_of_the_stable_diffusion(sd3):
    weights = [
        folder / "vae" / "diffusion_pytorch_model.safetensors" for folder in (STABLE_DIFFUSION, STABLE_DIFFUSION_3)
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    alone = CLIPTextModel.from_pretrained(STABLE_DIFFUSION / "text_encoder", dtype=torch.float32)
    ids = sd3.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    expected, actual = alone(ids, output_hidden_states=True), sd3.text_encoder(ids, output_hidden_states=True)
    assert torch.equal(expected.hidden_states[-2], actual.hidden_states[-2])
    assert torch.equal(expected.pooler_output, actual.text_embeds)  # the projection is the identity


def test_every_word_is_one_piece_of_t5_and_every_caption_fits():
    tokenizer = make_t5_tokenizer()
    for word in WORDS:
        assert len(tokenizer(word).input_ids) == 2, word
    longest = "a orange triangle left of a purple triangle on a checkered yellow and orange background"
    assert len(tokenizer(longest).input_ids) == T5_WORDS
    assert tokenizer.decode(tokenizer("Some other words!").input_ids, skip_special_tokens=True) == "Some other words!"


def test_padding_of_t5_is_zero_and_has_no_gradient():
    tokenizer = make_t5_tokenizer()
    encoder = make_t5(tokenizer)
    ids = tokenizer(["a red star", ""], padding="max_length", max_length=8, return_tensors="pt").input_ids
    states = encoder(ids).last_hidden_state
    assert torch.count_nonzero(states[ids == 0]) == 0 and states[ids != 0].abs().amax(-1).min() > 0.1
    (states * torch.randn_like(states)).sum().backward()
    gradient = encoder.shared.weight.grad.abs().amax(-1)
    used = set(ids.flatten().tolist()) - {0}
    assert set(gradient.nonzero().flatten().tolist()) == used


def test_shipped_padding_is_zero(sd3):
    assert torch.count_nonzero(sd3.text_encoder_3.shared.weight[0]) == 0


@pytest.mark.parametrize("repeats", [0, 5, 240])
def test_one_counted_token_is_as_many_equal_ones(sd3, repeats):
    """Outputs and the gradients of weights of both streams, against the stock processor."""
    transformer, generator = sd3.transformer, torch.Generator().manual_seed(repeats)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    states, pooled = torch.randn(1, 48, 192, generator=generator), torch.randn(1, 192, generator=generator)
    cotangent = torch.randn(1, 4, 16, 16, generator=generator)
    weights = [
        transformer.transformer_blocks[1].attn.to_k.weight,
        transformer.transformer_blocks[0].attn.add_v_proj.weight,
    ]

    def run(paddings: int, **settings) -> list[torch.Tensor]:
        output = transformer(latents, F.pad(states, (0, 0, 0, paddings)), pooled, torch.tensor([700.0]), **settings)
        return [output.sample, *torch.autograd.grad((output.sample * cotangent).sum(), weights)]

    expected = run(repeats)
    transformer.set_attn_processor(CountedJointAttnProcessor())
    try:
        actual = run(1, joint_attention_kwargs={"attention_mask": torch.tensor([float(repeats)]).log()})
    finally:
        transformer.set_attn_processor(JointAttnProcessor2_0())
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() < 2e-5 * other.abs().max()


def test_captions_are_encoded_as_the_pipeline_does(sd3):
    ids = sd3.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    t5_ids = sd3.tokenizer_3(CAPTIONS, padding="max_length", max_length=20, return_tensors="pt").input_ids
    states, pooled = encode_captions([sd3.text_encoder, sd3.text_encoder_2, sd3.text_encoder_3], ids, t5_ids)
    expected = sd3.encode_prompt(CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=20)
    assert torch.equal(states, expected[0]) and torch.equal(pooled, expected[2])


def test_the_objective_is_the_velocity_between_noise_and_picture(sd3):
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 2, 4, 16, 16, generator=generator)
    sigmas, repeats = torch.tensor([0.25, 0.9]), torch.tensor([3.0, 0.0])
    ids = sd3.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    t5_ids = sd3.tokenizer_3(CAPTIONS, padding="max_length", max_length=T5_WORDS, return_tensors="pt").input_ids
    seen = {}

    def transformer(**inputs):
        seen.update(inputs)
        return SimpleNamespace(sample=torch.full_like(clean, 0.5))

    encoders = [sd3.text_encoder, sd3.text_encoder_2, sd3.text_encoder_3]
    loss = flow_loss(transformer, encoders, clean, ids, t5_ids, noise, sigmas, repeats)
    assert torch.isclose(loss, (0.5 - (noise - clean)).square().mean())
    mixed = torch.stack([0.75 * clean[0] + 0.25 * noise[0], 0.1 * clean[1] + 0.9 * noise[1]])
    assert torch.allclose(seen["hidden_states"], mixed, atol=1e-6)
    assert torch.equal(seen["timestep"], 1000 * sigmas)
    assert torch.count_nonzero(seen["encoder_hidden_states"][:, -1]) == 0
    assert torch.equal(seen["joint_attention_kwargs"]["attention_mask"], torch.tensor([3.0, 0.0]).log())


def test_noise_levels_and_paddings_are_drawn_as_said():
    generator = torch.Generator().manual_seed(0)
    sigmas = sample_sigmas(40000, generator)
    times = sigmas / (SHIFT - (SHIFT - 1) * sigmas)  # unshifted
    # Median of 0.8 logit-normal + 0.2 uniform is 1/2; the mass below .1 is .8 Phi(log(1/9)) + .2 * .1.
    assert abs((times < 0.5).float().mean() - 0.5) < 0.01
    below = 0.8 * torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(1 / 9).log()) + 0.02
    assert abs((times < 0.1).float().mean() - below) < 0.005
    scheduler = make_flow_scheduler()
    assert torch.isclose(
        scheduler.sigmas[500], torch.tensor(2 / 3)
    )  # of the unshifted time 1/2, as `sample_sigmas` has it
    repeats = sample_repeats(40000, generator)
    assert repeats.min() == 0 and repeats.max() == 256 - T5_WORDS and torch.equal(repeats, repeats.round())
    assert abs((repeats == 256 - T5_WORDS).float().mean() - 0.6) < 0.02


def test_an_untrained_transformer_predicts_nothing():
    latents, pooled = torch.randn(1, 4, 16, 16), torch.randn(1, 192)
    sample = make_transformer()(latents, torch.randn(1, 3, 192), pooled, torch.tensor([500.0])).sample
    assert torch.count_nonzero(sample) == 0


@pytest.mark.slow
def test_pretraining_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import pretrain_miniature_sd3 as script
    from stages import fit

    def interrupt(step: int) -> None:
        raise KeyboardInterrupt

    vae, text_encoder = script.load_base(str(STABLE_DIFFUSION))

    def weights(folder: str, *runs: str) -> dict[str, torch.Tensor]:
        (tmp_path / folder).mkdir()
        for run in runs:
            arguments = ["--output_dir", str(tmp_path / folder), "--steps", "4", "--batch_size", "2", "--pool", "4"]
            args = script.parse_args([*arguments, "--device", "cpu", "--learning_rate", "1e-2"])
            torch.manual_seed(0)
            stage = script.transformer_stage(args, vae, text_encoder)
            if run == "killed":
                with pytest.raises(KeyboardInterrupt):
                    fit(stage, args.output_dir, args.seed, 2, interrupt)
            else:
                fit(stage, args.output_dir, args.seed, 2)
        return {
            f"{name}.{key}": value
            for name, module in stage.modules.items()
            for key, value in module.state_dict().items()
        }

    straight, resumed = weights("straight", "whole"), weights("resumed", "killed", "rest")
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    assert straight["text_encoder_3.shared.weight"][0].abs().max() == 0
    assert straight["transformer.proj_out.weight"].abs().max() > 0
    assert vae.config.scaling_factor == pytest.approx(0.6893, abs=1e-4)  # that of the embedded autoencoder
