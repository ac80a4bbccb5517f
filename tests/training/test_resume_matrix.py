"""Exact resume over the trainer's options: every pair of them, on and off, in runs that end at random places.

A new option of the trainer that decides what a step computes belongs in `OPTIONS`. Every optimizer occurs with and
without each of them, and so does every base.
"""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.quantised import need, write_gguf
from support.training_helpers import assert_same_adapter, losses, train

from apt_diffusion.training.optimizer_choice import NAMED
from apt_diffusion.training.text_to_image.bases import open_base

pytestmark = pytest.mark.slow

OPTIONS = {
    "buckets": {"aspect_ratio_buckets": "32,48;48,32;32,32"},
    "masks": {"masked_loss": True},
    "tags": {"shuffle_caption": True, "caption_tag_dropout_rate": 0.3, "keep_tokens": 1, "enable_wildcard": True},
    "dropped captions": {"caption_dropout_rate": 0.5},
    "class": {"with_prior_preservation": True, "class_prompt": "a glyph", "num_class_images": 3},
    "noise": {"noise_offset": 0.1, "random_flip": True, "lora_dropout": 0.3},
    "new words": {"new_tokens": ["<new>"], "new_tokens_lr": 0.1},
    "text encoder": {"train_text_encoder": True},
    "no caches": {"no-cache_latents": True, "dataloader_num_workers": 1},
    "accumulation": {"gradient_accumulation_steps": 2},
    "rates": {"keys_lr_ratio": 0.3, "log_scale_lr_ratio": 3.0, "gate_lr_ratio": 2.0},
    "average": {"use_ema": True},
    "sampled prompts": {"sample_prompts": "a glyph --a 0.5 --s 1\n", "validation_steps": 1},
    "held out": {"validation_split": 0.2, "validation_steps": 1, "keep_best": True},
    "quantised base": {"base_precision": "denoiser.gguf"},
    "outputs on disk": {"cache_encoder_outputs": "kept"},
}  # fmt: skip
OPTIMIZERS = {
    "adamw": {},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "lion": {"optimizer": "lion", "learning_rate": 1e-3},
    "adafactor": {"optimizer": "adafactor"},
    "muon": {"optimizer": "muon"},
    "schedulefree": {"optimizer": "schedulefree"},
}
# Prodigy has one rate for all, and a schedule-free optimizer an average of its own.
REFUSED = {"prodigy": ("rates", "new words"), "schedulefree": ("average",)}
BASES = ("tiny_sd_path", "tiny_sdxl_path", "miniature-sd3")
STEPS = 4
Row = dict[str, Any]


def covering(choices: dict[str, Sequence[Any]]) -> list[Row]:
    """Rows of one value for each name, in which every pair of values of two names occurs. Chosen greedily."""
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(choices, 2)
        for x, y in itertools.product(choices[a], choices[b])
    }
    draws, rows = random.Random(0), []
    while missing:
        candidates = [{name: draws.choice(values) for name, values in choices.items()} for _ in range(200)]
        hits = [{pair for pair in missing if all(row[name] == value for name, value in pair)} for row in candidates]
        best = max(range(len(hits)), key=lambda index: len(hits[index]))
        missing -= hits[best]
        rows.append(candidates[best])
    return rows


CHOICES = {name: (True, False) for name in OPTIONS} | {"optimizer": tuple(OPTIMIZERS), "base": BASES}
ROWS = covering(CHOICES)


def taken(row: Row) -> list[str]:
    return [name for name in OPTIONS if row[name]]


def quantised(base, folder):
    """The base's denoiser as a GGUF file, in the format that needs no library beyond the tests' own."""
    need("gguf")
    return write_gguf(folder / "denoiser.gguf", open_base(str(base)).denoiser(torch.float32))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five pictures of several shapes with tags, three of them with masks."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, size in enumerate([(40, 80), (80, 40), (33, 32), (60, 40), (30, 62)]):
        draws = np.random.default_rng(index)
        Image.fromarray(draws.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"sks <new> glyph, number {index}, {{red|green}}, small, round")
        if index < 3:
            mask = np.zeros(size, dtype=np.uint8)
            mask[: size[0] // 2] = 200
            Image.fromarray(mask).save(folder / f"{index}-mask.png")
    return folder


def test_every_pair_of_options_occurs_in_all_ways():
    for a, b in itertools.combinations(CHOICES, 2):
        assert {(row[a], row[b]) for row in ROWS} == set(itertools.product(CHOICES[a], CHOICES[b])), (a, b)
    assert len(ROWS) <= 24


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ", ".join([row["base"], row["optimizer"], *taken(row)]))
def test_a_killed_run_ends_where_it_would_have(pictures, instance_dir, tmp_path, row, monkeypatch, request):
    import train_apt_sd

    if row["optimizer"] in NAMED:
        pytest.importorskip(NAMED[row["optimizer"]][0].partition(".")[0])
    base = row["base"] if row["base"].startswith("miniature") else request.getfixturevalue(row["base"])
    flags = {"max_train_steps": STEPS, "checkpointing_steps": 1, "train_batch_size": 2, "resolution": 32}
    for name in taken(row):
        flags |= OPTIONS[name]
    flags |= OPTIMIZERS[row["optimizer"]]
    for name in REFUSED.get(row["optimizer"], ()):
        flags = {key: value for key, value in flags.items() if key not in OPTIONS[name]}
    if row["quantised base"]:
        flags["base_precision"] = quantised(base, tmp_path)
    if row["outputs on disk"]:
        flags["cache_encoder_outputs"] = tmp_path / "kept"
    if row["class"]:
        flags["class_data_dir"] = instance_dir
    if row["sampled prompts"]:
        (tmp_path / "prompts.txt").write_text(flags["sample_prompts"])
        flags["sample_prompts"] = tmp_path / "prompts.txt"

    def go(out, **more):
        return train(base, pictures, tmp_path / out, **flags | more)

    straight = go("straight")
    draws = random.Random(str(row))
    original, calls = train_apt_sd.training_loss, itertools.count()
    last = draws.randrange(1, STEPS * flags.get("gradient_accumulation_steps", 1))

    def loss(*args):
        if next(calls) == last:
            raise MemoryError("killed")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_apt_sd, "training_loss", loss)
        with pytest.raises(MemoryError, match="killed"):
            go("parts")
    parts = go("parts", resume_from_checkpoint="latest")
    assert_same_adapter(straight, parts)
    assert losses(straight) == losses(parts) and len(losses(parts)) == STEPS
    if row["held out"]:
        assert (straight / "metrics.jsonl").read_text() == (parts / "metrics.jsonl").read_text()
        assert_same_adapter(straight / "best", parts / "best")
