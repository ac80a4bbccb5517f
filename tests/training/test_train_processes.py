"""The trainer as real processes: killed, terminated, and sharing the work between two of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.launching import in_two_processes
from support.training_helpers import SCRIPT, assert_same_adapter, command, losses, train

from apt_diffusion.training.checkpoints import list_checkpoints

pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).parents[1] / "support"
COUNTER, FRAGILE = SUPPORT / "count_reductions.py", SUPPORT / "fragile_end.py"
TIMEOUT = 120


def start(launcher, *args, **flags):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_DISABLE_RICH": "1"}
    words = [*launcher, str(SCRIPT), *command(*args, **flags)]
    return subprocess.Popen(
        words, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(process, condition):
    end = time.monotonic() + TIMEOUT
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"the process ended ({process.returncode}) or hung:\n{process.communicate()[0][-4000:]}")
        time.sleep(0.02)


@pytest.fixture
def one_thread():
    """As many threads as the processes have: sums are then added in the same order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_after_kill_9_a_run_resumes_exactly(tiny_sd_path, instance_dir, tmp_path, one_thread):
    flags = {"max_train_steps": 400, "checkpointing_steps": 1, "checkpoints_total_limit": 2, "train_batch_size": 1}
    out = tmp_path / "killed"
    process = start([sys.executable], tiny_sd_path, instance_dir, out, **flags)
    wait_for(process, lambda: len(list_checkpoints(out)) > 0 and max(list_checkpoints(out)) >= 5)
    time.sleep(0.013)  # somewhere between two steps, or within a checkpoint
    process.kill()
    process.communicate()
    reached = max(list_checkpoints(out))
    assert 5 <= reached < 400
    flags |= {"max_train_steps": reached + 2, "checkpointing_steps": 1000}
    train(tiny_sd_path, instance_dir, out, resume_from_checkpoint="latest", **flags)
    straight = train(tiny_sd_path, instance_dir, tmp_path / "straight", **flags)
    assert_same_adapter(straight, out)
    assert losses(straight) == losses(out)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_sigterm_to_the_whole_group_leaves_a_checkpoint(tiny_sd_path, instance_dir, tmp_path, one_thread):
    flags = {"max_train_steps": 4000, "train_batch_size": 1, "dataloader_num_workers": 1, "report_to": None}
    out = tmp_path / "stopped"
    process = start([sys.executable], tiny_sd_path, instance_dir, out, **flags)
    wait_for(process, lambda: (out / "losses.jsonl").is_file() and len(losses(out)) >= 3)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 143, output[-4000:]
    assert "Traceback" not in output
    # A newcomer's terminal: neither warnings nor notices of other libraries.
    assert "warn" not in output.lower() and "torchvision" not in output
    (reached,) = list_checkpoints(out)
    assert reached == len(losses(out)) >= 3
    assert not (out / "README.md").exists()
    flags |= {"max_train_steps": reached + 1, "dataloader_num_workers": 0, "report_to": "none"}
    train(tiny_sd_path, instance_dir, out, resume_from_checkpoint="latest", **flags)
    assert_same_adapter(train(tiny_sd_path, instance_dir, tmp_path / "straight", **flags), out)


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        # T5 is frozen beside the text encoders that are trained.
        ("miniature-sd3", {"resolution": 32, "max_sequence_length": 24, "train_text_encoder": True}),
        ("flux", {"resolution": 16, "max_sequence_length": 24, "train_text_encoder": True, "no_train_unet": True}),
        ("z-image", {"resolution": 16, "max_sequence_length": 48}),
    ],
)
def test_two_processes_train_a_transformer_as_one_does(tiny_transformer_path, instance_dir, tmp_path, model, flags):
    path = model if model.startswith("miniature") else tiny_transformer_path(model)
    flags = flags | {"max_train_steps": 3, "validation_split": 0.2, "validation_steps": 1}
    words = command(path, instance_dir, tmp_path / "two", train_batch_size=1, **flags)
    in_two_processes(FRAGILE, SCRIPT, *words)  # the launcher reports success, however the interpreter would have ended
    one = train(path, instance_dir, tmp_path / "one", train_batch_size=2, **flags)
    assert_same_adapter(one, tmp_path / "two", tolerance=1e-4)
    assert np.allclose(losses(one), losses(tmp_path / "two"), rtol=1e-4)


def test_two_processes_are_one_with_twice_the_batch(tiny_sd_path, instance_dir, tmp_path):
    class_dir = tmp_path / "class"
    flags = {
        "max_train_steps": 4, "gradient_accumulation_steps": 2, "train_text_encoder": True, "random_flip": True,
        "with_prior_preservation": True, "class_data_dir": class_dir, "class_prompt": "a glyph",
        "num_class_images": 3, "num_inference_steps": 1, "num_validation_images": 1,
        "instance_prompt": "a <sks> glyph", "new_tokens": ["<sks>"],
    }  # fmt: skip
    words = command(tiny_sd_path, instance_dir, tmp_path / "two", train_batch_size=1, **flags)
    output = in_two_processes(COUNTER, SCRIPT, *words)
    # In each process: of two models' gradients, once in each of four steps, not in each of their two batches.
    assert output.count("<reductions: 8>") == 2, output[-4000:]
    drawn = sorted(path.name for path in class_dir.iterdir())
    assert [name.split("-")[0] for name in drawn] == ["0", "1", "2"]
    one = train(tiny_sd_path, instance_dir, tmp_path / "one", train_batch_size=2, **flags)
    assert_same_adapter(one, tmp_path / "two", tolerance=1e-5)
    assert np.allclose(losses(one), losses(tmp_path / "two"), atol=1e-5)
    resumed = train(
        tiny_sd_path, instance_dir, tmp_path / "one", train_batch_size=2,
        resume_from_checkpoint=tmp_path / "two" / "checkpoint-4", **(flags | {"max_train_steps": 5}),
    )  # fmt: skip
    assert len(losses(resumed)) == 5
