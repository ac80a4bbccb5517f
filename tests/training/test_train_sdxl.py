"""`train_apt_sd.py` on a tiny Stable Diffusion XL: what the UNet is told, what is trained, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support.training_helpers import assert_same_adapter, header, losses, tensors, train

import apt_diffusion as apt
from apt_diffusion.data.pictures import Picture, choose_view, cut, scaled_size, time_ids
from apt_diffusion.training.text_to_image.noisy import Noisy

PARTS = ("unet", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Wide and tall, so that cuts begin somewhere."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, size in enumerate([(40, 80), (90, 40), (33, 64)]):
        pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def go(tiny_sdxl_path, pictures, tmp_path):
    def run(out, model=tiny_sdxl_path, **flags):
        return train(model, pictures, tmp_path / out, **({"resolution": 32, "random_flip": True} | flags))

    return run


@pytest.fixture
def base(tiny_sdxl_path):
    from apt_diffusion.training.text_to_image.bases import open_base

    return open_base(str(tiny_sdxl_path))


@pytest.fixture
def stock(tiny_sdxl_path):
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_path, add_watermarker=False)


@pytest.fixture
def told(monkeypatch):
    """What the UNet of a run is given, call by call."""
    from diffusers import UNet2DConditionModel

    calls = []
    forward = UNet2DConditionModel.forward

    def record(self, sample, timestep, encoder_hidden_states, **kwargs):
        added = kwargs["added_cond_kwargs"]
        calls.append([x.detach().clone() for x in (encoder_hidden_states, added["text_embeds"], added["time_ids"])])
        return forward(self, sample, timestep, encoder_hidden_states, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", record)
    return calls


@pytest.mark.parametrize(("width", "height"), [(40, 90), (90, 40), (32, 32), (100, 33)])
@pytest.mark.parametrize("draws", [(0.0, 0.9), (0.7, 0.1), (0.99, 0.4)])
def test_time_ids_say_where_the_cut_lies(width, height, draws):
    """Searched for in the picture as it was resized and mirrored."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Picture("a.png", "", width, height)
    view = choose_view(picture, 32, 8, center_crop=False, random_flip=True, draws=draws)
    found = cut(Image.fromarray(pixels), view)
    whole = Image.fromarray(pixels).resize(scaled_size(width, height, 32), Image.Resampling.LANCZOS)
    if view.flipped:
        whole = ImageOps.mirror(whole)
    *size, top, left, target_height, target_width = time_ids(picture, view)
    assert size == [height, width] and (target_height, target_width) == (32, 32) == found.shape[1:]
    expected = np.asarray(whole)[top : top + 32, left : left + 32]
    assert np.allclose((found.permute(1, 2, 0) + 1) * 127.5, expected, atol=1.01)  # one level: rounding


def test_conditions_are_those_of_the_pipeline(base, stock):
    from apt_diffusion.training.text_to_image.prompts import Prompts

    prompts = ["a sks glyph", "a much longer prompt than the other one", ""]
    text_encoders = base.text_encoders(torch.float32)
    told = Prompts([("", prompt) for prompt in prompts], base)
    expected, _, pooled, _ = stock.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    for kept in (False, True):
        if kept:
            told.keep_embeddings(lambda: text_encoders)
        embeddings = told(prompts, {} if kept else text_encoders)
        time_ids = stock._get_add_time_ids((70, 50), (3, 4), (32, 32), torch.float32, 32).repeat(3, 1)
        given = Noisy(torch.zeros(3, 4, 8, 8), torch.zeros(3), embeddings, time_ids.int())
        conditions = base.conditions(given)
        torch.testing.assert_close(conditions["encoder_hidden_states"], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(conditions["added_cond_kwargs"]["text_embeds"], pooled, rtol=1e-5, atol=1e-5)
        assert torch.equal(conditions["added_cond_kwargs"]["time_ids"], time_ids)
    late = dataclasses.replace(given, time_ids=time_ids + 1001).to(torch.bfloat16)
    half = base.conditions(late)["added_cond_kwargs"]
    assert torch.equal(half["time_ids"], time_ids + 1001) and half["text_embeds"].dtype == torch.bfloat16


def test_the_unet_is_told_text_sizes_and_cuts(go, told, stock):
    go("out", train_batch_size=3, max_train_steps=3)
    expected, _, pooled, _ = stock.encode_prompt("a sks glyph", device="cpu", do_classifier_free_guidance=False)
    assert len(told) == 3
    for states, text, sizes in told:
        torch.testing.assert_close(states, expected.expand_as(states), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(text, pooled.expand_as(text), rtol=1e-4, atol=1e-5)
        assert sorted(map(tuple, sizes[:, :2].tolist())) == [(33, 64), (40, 80), (90, 40)]
        assert sizes[:, 4:].eq(32).all()
        tall = sizes[:, 0] > sizes[:, 1]
        assert sizes[tall, 3].eq(0).all() and sizes[~tall, 2].eq(0).all()
    begins = torch.cat([sizes[:, 2:4] for *_, sizes in told])
    assert len(begins.unique()) > 2 and begins.max() <= 40


def test_trained_adapters_draw_in_the_pipeline_what_the_trainer_drew(go, tiny_sdxl_path):
    out = go(
        "out", train_text_encoder=True, max_train_steps=3, num_validation_images=2, num_inference_steps=2, seed=11,
        mixed_precision="no",
    )  # fmt: skip
    trained = tensors(out)
    assert {key.split(".")[0] for key in trained} == set(PARTS)
    moved = {key: value.item() != 0 for key, value in trained.items() if key.endswith("gate")}
    idle = {key for key in moved if key.startswith("text_encoder.") and ".layers.2." in key}
    assert len(idle) == 1 and idle == {key for key, has_moved in moved.items() if not has_moved}
    assert set(json.loads(header(out)["apt_config"])) == set(PARTS)
    pipe = apt.StableDiffusionXLAPTPipeline.from_pretrained(tiny_sdxl_path, add_watermarker=False)
    pipe.load_apt_weights(out)
    generator = torch.Generator().manual_seed(12)
    image = pipe(
        "a sks glyph", height=32, width=32, num_inference_steps=2, guidance_scale=7.5, generator=generator
    ).images[0]
    with Image.open(out / "samples" / "step-000003.png") as grid:
        pixels = np.asarray(grid.convert("RGB")).astype(int)
    enlarged = np.asarray(image.resize((192, 192), 0)).astype(int)
    top = pixels.shape[0] - 8 - 20 - 192
    assert np.abs(pixels[top : top + 192, 8 + 192 + 8 : 8 + 192 + 8 + 192] - enlarged).max() <= 1
    card = (out / "README.md").read_text()
    assert "StableDiffusionXLAPTPipeline.from_pretrained" in card and "stable-diffusion-xl" in card


def test_caches_change_nothing(go):
    cached = go("cached", max_train_steps=4)
    anew = go("anew", max_train_steps=4, **{"no-cache_latents": True, "no-cache_text_embeddings": True})
    assert {key.split(".")[0] for key in tensors(cached)} == {"unet"}
    assert_same_adapter(cached, anew, tolerance=2e-4)
    assert np.allclose(losses(cached), losses(anew), atol=1e-4)


@pytest.mark.slow
def test_two_steps_and_two_resumed_are_four_straight(go):
    flags = {"train_text_encoder": True, "text_encoder_lr": 1e-3, "gradient_checkpointing": True, "lora_dropout": 0.2}
    straight = go("straight", max_train_steps=4, **flags)
    parts = go("parts", max_train_steps=2, **flags)
    go("parts", max_train_steps=4, resume_from_checkpoint="latest", **flags)
    assert_same_adapter(straight, parts)
    assert losses(straight) == losses(parts)


def test_class_pictures_and_samples_from_pictures(go, pictures, tmp_path):
    out = go(
        "out", with_prior_preservation=True, class_data_dir=tmp_path / "class", class_prompt="a glyph",
        num_class_images=2, num_inference_steps=4, mixed_precision="bf16", validation_images=[pictures / "0.png"],
        num_validation_images=1,
    )  # fmt: skip
    assert len(list((tmp_path / "class").glob("*.png"))) == 2
    assert (out / "samples" / "step-000002.png").is_file()
    assert all(np.isfinite(value).all() for value in tensors(out).values())


@pytest.mark.slow
def test_another_vae(go, tmp_path, tiny_sdxl_path):
    from conftest import make_vae
    from diffusers import AutoencoderKL

    torch.manual_seed(7)
    make_vae().save_pretrained(tmp_path / "vae")
    own = go("own")
    assert_same_adapter(own, go("same", pretrained_vae_model_name_or_path=tiny_sdxl_path / "vae"))
    other = go("other", pretrained_vae_model_name_or_path=tmp_path / "vae")
    assert any(not torch.equal(value, tensors(own)[key]) for key, value in tensors(other).items())
    settings = dict(AutoencoderKL.load_config(tmp_path / "vae")) | {"latent_channels": 8}
    AutoencoderKL.from_config(settings).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"latents of 8 channels, which .*wide makes: its UNet has 4 input"):
        go("wide", pretrained_vae_model_name_or_path=tmp_path / "wide")


def test_the_resolution_follows_the_model(base):
    assert base.check_resolution(None) == 32  # its own
    base.native_resolution = 2048
    assert base.check_resolution(None) == 1024


def test_what_is_no_sdxl_base_is_refused(go, tiny_sdxl_path, tmp_path):
    with pytest.raises(ValueError, match="--tokenizer_name names one tokenizer, but this model has several"):
        go("out", tokenizer_name=tiny_sdxl_path / "tokenizer")
    copy = shutil.copytree(tiny_sdxl_path, tmp_path / "copy")
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps(config | {"projection_class_embeddings_input_dim": 72}))
    with pytest.raises(ValueError, match="pooled text of width 24 and six sizes, its second text encoder gives 32"):
        go("out", model=copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"text_encoder": [None, None]}))
    with pytest.raises(ValueError, match="is it SDXL's refiner"):
        go("out", model=copy)
    assert not (tmp_path / "out").exists()
