"""METER's encoder cache: the same losses, and nothing lost or mixed up on disk."""

import os
import pickle
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import meter_config
from PIL import Image

import apt_diffusion as apt
from apt_diffusion.models.meter import MeterForQuestionAnswering
from apt_diffusion.models.meter.encoder_cache import EncoderCache, picture_key
from apt_diffusion.models.meter.feature_store import FeatureStore

TEXTS = [[0, 5, 6, 7, 2], [0, 9, 2], [0, 11, 12, 2]]


def make_model():
    torch.manual_seed(0)
    model = MeterForQuestionAnswering(meter_config(num_labels=7)).eval()
    apt.add_apt(model, apt.APTConfig(num_prompts=4, rank=2, modules_to_save=["classifier"]))
    apt.freeze_base(model)
    return model


def image_processor():
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for index, path in enumerate(paths):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def batch_of(pictures):
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in TEXTS], batch_first=True, padding_value=1)
    pixels = image_processor()(images=[Image.open(p) for p in pictures], return_tensors="pt")["pixel_values"]
    return {"input_ids": ids, "attention_mask": (ids != 1).long(), "pixel_values": pixels}


def losses(model, batch, labels, steps=3):
    model = pickle.loads(pickle.dumps(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    found = []
    for _ in range(steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_the_same_losses(pictures, tmp_path):
    model, labels = make_model(), torch.rand(3, 7)
    cache = EncoderCache(model, tmp_path / "cache", image_processor())
    needed = cache.bytes_needed(pictures, TEXTS)
    assert needed == 4 * (3 * 5 * 16 + (5 + 3 + 4) * 24)
    cache.fill_images(model, pictures, batch_size=2)
    cache.fill_texts(model, TEXTS, batch_size=2)
    assert cache.bytes_needed(pictures, TEXTS) == 0
    raw = batch_of(pictures)
    kept = {
        "attention_mask": raw["attention_mask"],
        "image_embeds": cache.image_embeds(pictures),
        "text_embeds": cache.text_embeds(raw["input_ids"], raw["attention_mask"]),
    }
    assert kept["text_embeds"].shape == (3, 5, 24) and not kept["text_embeds"][1, 3:].any()
    expected = losses(model, raw, labels)
    assert losses(model, kept, labels) == pytest.approx(expected, rel=1e-5) and expected[0] > expected[-1]
    twice = cache.image_embeds([pictures[1], pictures[1]])
    assert torch.equal(twice[0], kept["image_embeds"][1]) and torch.equal(twice[0], twice[1])


def test_a_second_run_computes_nothing(pictures, tmp_path, monkeypatch):
    model = make_model()
    first = EncoderCache(model, tmp_path / "cache", image_processor())
    first.fill_images(model, pictures)
    first.fill_texts(model, TEXTS)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    again = make_model()
    for parameter in again.meter.cross_modal_text_layers.parameters():
        parameter.data += 1  # not the encoders': another task or adapter uses the same features
    second = pickle.loads(pickle.dumps(EncoderCache(again, tmp_path / "cache", image_processor())))
    monkeypatch.setattr(type(again.meter), "get_image_features", None)
    monkeypatch.setattr(type(again.meter), "get_text_features", None)
    second.fill_images(again, pictures)
    second.fill_texts(again, TEXTS)
    assert torch.equal(second.image_embeds(pictures), first.image_embeds(pictures))
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}


def test_other_weights_settings_or_pictures_are_other_features(pictures, tmp_path):
    model = make_model()
    cache = EncoderCache(model, tmp_path / "cache", image_processor())
    cache.fill_images(model, pictures)
    cache.fill_texts(model, TEXTS)
    larger = image_processor()
    larger.size = {"shortest_edge": 18}
    assert EncoderCache(model, tmp_path / "cache", larger).bytes_needed(pictures, TEXTS) > 0
    half = EncoderCache(model, tmp_path / "cache", image_processor(), torch.float16)
    assert half.bytes_needed(pictures, TEXTS) == 2 * (3 * 5 * 16 + 12 * 24)
    with torch.no_grad():
        model.meter.vision_model.post_layernorm.bias += 1e-6
    other = EncoderCache(model, tmp_path / "cache", image_processor())
    assert other.bytes_needed(pictures) > 0 and other.bytes_needed((), TEXTS) == 0

    Image.new("RGB", (30, 20), "red").save(pictures[1])
    with pytest.raises(ValueError, match=r"1 of 3 are not in .*images-.*, or have changed since: .*1\.png"):
        cache.image_embeds(pictures)
    with pytest.raises(ValueError, match=r"1 of 1 are not in .*texts-.*\[0, 8, 2\]"):
        cache.text_embeds(torch.tensor([[0, 8, 2]]), torch.ones(1, 3))


def test_encoders_that_are_not_fixed_are_refused(tmp_path):
    model = make_model()
    model.meter.text_model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"RobertaModel's embeddings.* is trainable.*Freeze"):
        EncoderCache(model, tmp_path, image_processor())
    adapted = make_model()
    cache = EncoderCache(adapted, tmp_path, image_processor())
    everywhere = apt.APTConfig(num_prompts=3, target_modules=r".*vision_model.*self_attn")
    apt.add_apt(adapted, everywhere, "vision")
    adapted.requires_grad_(False)
    with pytest.raises(ValueError, match=r"CLIPVisionModel's .*apt\..* is an adapter's"):
        cache.fill_texts(adapted, TEXTS)
    apt.remove_apt(adapted, "vision")
    cache.fill_texts(adapted, TEXTS)


def test_no_room_is_said_before_the_first_picture(pictures, tmp_path, monkeypatch):
    model = make_model()
    cache = EncoderCache(model, tmp_path / "cache", image_processor())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 100))
    monkeypatch.setattr(type(model.meter), "get_image_features", None)
    with pytest.raises(OSError, match=r"needs 0\.00 GiB, 0\.00 GiB are free\. Choose another folder"):
        cache.fill_images(model, pictures)


def test_what_was_computed_before_an_error_is_kept(pictures, tmp_path):
    model = make_model().train()
    cache = EncoderCache(model, tmp_path / "cache", image_processor())
    pictures[2].write_bytes(b"no picture")
    with pytest.raises(OSError, match="cannot identify"):
        cache.fill_images(model, pictures, batch_size=1)
    assert model.meter.vision_model.training and len(cache.images) == 2
    assert cache.image_embeds(pictures[:2]).shape == (2, 5, 16)


def test_broken_and_unfinished_shards(tmp_path, monkeypatch):
    store = FeatureStore(tmp_path)
    store.add({"a": torch.ones(3)})
    (shard,) = tmp_path.glob("*.safetensors")
    (tmp_path / ".half.tmp").write_bytes(b"unfinished")
    assert "a" in FeatureStore(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"No space left.*kept: make room and run again"):
        store.add({"b": torch.ones(2)})
    assert len(list(tmp_path.iterdir())) == 2 and "b" not in store
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"broken\.safetensors is damaged .*delete it and run again"):
        FeatureStore(tmp_path)


def test_processes_share_the_work(pictures, tmp_path):
    """Two that split it, and a third that does all of it: each opened the cache before any had filled it."""
    model = make_model()
    shares = ((0, 2), (1, 2), (0, 1))
    caches = [EncoderCache(model, tmp_path / "cache", image_processor()) for _ in shares]

    def fill(job):
        cache, share = job
        cache.fill_images(model, pictures, batch_size=1, share=share)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(fill, zip(caches, shares, strict=True)))
    with torch.no_grad():
        expected = model.meter.get_image_features(batch_of(pictures)["pixel_values"])
    for cache in caches:  # also the first, which has not looked since
        assert torch.allclose(cache.image_embeds(pictures), expected, atol=1e-6)
    kept = caches[0].images
    assert len(kept) == len(pictures) and all(picture_key(path) in kept for path in pictures)


def test_a_shard_holds_only_what_nobody_else_wrote(tmp_path):
    first, second = FeatureStore(tmp_path), FeatureStore(tmp_path)
    first.add({"a": torch.ones(3)})
    second.add({"a": torch.zeros(3), "b": torch.ones(2)})
    second.add({"a": torch.zeros(3)})
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    third = FeatureStore(tmp_path)
    assert len(third) == 2 and torch.equal(third["a"], torch.ones(3)) and torch.equal(third["b"], torch.ones(2))
