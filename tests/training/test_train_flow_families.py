"""`train_apt_sd.py` on Flux and its kin: texts, latents and predictions are the stock pipeline's; runs; refusals."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from PIL import Image
from support.training_helpers import assert_same_adapter, losses, tensors, train
from torch.nn.functional import unfold

import apt_diffusion
from apt_diffusion.training.text_to_image.bases import open_base
from apt_diffusion.training.text_to_image.kept_prompts import KeptPrompts
from apt_diffusion.training.text_to_image.noisy import Noisy

TEXTS = ["a sks glyph, red", ""]


def squares(latents):
    """2 x 2 cells in one token, `(B, c, h, w) -> (B, N, 4 c)`: the definition, by torch's `unfold`."""
    return unfold(latents, 2, stride=2).transpose(1, 2)


@dataclasses.dataclass(frozen=True)
class Family:
    """What differs between families in these tests.

    Args:
        adapted: the pipeline that loads the adapter.
        expected: texts and a pipeline to the embeddings of these texts, by our names.
        given: `(B, c, h, w)` latents of ours as the argument `latents` of the pipeline.
        stepped: the same as the pipeline's steps have them.
        unguided: arguments of the pipeline for a single pass of the transformer in each step.
        guided: those for what the trainer draws samples with.
        length: tokens of text.
        encoding: further arguments of `encode_prompt`, and of the trainer.
    """

    adapted: str
    expected: object
    given: object
    stepped: object
    unguided: dict
    guided: dict
    length: int = 48
    encoding: dict = dataclasses.field(default_factory=dict)


def flux_texts(pipe, texts, **settings):
    states, pooled, _ = pipe.encode_prompt(texts, device="cpu", **settings)
    return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}


def qwen_texts(pipe, texts, **settings):
    states, mask = pipe.encode_prompt(texts, device="cpu", **settings)
    return {"prompt_embeds": states, "prompt_embeds_mask": mask}


def z_image_texts(pipe, texts, max_sequence_length):
    """Padded as the trainer has them; the pipeline has lists."""
    listed, _ = pipe.encode_prompt(texts, device="cpu", max_sequence_length=max_sequence_length)
    mask = [torch.ones(len(states), dtype=torch.long) for states in listed]
    together = {"prompt_embeds": listed, "prompt_embeds_mask": mask}
    return {name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for name, rows in together.items()}


def flux_2_texts(pipe, texts, **settings):
    return {"prompt_embeds": pipe.encode_prompt(texts, device="cpu", **settings)[0]}


def cells(latents):
    """One cell in one token, `(B, c, h, w) -> (B, N, c)`."""
    return latents.flatten(2).transpose(1, 2)


def as_they_are(latents):
    return latents


FAMILIES = {
    "flux": Family("FluxAPTPipeline", flux_texts, squares, squares, {"guidance_scale": 3.5}, {"guidance_scale": 3.5}),
    "z-image": Family(
        "ZImageAPTPipeline", z_image_texts, as_they_are, as_they_are, {"guidance_scale": 0.0}, {"guidance_scale": 5.0}
    ),
    "qwen-image": Family(
        "QwenImageAPTPipeline", qwen_texts, squares, squares, {"true_cfg_scale": 1.0},
        {"true_cfg_scale": 4.0, "negative_prompt": ""}, length=256,
    ),
    "flux2": Family(
        "Flux2APTPipeline", flux_2_texts, as_they_are, cells, {"guidance_scale": 3.5}, {"guidance_scale": 4.0},
        length=448, encoding={"text_encoder_out_layers": [1, 2]},
    ),
    "flux2-klein": Family(
        "Flux2KleinAPTPipeline", flux_2_texts, as_they_are, cells, {"guidance_scale": 1.0}, {"guidance_scale": 4.0},
        encoding={"text_encoder_out_layers": [1, 2]},
    ),
}  # fmt: skip
each_family = pytest.mark.parametrize("kind", list(FAMILIES))


@pytest.fixture
def go(tiny_transformer_path, instance_dir, tmp_path):
    def run(kind, out, model=None, **flags):
        family = FAMILIES[kind]
        small = {"resolution": 16, "max_sequence_length": family.length} | family.encoding
        return train(model or tiny_transformer_path(kind), instance_dir, tmp_path / out, **(small | flags))

    return run


@pytest.fixture
def opened(tiny_transformer_path):
    """The base of a family, and its stock pipeline."""

    def open_both(kind):
        family = FAMILIES[kind]
        path = str(tiny_transformer_path(kind))
        pipe = DiffusionPipeline.from_pretrained(path)
        pipe.set_progress_bar_config(disable=True)
        base = open_base(path, max_sequence_length=family.length)
        for name, value in family.encoding.items():
            setattr(base, name, value)
        return base, pipe

    return open_both


@pytest.fixture
def changed(tiny_transformer_path, tmp_path):
    """A copy of a tiny pipeline with other settings of one part, or without it."""

    def copy(kind, part, **settings):
        folder = tmp_path / f"changed-{part}"
        shutil.copytree(tiny_transformer_path(kind), folder)
        file = folder / ("model_index.json" if part == "" else f"{part}/config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        return str(folder)

    return copy


def embedded(base, texts):
    """Embeddings as the trainer has them."""
    prompts = KeptPrompts([("", text) for text in [*texts, "another one, which is the longest of all of them"]], base)
    assert prompts.keep_embeddings(lambda: base.text_encoders(torch.float32)) == {}
    return prompts(texts, {})


# What a step is made of


@each_family
def test_embeddings_are_those_of_the_pipeline(opened, kind):
    base, pipe = opened(kind)
    family = FAMILIES[kind]
    with torch.no_grad():
        expected = family.expected(pipe, list(TEXTS), max_sequence_length=family.length, **family.encoding)
    found = embedded(base, TEXTS)
    assert found.keys() == expected.keys()
    for name, embedding in expected.items():
        torch.testing.assert_close(found[name], embedding, atol=1e-5, rtol=1e-4)


@each_family
def test_latents_are_what_the_pipeline_decodes(opened, kind):
    """The pipeline is handed our latents after its last step, and draws the picture that the VAE makes of its own."""
    base, pipe = opened(kind)
    if hasattr(pipe.vae, "bn"):  # Flux.2's: statistics that do something
        torch.nn.init.uniform_(pipe.vae.bn.running_mean, -1, 1)
        torch.nn.init.uniform_(pipe.vae.bn.running_var, 0.5, 2)
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = base.latent_distribution(pipe.vae, pixels)[:, 0]
    assert latents.shape[1:] == base.latent_shape(16)
    handed = FAMILIES[kind].stepped(latents)
    found = pipe(
        prompt="a", height=16, width=16, num_inference_steps=1, output_type="pt",
        max_sequence_length=FAMILIES[kind].length,
        callback_on_step_end=lambda *_: {"latents": handed}, **FAMILIES[kind].unguided, **FAMILIES[kind].encoding,
    ).images  # fmt: skip
    with torch.no_grad():
        video = pixels.unsqueeze(2) if kind == "qwen-image" else pixels
        own = pipe.vae.decode(pipe.vae.encode(video).latent_dist.mode()).sample
    expected = own[:, :, 0] if kind == "qwen-image" else own
    torch.testing.assert_close(found, (expected / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)


@each_family
def test_predictions_are_those_of_the_pipeline(opened, kind):
    """One step of the pipeline from sigma to 0 subtracts sigma times the prediction."""
    base, pipe = opened(kind)
    family = FAMILIES[kind]
    noise = torch.randn(2, *base.latent_shape(16), generator=torch.Generator().manual_seed(0))
    ends = []
    pipe(
        prompt=list(TEXTS), height=16, width=16, sigmas=[0.6], num_inference_steps=1, output_type="latent",
        latents=family.given(noise), max_sequence_length=family.length, **family.unguided, **family.encoding,
        callback_on_step_end=lambda *call: ends.append(call[3]["latents"]) or {},
    )  # fmt: skip
    sigma = pipe.scheduler.sigmas[0]
    expected = (family.stepped(noise) - ends[0]) / sigma
    with torch.no_grad():
        times = (sigma * 1000).expand(2)
        given = Noisy(noise, times, embedded(base, TEXTS), torch.zeros(2, 6))
        found = base.predict(pipe.transformer, given)
    assert found.shape == noise.shape and expected.abs().max() > 0.1
    torch.testing.assert_close(family.stepped(found), expected, atol=1e-4, rtol=1e-3)


def test_the_guidance_of_training_is_that_of_the_flag(go, monkeypatch):
    seen, forward = [], FluxTransformer2DModel.forward

    def record(self, **inputs):
        seen.append(inputs["guidance"].tolist())
        return forward(self, **inputs)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", record)
    go("flux", "given", max_train_steps=1, guidance_embedding=1.0)
    go("flux", "default", max_train_steps=1)
    assert seen == [[1.0, 1.0], [3.5, 3.5]]


# Runs


@each_family
def test_a_run_trains_every_prompt_and_its_samples_are_the_pipelines(go, tiny_transformer_path, kind):
    out = go(
        kind, "out", max_train_steps=3, checkpointing_steps=1, learning_rate=0.1, num_validation_images=1,
        num_inference_steps=2,
    )  # fmt: skip
    before, after = tensors(out / "checkpoint-1"), tensors(out)
    assert any(name.endswith("prompts") for name in after)
    unchanged = [name for name in after if name.endswith("prompts") and torch.equal(before[name], after[name])]
    assert unchanged == [] and all(tensor.isfinite().all() for tensor in after.values())
    family = FAMILIES[kind]
    pipe = getattr(apt_diffusion, family.adapted).from_pretrained(tiny_transformer_path(kind))
    pipe.set_progress_bar_config(disable=True)

    def draw():
        return pipe(
            prompt="a sks glyph", height=16, width=16, num_inference_steps=2, max_sequence_length=family.length,
            generator=torch.Generator().manual_seed(0), **family.guided, **family.encoding,
        ).images[0]  # fmt: skip

    plain = np.asarray(draw(), dtype=int)
    pipe.load_apt_weights(out)
    expected = np.asarray(draw(), dtype=int)
    assert np.abs(expected - plain).max() > 0
    (file,) = (out / "samples").iterdir()
    assert contains(np.asarray(Image.open(file).convert("RGB"), dtype=int), expected)


def contains(grid, picture, times=12):
    """Whether a grid of samples shows a picture, which it enlarges."""
    side = len(picture) * times
    views = np.lib.stride_tricks.sliding_window_view(grid, (side, side), axis=(0, 1))[..., ::times, ::times]
    return np.abs(views - picture.transpose(2, 0, 1)).max((2, 3, 4)).min() <= 1


@each_family
def test_a_resumed_run_ends_bit_for_bit_where_it_would_have(go, instance_dir, kind):
    flags = {
        "max_train_steps": 4, "checkpointing_steps": 2, "weighting_scheme": "mode", "validation_split": 0.2,
        "with_prior_preservation": True, "class_data_dir": instance_dir, "class_prompt": "a glyph",
        "num_class_images": 2, "gradient_checkpointing": True,
    }  # fmt: skip
    whole = go(kind, "whole", **flags)
    go(kind, "part", **flags | {"max_train_steps": 2})
    resumed = go(kind, "part", **flags, resume_from_checkpoint="latest")
    assert_same_adapter(whole, resumed)
    assert losses(whole) == losses(resumed)


@each_family
def test_buckets_masks_and_half_precision(go, tmp_path, kind):
    for index, size in enumerate([(20, 30), (30, 20), (16, 16)]):
        pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        Image.new("L", size[::-1], 200).save(tmp_path / f"{index}-mask.png")
    out = go(
        kind, "out", instance_data_dir=tmp_path, max_train_steps=4, train_batch_size=1, masked_loss=True,
        aspect_ratio_buckets="16,24;24,16;16,16", mixed_precision="bf16", num_validation_images=1,
        num_inference_steps=1, caption_dropout_rate=0.5, **{"no-cache_latents": True},
    )  # fmt: skip
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in tensors(out).values())
    assert np.isfinite(losses(out)).all() and (out / "samples").is_dir()


@each_family
def test_pictures_of_the_class_are_drawn_by_the_base(go, tmp_path, kind):
    go(
        kind, "out", max_train_steps=1, with_prior_preservation=True, class_data_dir=tmp_path / "class",
        class_prompt="a circle", num_class_images=2, num_inference_steps=1,
    )  # fmt: skip
    assert len(list((tmp_path / "class").glob("*.png"))) == 2


def test_clip_of_flux_is_trained_beside_a_frozen_t5(go):
    out = go("flux", "out", max_train_steps=3, train_text_encoder=True, learning_rate=0.1, num_validation_images=1,
             num_inference_steps=1, checkpointing_steps=1)  # fmt: skip
    before, after = tensors(out / "checkpoint-1"), tensors(out)
    assert {name.split(".")[0] for name in after} == {"transformer", "text_encoder"}
    assert not any(torch.equal(before[name], after[name]) for name in after if name.endswith("prompts"))


def test_a_distilled_klein_is_drawn_as_it_was_made(go, changed, caplog):
    model = changed("flux2-klein", "", is_distilled=True)
    go("flux2-klein", "out", model, max_train_steps=1)
    assert "samples are drawn with 4 steps and a guidance of 1" in caplog.text
    base = open_base(model, max_sequence_length=48)
    assert base.drawing_pipeline(base.denoiser(torch.float32), False).config.is_distilled


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if not kind.startswith("flux2")])
def test_samples_may_start_from_a_picture(opened, kind):
    base, pipe = opened(kind)
    texts, nothing = embedded(base, ["a"]), embedded(base, [""])
    start = [Image.new("RGB", (40, 40), "red")]
    settings = {"num_inference_steps": 2} | FAMILIES[kind].guided
    settings.pop("negative_prompt", None)  # whose embeddings are given
    (image,) = base.draw(pipe.transformer, (texts, nothing), [0], 16, start, **settings)
    assert image.size == (16, 16)


# What is refused before weights are loaded


@each_family
def test_flags_that_no_language_model_can_follow(go, no_models, kind):
    for flags, message in [
        ({"resolution": 18}, "--resolution must be a multiple of 4, got 18"),
        ({"tokenizer_name": "x"}, "--tokenizer_name: texts of .* are read as its pipeline reads them"),
        ({"tokenizer_max_length": 8}, "--tokenizer_max_length: texts of .*--max_sequence_length says"),
        ({"no-cache_text_embeddings": True}, "--no-cache_text_embeddings: the language model of .* is freed"),
        ({"shuffle_caption": True}, "reads each caption once"),
        ({"snr_gamma": 5.0}, "--snr_gamma: flow matching"),
    ]:
        with pytest.raises(ValueError, match=message):
            go(kind, "out", **flags)


@each_family
def test_a_base_without_a_text_encoder_is_told(go, changed, no_models, kind):
    part = "text_encoder_2" if kind == "flux" else "text_encoder"
    with pytest.raises(ValueError, match=f"has no {part}, without which .* cannot read prompts"):
        go(kind, "out", model=changed(kind, "", **{part: [None, None]}))


@each_family
def test_latents_of_another_autoencoder_are_told(go, changed, no_models, kind):
    part, setting = ("vae", "z_dim") if kind == "qwen-image" else ("vae", "latent_channels")
    more = {"latents_mean": [0.0] * 2, "latents_std": [1.0] * 2} if kind == "qwen-image" else {}
    with pytest.raises(ValueError, match=r"no text-to-image model over the latents that its VAE makes: they have"):
        go(kind, "out", model=changed(kind, part, **{setting: 2}, **more))


@each_family
def test_an_autoencoder_of_another_kind_is_told(go, tiny_transformer_path, no_models, kind):
    other = tiny_transformer_path("flux" if kind == "qwen-image" else "qwen-image") / "vae"
    with pytest.raises(ValueError, match=r"has a AutoencoderKL\w* where this trainer needs a AutoencoderKL"):
        go(kind, "out", pretrained_vae_model_name_or_path=other)


@each_family
def test_text_encoders_of_another_model_are_told(go, changed, no_models, kind):
    setting = {"z-image": "cap_feat_dim"}.get(kind, "joint_attention_dim")
    with pytest.raises(ValueError, match=f"do not belong together: its transformer takes .*{setting}"):
        go(kind, "out", model=changed(kind, "transformer", **{setting: 64}))


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "flux"])
def test_language_models_are_never_trained(go, no_models, kind):
    with pytest.raises(ValueError, match=r"--train_text_encoder: .* has a language model in place of CLIP"):
        go(kind, "out", train_text_encoder=True)


def test_texts_are_cut_where_the_template_leaves_no_room(go, no_models, opened, caplog):
    with pytest.raises(ValueError, match=r"--max_sequence_length 8 has no room for prompts: Z-Image puts 8 tokens"):
        go("z-image", "out", max_sequence_length=8)
    base, _ = opened("z-image")
    base.max_sequence_length = 8 + 10
    KeptPrompts([("--instance_prompt", "a sks glyph")], base)
    assert "--instance_prompt loses 'h'" in caplog.text and "than the 10 tokens that the model reads" in caplog.text


def test_a_vae_with_other_patches_is_told(go, changed, no_models):
    with pytest.raises(ValueError, match=r"The VAE of .* has patches of \[1, 1\], not of 2 x 2"):
        go("flux2", "out", model=changed("flux2", "vae", patch_size=[1, 1]))


def test_layers_that_the_text_encoder_lacks_are_told(go, no_models):
    with pytest.raises(ValueError, match=r"--text_encoder_out_layers 1 3: the text encoder of .* has 2 layers"):
        go("flux2", "out", text_encoder_out_layers=[1, 3])


def test_pictures_to_start_from_are_refused_where_no_pipeline_takes_them(go, instance_dir, no_models):
    with pytest.raises(ValueError, match=r"--validation_images: Flux.2 starts from no picture"):
        go("flux2", "out", num_validation_images=1, validation_images=[instance_dir / "picture-0.png"])


def test_too_many_tokens_are_told(go, no_models):
    with pytest.raises(ValueError, match=r"--max_sequence_length 600: Flux.1 reads at most 512 tokens"):
        go("flux", "out", max_sequence_length=600)
