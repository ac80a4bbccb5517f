"""An exception anywhere in a training run ends all of its processes within seconds, and names where it happened."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import training_helpers, vl_helpers
from support.faults import MESSAGE, assert_ended, fault_server

pytestmark = pytest.mark.slow

ENDLESS = {"max_train_steps": 1000, "train_batch_size": 1}


@dataclass(frozen=True)
class Trained:
    """A trainer: its script, its command line, one of its pictures, and what it calls in evaluations."""

    script: str
    words: Callable[..., list[str]]
    model: str  # a fixture
    data: str  # a fixture
    picture: str  # in the data's folder
    flags: dict
    evaluates: str
    evaluation_flags: dict
    evaluating_rank: int = 1  # the last process that does


def vl_words(fixtures: str, kind: str) -> Callable[..., list[str]]:
    """The command line for the model `kind` of a fixture that holds several."""
    return lambda models, data, output, **flags: vl_helpers.words(models[kind], data, output, **flags)


TRAINERS = {
    "sd": Trained(
        "train_apt_sd", training_helpers.command, "tiny_sd_path", "instance_dir", "picture-3.png",
        {"no-cache_latents": True},
        "apt_diffusion.training.grids:save_grid",
        {"validation_prompt": "x", "validation_steps": 2, "num_validation_images": 1, "num_inference_steps": 1},
        evaluating_rank=0,
    ),
    "vqa": Trained(
        "train_apt_vqa", vl_words("tiny_vl", "vilt"), "tiny_vl", "vqa_dir",
        "train2014/COCO_train2014_000000000003.jpg",
        {"min_answer_count": 3, "evaluation_steps": 1000},
        "apt_diffusion.training.vision_language.predict:gather_by_index",
        {"evaluation_steps": 2},
    ),
    "nlvr2": Trained(
        "train_apt_nlvr2", vl_words("tiny_vl", "meter"), "tiny_vl", "nlvr2_dir", "images/train/1/train-0-1-img0.png",
        {"evaluation_steps": 1000},
        "apt_diffusion.training.vision_language.predict:gather_by_index",
        {"evaluation_steps": 2},
    ),
    "retrieval": Trained(
        "train_apt_retrieval", vl_words("tiny_vl", "vilt"), "tiny_vl", "retrieval_dir", "flickr30k-images/train3.jpg",
        {"num_false_captions": 3},
        "apt_diffusion.training.vision_language.predict:gather_by_index",
        {"evaluation_steps": 2},
    ),
    "clip": Trained(
        "train_apt_clip", vl_words("tiny_clip", "clip"), "tiny_clip", "classes_dir", "images/train/1-0.png",
        {"seed": None, "seeds": 1, "num_shots": 2, "warmup_epochs": 0},
        "apt_diffusion.training.vision_language.predict:gather_by_index",
        {"evaluation_steps": 2},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with fault_server() as server:
        yield server


@pytest.fixture
def run(server, request, tmp_path):
    def run(trainer: str, fault: str, workers: int, processes: int):
        trained = TRAINERS[trainer]
        data = shutil.copytree(request.getfixturevalue(trained.data), tmp_path / "data")
        made, flags = make_fault(trained, fault, data, processes)
        flags = ENDLESS | trained.flags | flags | {"dataloader_num_workers": workers}
        words = trained.words(request.getfixturevalue(trained.model), data, tmp_path / "out", **flags)
        return server.run(trained.script, words, tmp_path / "log", made, processes)

    return run


def make_fault(trained: Trained, fault: str, data: Path, processes: int) -> tuple[dict, dict]:
    """The fault as `fault_server` takes it, and the flags that lead to it."""
    last = processes - 1
    match fault:
        case "data":
            return {"corrupt": str(data / trained.picture)}, {}
        case "loss":
            return {"call": "accelerate:Accelerator.backward", "number": 3, "rank": last}, {}
        case "evaluation":
            rank = min(last, trained.evaluating_rank)
            return {"call": trained.evaluates, "number": 1, "rank": rank}, trained.evaluation_flags
        case "saving":
            saves = "apt_diffusion.training.checkpoints:save_training_state"
            return {"call": saves, "number": 1, "rank": 0}, {"checkpointing_steps": 2}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["data", "loss", "evaluation", "saving"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_exception_ends_all_processes_and_names_its_place(run, trainer, fault, workers, processes):
    end = run(trainer, fault, workers, processes)
    named = {
        "data": [Path(TRAINERS[trainer].picture).name],
        "loss": [MESSAGE],
        "evaluation": [MESSAGE],
        "saving": [MESSAGE],
    }[fault]
    assert_ended(end, *named)
