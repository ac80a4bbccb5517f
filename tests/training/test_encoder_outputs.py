"""Latents and embeddings kept in a folder (`--cache_encoder_outputs`): the same runs, and nothing computed twice."""

import logging
import os
import shutil

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.training_helpers import assert_same_adapter, losses, train

from apt_diffusion.training.text_to_image import encoder_outputs
from apt_diffusion.training.text_to_image.encoder_outputs import EncoderOutputs, files_of
from apt_diffusion.training.text_to_image.stable_diffusion import StableDiffusionBase

FLAGS = {"max_train_steps": 3, "random_flip": True, "validation_split": 0.2, "validation_steps": 1}


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "kept"


@pytest.fixture
def said(caplog):
    """What the last run found and computed."""

    def last():
        (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Encoder outputs in")][-1:]
        found, computed = line.split(": ")[1].split(", ")
        return int(found.split()[0]), int(computed.split()[0])

    caplog.set_level(logging.INFO)
    return last


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def assert_same_run(a, b):
    assert_same_adapter(a, b)
    assert losses(a) == losses(b)
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()


def test_runs_with_it_are_runs_without(go, kept, said):
    plain = go("plain", **FLAGS)
    first = go("first", cache_encoder_outputs=kept, **FLAGS)
    found, computed = said()
    assert found == 0 and computed == len(files(kept))
    second = go("second", cache_encoder_outputs=kept, **FLAGS)
    assert said() == (computed, 0)
    assert_same_run(plain, first)
    assert_same_run(plain, second)


def test_another_run_encodes_nothing_and_loads_no_text_encoder(go, kept, monkeypatch):
    go(cache_encoder_outputs=kept, **FLAGS)
    before = {path: path.read_bytes() for path in files(kept)}

    def fail(*_):
        raise AssertionError("an encoder was used")

    for part in ("text_encoders", "latent_distribution"):
        monkeypatch.setattr(StableDiffusionBase, part, fail)
    go(cache_encoder_outputs=kept, rank=2, learning_rate=1e-3, **FLAGS)  # with another adapter
    assert before == {path: path.read_bytes() for path in files(kept)}


@pytest.mark.parametrize("kind", ["flux", "qwen-image"])
def test_families_with_language_models(tiny_transformer_path, instance_dir, tmp_path, kept, said, kind):
    flags = {"resolution": 32, "max_sequence_length": 24}
    plain, first, second = (
        train(tiny_transformer_path(kind), instance_dir, tmp_path / name, cache_encoder_outputs=folder, **flags)
        for name, folder in (("plain", None), ("first", kept), ("second", kept))
    )
    assert said()[1] == 0
    assert_same_adapter(plain, first)
    assert_same_adapter(plain, second)


def test_what_they_depend_on_is_in_the_key(go, kept, said, instance_dir, tiny_sd_path, tmp_path):
    flags = {"max_train_steps": 2, "cache_encoder_outputs": kept, "center_crop": True}
    pictures = tmp_path / "pictures"
    shutil.copytree(instance_dir, pictures)
    go(**flags)
    latents, texts = (len(files(kept / kind)) for kind in ("latents", "texts"))
    go(instance_data_dir=pictures, **flags)
    assert said() == (latents + texts, 0)  # the same content elsewhere
    go(image_interpolation_mode="nearest", **flags)
    assert said() == (texts, latents)
    go(text_encoder_use_attention_mask=True, **flags)
    assert said() == (latents, texts)
    go(instance_prompt="a sks sign", **flags)
    assert said() == (latents + texts - 1, 1)
    for index, path in enumerate(sorted(pictures.glob("*.png"))):
        Image.new("RGB", Image.open(path).size, (index, 0, 0)).save(path)
    go(instance_data_dir=pictures, **flags)
    assert said() == (texts, latents)
    base = tmp_path / "base"
    shutil.copytree(tiny_sd_path, base)
    (weights,) = (base / "text_encoder").glob("*.safetensors")
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    train(base, instance_dir, tmp_path / "other", **flags)
    assert said() == (0, latents + texts)


def test_a_damaged_file_is_computed_anew_with_a_word(go, kept, said, caplog):
    flags = {"max_train_steps": 2, "cache_encoder_outputs": kept}
    plain = go("plain", **flags)
    count = len(files(kept))
    cut, flipped = files(kept / "latents")[0], files(kept / "texts")[0]
    cut.write_bytes(cut.read_bytes()[:-4])
    content = bytearray(flipped.read_bytes())
    content[-3] ^= 1  # within the numbers
    flipped.write_bytes(content)
    again = go("again", **flags)
    words = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
    assert len(words) == 2 and all(any(str(path) in word for word in words) for path in (cut, flipped))
    assert said() == (count - 2, 2)
    assert_same_adapter(plain, again)
    go(**flags)
    assert said() == (count, 0)


def test_a_full_disk_is_said_once_and_ends_nothing(go, kept, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    plain = go("plain", max_train_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(encoder_outputs, "save_file", full)
        out = go("out", max_train_steps=2, cache_encoder_outputs=kept)
    assert_same_adapter(plain, out)
    words = [record.getMessage() for record in caplog.records if "takes no more" in record.getMessage()]
    assert len(words) == 1 and "No space left" in words[0] and files(kept) == []


def test_the_folder_is_bounded_and_what_was_used_last_stays(kept, tmp_path):
    def embed(outputs, *prompts):
        for prompt in prompts:
            outputs.embeddings(prompt, lambda: {"a": torch.ones(1000)})

    def age(seconds):
        for path in files(kept):
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))

    size = 3 * 5000
    embed(EncoderOutputs(kept, 0, 0, limit=size), "old", "older")
    age(100)
    embed(EncoderOutputs(kept, 0, 0, limit=size), "old", "new")
    age(100)
    outputs = EncoderOutputs(kept, 0, 0, limit=size)
    embed(outputs, "newest")
    left = kept / "texts" / ".left.tmp.safetensors"
    left.write_bytes(b"unfinished")
    outputs.trim()
    assert left.exists()
    os.utime(left, (0, 0))
    outputs.trim()
    assert not left.exists()
    again = EncoderOutputs(kept, 0, 0, limit=size)
    embed(again, "old", "new", "newest")
    assert (again.found, again.computed) == (3, 0)
    embed(again, "older")
    assert again.computed == 1
    EncoderOutputs(kept, 0, 0, limit=0).trim()
    assert files(kept) == []


def test_models_of_the_users_in_the_folder_are_not_touched(kept):
    own = [
        kept / "sdxl" / "model.safetensors",
        kept / "texts" / "mine.safetensors",
        kept / "sdxl" / ".own.safetensors",
    ]
    for file in own:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"a model")
        os.utime(file, (0, 0))
    outputs = EncoderOutputs(kept, 0, 0, limit=0)
    outputs.embeddings("a prompt", lambda: {"a": torch.ones(1)})
    EncoderOutputs(kept, 0, 0, limit=0).trim()
    assert sorted(kept.rglob("*.safetensors")) == sorted(own)


def test_an_empty_name_is_no_folder(go, no_models):
    with pytest.raises(ValueError, match="--cache_encoder_outputs names a folder, but is empty"):
        go(cache_encoder_outputs="")


def test_models_of_the_hub_are_known_by_their_commit(monkeypatch, tmp_path):
    def cached(name, file, revision=None):
        return f"/hub/models--me--sd/snapshots/{revision or 'abc'}/{file}" if file == "unet/config.json" else None

    monkeypatch.setattr(encoder_outputs, "try_to_load_from_cache", cached)
    assert files_of("me/sd", "*") == ["me/sd", "abc"] and files_of("me/sd", "*", "def") == ["me/sd", "def"]
    monkeypatch.setattr(encoder_outputs, "try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"cannot tell which commit of me/sd this is: download it to a folder"):
        files_of("me/sd", "*")
    assert huggingface_hub.try_to_load_from_cache("me/sd", "model_index.json", cache_dir=tmp_path) is None


def test_a_file_in_place_of_the_folder_is_refused(go, tmp_path, no_models):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "kept"):
        with pytest.raises(
            ValueError, match=r"--cache_encoder_outputs names a folder, but .* is a file, or is in one"
        ):
            go(cache_encoder_outputs=place)
