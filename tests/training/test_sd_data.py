"""Pictures and captions of `train_apt_sd.py`: what is cached, cut and repeated, and pictures of the class."""

import json

import numpy as np
import pytest
from PIL import Image
from support.training_helpers import (
    assert_same_adapter,
    header,
    losses,
)

# Data flags


@pytest.mark.slow
def test_captions_change_the_training(go, instance_dir, tmp_path):
    captioned = tmp_path / "captioned"
    captioned.mkdir()
    for path in instance_dir.iterdir():
        (captioned / path.name).write_bytes(path.read_bytes())
        (captioned / path.name).with_suffix(".txt").write_text("a sks glyph")
    same = go(instance_data_dir=captioned)
    assert_same_adapter(same, go())
    (captioned / "picture-0.txt").write_text("a sks glyph on grass")
    other = go(instance_data_dir=captioned, max_train_steps=3)
    with pytest.raises(AssertionError):
        assert_same_adapter(other, go(max_train_steps=3))


def test_foreign_files_beside_the_pictures_do_no_harm(go, instance_dir, tmp_path):
    """D3: these crash diffusers' script in the middle of a run."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in instance_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "readme.txt").write_text("x")
    (folder / ".ipynb_checkpoints").mkdir()
    assert_same_adapter(go(instance_data_dir=folder), go())


@pytest.fixture
def wide_pictures(tmp_path):
    folder = tmp_path / "wide"
    folder.mkdir()
    for index, size in enumerate([(40, 80), (80, 40), (33, 32)]):
        pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((size[1], size[0])).save(folder / f"{index}.png")
    return folder


def test_cached_latents_and_embeddings_are_those_of_every_step(go, wide_pictures):
    flags = {"instance_data_dir": wide_pictures, "random_flip": True, "max_train_steps": 6}
    cached = go(**flags)
    anew = go(**{"no-cache_latents": True, "no-cache_text_embeddings": True}, **flags)
    assert_same_adapter(cached, anew, tolerance=2e-4)
    assert np.allclose(losses(cached), losses(anew), atol=1e-4)


def test_frozen_parts_are_let_go_after_caching(go, monkeypatch):
    import gc
    import weakref

    import train_apt_sd

    from apt_diffusion.training.text_to_image.stable_diffusion import StableDiffusionBase

    alive = {}

    def watch(part):
        original = getattr(StableDiffusionBase, part)

        def load(self, *args):
            model = original(self, *args)
            alive[part] = weakref.ref(model)
            return model

        monkeypatch.setattr(StableDiffusionBase, part, load)

    watch("vae")
    watch("text_encoder")
    original = train_apt_sd.training_loss

    def loss(*args):
        gc.collect()
        assert alive["vae"]() is None and alive["text_encoder"]() is None
        return original(*args)

    monkeypatch.setattr(train_apt_sd, "training_loss", loss)
    go()


@pytest.mark.slow
def test_cropping_flags_change_what_is_seen(go, wide_pictures):
    flags = {"instance_data_dir": wide_pictures, "max_train_steps": 4}
    plain = losses(go(**flags))
    assert losses(go(center_crop=True, **flags)) != plain
    assert losses(go(random_flip=True, **flags)) != plain
    assert losses(go(image_interpolation_mode="nearest", **flags)) != plain


def test_epochs_and_repeats_set_the_number_of_steps(go):
    assert len(losses(go(max_train_steps=None, num_train_epochs=2, train_batch_size=2))) == 6  # ceil(5 / 2) twice
    assert len(losses(go(max_train_steps=None, repeats=2, train_batch_size=2, gradient_accumulation_steps=2))) == 3


def test_the_resolution_follows_the_model(go, tiny_sd_path):
    from apt_diffusion.training.text_to_image.stable_diffusion import StableDiffusionBase

    out = go()
    assert json.loads(header(out)["training"])["resolution"] == 32
    base = StableDiffusionBase(str(tiny_sd_path))
    base.native_resolution = 768
    assert base.check_resolution(None) == 512 and base.check_resolution(768) == 768


# Prior preservation


@pytest.mark.slow
def test_missing_class_pictures_are_drawn_and_kept(go, tmp_path):
    folder = tmp_path / "class"
    flags = {
        "with_prior_preservation": True, "class_data_dir": folder, "class_prompt": "a glyph", "num_class_images": 3,
        "num_inference_steps": 2, "sample_batch_size": 2,
    }  # fmt: skip
    first = go(**flags)
    drawn = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(name.split("-")[0] for name in drawn) == ["0", "1", "2"]
    assert_same_adapter(first, go(**flags))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == drawn
    lost = sorted(drawn)[2]
    (folder / lost).unlink()
    go(**flags)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == drawn  # picture i depends on the seed and i
    weighted = go(prior_loss_weight=0.0, **flags)
    plain = go(**(flags | {"with_prior_preservation": False, "class_data_dir": None, "class_prompt": None}))
    assert np.allclose(losses(weighted), losses(plain), atol=1e-5)
    assert not np.allclose(losses(weighted), losses(first), atol=1e-2)


def test_foreign_files_among_class_pictures_are_named_once(go, tmp_path, caplog):
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (32, 32), "blue").save(folder / "0.png")
    (folder / "Thumbs.db").write_bytes(b"x")
    go(with_prior_preservation=True, class_data_dir=folder, class_prompt="a glyph", num_class_images=1)
    assert caplog.text.count("Thumbs.db") == 1


def test_class_pictures_may_have_captions(go, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    for index in range(2):
        Image.new("RGB", (32, 32), "blue").save(folder / f"{index}.png")
    flags = {"with_prior_preservation": True, "class_data_dir": folder, "class_prompt": "a glyph"}
    plain = go(num_class_images=2, **flags)
    (folder / "0.txt").write_text("a blue square")
    assert losses(go(num_class_images=2, **flags)) != losses(plain)
    assert json.loads((plain / "checkpoint-2" / "training_state.json").read_text())["position"] == 4
