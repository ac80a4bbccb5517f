"""Exact resume over the options of the data: every pair of them, on and off, in runs that end at random places.

A new option of the trainer that decides what a step computes belongs in `OPTIONS`.
"""

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image
from support.quantised import need, write_gguf
from support.training_helpers import assert_same_adapter, losses

from apt_diffusion.training.text_to_image.bases import open_base

pytestmark = pytest.mark.slow

OPTIONS = {
    "buckets": {"aspect_ratio_buckets": "32,48;48,32;32,32"},
    "masks": {"masked_loss": True},
    "tags": {"shuffle_caption": True, "caption_tag_dropout_rate": 0.3, "keep_tokens": 1, "enable_wildcard": True},
    "dropped captions": {"caption_dropout_rate": 0.5},
    "class": {"with_prior_preservation": True, "class_prompt": "a glyph", "num_class_images": 3},
    "noise": {"noise_offset": 0.1, "random_flip": True, "lora_dropout": 0.3},
    "new words": {"new_tokens": ["sks"], "new_tokens_lr": 0.1},
    "text encoder": {"train_text_encoder": True},
    "no caches": {"no-cache_latents": True, "dataloader_num_workers": 1},
    "accumulation": {"gradient_accumulation_steps": 2},
    "rates": {"keys_lr_ratio": 0.3, "log_scale_lr_ratio": 3.0, "gate_lr_ratio": 2.0},
    "average": {"use_ema": True},
    "sampled prompts": {"sample_prompts": "a glyph --a 0.5 --s 1\n", "validation_steps": 1},
    "held out": {"validation_split": 0.2, "validation_steps": 1, "keep_best": True},
    "quantised base": {"base_precision": "unet.gguf"},
    "outputs on disk": {"cache_encoder_outputs": "kept"},
}  # fmt: skip
STEPS = 4


def covering(names: list[str]) -> list[tuple[str, ...]]:
    """Sets of names in which every pair of names occurs in all four ways: both, either, none. Chosen greedily."""
    missing = {
        ((a, x), (b, y))
        for (a, b), x, y in itertools.product(itertools.combinations(names, 2), (True, False), (True, False))
    }
    draws, rows = random.Random(0), []
    while missing:
        candidates = [{name: draws.random() < 0.5 for name in names} for _ in range(200)]
        hits = [{pair for pair in missing if all(row[name] is state for name, state in pair)} for row in candidates]
        best = max(range(len(hits)), key=lambda index: len(hits[index]))
        missing -= hits[best]
        rows.append(tuple(name for name in names if candidates[best][name]))
    return rows


ROWS = covering(list(OPTIONS))


@pytest.fixture(scope="module")
def quantised_unet(tiny_sd_path, tmp_path_factory):
    """The tiny base's UNet as a GGUF file, in the format that needs no library beyond the tests' own."""
    need("gguf")
    model = open_base(str(tiny_sd_path)).denoiser(torch.float32)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "unet.gguf", model)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five pictures of several shapes with tags, three of them with masks."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, size in enumerate([(40, 80), (80, 40), (33, 32), (60, 40), (30, 62)]):
        draws = np.random.default_rng(index)
        Image.fromarray(draws.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"sks glyph, number {index}, {{red|green}}, small, round")
        if index < 3:
            mask = np.zeros(size, dtype=np.uint8)
            mask[: size[0] // 2] = 200
            Image.fromarray(mask).save(folder / f"{index}-mask.png")
    return folder


def test_every_pair_of_options_occurs_in_all_ways():
    for a, b in itertools.combinations(OPTIONS, 2):
        assert {(a in row, b in row) for row in ROWS} == set(itertools.product((True, False), repeat=2)), (a, b)
    assert len(ROWS) <= 12


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ", ".join(row) or "none")
def test_a_killed_run_ends_where_it_would_have(go, pictures, instance_dir, quantised_unet, row, monkeypatch, tmp_path):
    import train_apt_sd

    flags = {"instance_data_dir": pictures, "max_train_steps": STEPS, "checkpointing_steps": 1, "train_batch_size": 2}
    for name in row:
        flags |= OPTIONS[name]
    if "quantised base" in row:
        flags["base_precision"] = quantised_unet
    if "outputs on disk" in row:
        flags["cache_encoder_outputs"] = tmp_path / "kept"
    if "class" in row:
        flags["class_data_dir"] = instance_dir
    if "sampled prompts" in row:
        (tmp_path / "prompts.txt").write_text(flags["sample_prompts"])
        flags["sample_prompts"] = tmp_path / "prompts.txt"
    straight = go("straight", **flags)
    draws = random.Random(", ".join(row))
    original, calls = train_apt_sd.training_loss, itertools.count()
    last = draws.randrange(1, STEPS * flags.get("gradient_accumulation_steps", 1))

    def loss(*args):
        if next(calls) == last:
            raise MemoryError("killed")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_apt_sd, "training_loss", loss)
        with pytest.raises(MemoryError, match="killed"):
            go("parts", **flags)
    parts = go("parts", resume_from_checkpoint="latest", **flags)
    assert_same_adapter(straight, parts)
    assert losses(straight) == losses(parts) and len(losses(parts)) == STEPS
    if "held out" in row:
        assert (straight / "metrics.jsonl").read_text() == (parts / "metrics.jsonl").read_text()
        assert_same_adapter(straight / "best", parts / "best")
