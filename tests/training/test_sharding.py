"""The frozen base in shards (FSDP2), by accelerate's launcher: two processes on the CPU against one."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.launching import in_two_processes
from support.training_helpers import SCRIPT, assert_same_adapter, command, losses, train

from apt_diffusion.training.sharding import configure

COUNTER = Path(__file__).parents[1] / "support" / "count_shards.py"


FSDP = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")


@pytest.mark.slow
def test_two_shards_are_one_model_with_twice_the_batch(tiny_sd_path, instance_dir, tmp_path):
    flags = {
        "max_train_steps": 4, "gradient_accumulation_steps": 2, "train_text_encoder": True, "validation_split": 0.2,
        "validation_steps": 2, "keep_best": True, "num_validation_images": 1, "validation_prompt": "a sks glyph",
        "num_inference_steps": 2, "use_ema": True, "checkpointing_steps": 2, "new_tokens": ["sks"],
    }  # fmt: skip
    words = command(tiny_sd_path, instance_dir, tmp_path / "two", train_batch_size=1, **flags)
    output = in_two_processes(COUNTER, SCRIPT, *words, how=FSDP)
    shares = re.findall(r"<share: ([.\d]+), adapter whole: True>", output)
    assert len(shares) == 2 and sum(map(float, shares)) == pytest.approx(1, abs=0.02)
    one = train(tiny_sd_path, instance_dir, tmp_path / "one", train_batch_size=2, **flags)
    assert_same_adapter(one, tmp_path / "two", tolerance=1e-5)
    assert_same_adapter(one / "best", tmp_path / "two" / "best", tolerance=1e-5)
    assert np.allclose(losses(one), losses(tmp_path / "two"), atol=1e-5)
    pictures = [
        np.asarray(Image.open(folder / "samples" / "step-000004.png"), dtype=float)
        for folder in (one, tmp_path / "two")
    ]
    assert abs(pictures[0] - pictures[1]).max() <= 2
    resumed = tmp_path / "two" / "checkpoint-2"
    words = command(tiny_sd_path, instance_dir, tmp_path / "again", train_batch_size=1, **flags)
    in_two_processes(SCRIPT, *words, "--resume_from_checkpoint", resumed, how=FSDP)
    assert_same_adapter(tmp_path / "two", tmp_path / "again")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["miniature-sd3", "flux"])
def test_a_diffusion_transformer_is_sharded_too(tiny_transformer_path, instance_dir, tmp_path, model):
    path = model if model.startswith("miniature") else tiny_transformer_path(model)
    flags = {"max_train_steps": 2, "resolution": 32, "cache_text_embeddings": True, "cache_latents": True}
    words = command(path, instance_dir, tmp_path / "two", train_batch_size=1, **flags)
    output = in_two_processes(COUNTER, SCRIPT, *words, how=FSDP)
    assert len(re.findall(r"<share: 0\.\d+, adapter whole: True>", output)) == 2
    one = train(path, instance_dir, tmp_path / "one", train_batch_size=2, **flags)
    assert_same_adapter(one, tmp_path / "two", tolerance=1e-5)


@pytest.mark.parametrize(
    ("version", "can_shard", "message"), [("1", True, "--fsdp_version 2"), ("2", False, "a_script does not shard")]
)
def test_what_cannot_be_sharded_is_refused(monkeypatch, version, can_shard, message):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    accelerator = SimpleNamespace(num_processes=2, mixed_precision="no", state=SimpleNamespace())
    with pytest.raises(ValueError, match=message):
        configure(accelerator, "a_script", can_shard)


def test_one_process_has_nothing_to_share(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not configure(SimpleNamespace(num_processes=1), "a_script", False)
