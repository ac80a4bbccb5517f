"""Training jobs of the studio: processes of their own, found again, stopped and resumed."""

import errno
import json
import resource
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.studio_helpers import ANNA, BERT, SCRIPT, cut_off, picture

from apt_diffusion import StableDiffusionAPTPipeline
from apt_diffusion.studio.generation import Progress
from apt_diffusion.studio.library import Library
from apt_diffusion.studio.studio import Studio
from apt_diffusion.studio.training import JOB_NAME, Lesson, Trainings

pytestmark = pytest.mark.slow


@pytest.fixture
def trainings(tmp_path, tiny_sd_path):
    library = Library(tmp_path / "adapters")
    flags = {"num_prompts": 4, "train_batch_size": 1, "num_validation_images": 1, "num_inference_steps": 2}
    return Trainings(SCRIPT, str(tiny_sd_path), library, flags, max_steps=100_000)


def wait_for(trainings, condition, seconds: float = 240):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        status = trainings.status(ANNA)
        if condition(status):
            return status
        time.sleep(0.2)
    raise AssertionError(f"still {status.state} at step {status.step}: {status.problem}")


def job_file(trainings):
    """What is known of the visitor's only job, on disk."""
    (file,) = (trainings.library.visitor_folder(ANNA) / "trainings").glob(f"*/{JOB_NAME}")
    return file


def process_of(trainings):
    return psutil.Process(json.loads(job_file(trainings).read_text())["pid"])


def test_a_training_outlives_its_server_is_stopped_resumed_and_finishes(trainings, tmp_path, tiny_sd_path):
    pictures = [picture(tmp_path / f"{i}.png", seed=i) for i in range(2)]
    lesson = Lesson("My dog", "--a sks glyph", steps=5_000, learning_rate=1e-3)
    name = trainings.start(ANNA, pictures, ["", "a caption"], lesson)
    assert name == "my-dog" and trainings.status(BERT) is None
    with pytest.raises(ValueError, match="still running"):
        trainings.start(ANNA, pictures, [], lesson)
    wait_for(trainings, lambda status: status.step >= 2)

    # Another server: nothing but the folder is left.
    again = Trainings(SCRIPT, str(tiny_sd_path), Library(trainings.library.folder), trainings.defaults, 100_000)
    assert again.status(ANNA).state == "running"
    again.cancel(ANNA)
    status = wait_for(trainings, lambda status: status.is_over)
    assert status.state == "stopped" and status.step >= 2
    assert status.losses[-1][0] == status.step
    kept = trainings.library.get(ANNA, "own/my-dog")
    assert json.loads(kept.metadata["training"])["step"] == status.step

    job = json.loads(job_file(trainings).read_text())
    job["lesson"]["steps"] = status.step + 2
    job_file(trainings).write_text(json.dumps(job))
    again.resume(ANNA)
    done = wait_for(again, lambda status: status.is_over)
    assert (done.state, done.step) == ("finished", status.step + 2), done.problem
    assert [step for step, _ in done.losses] == list(range(1, status.step + 3))
    assert done.samples and "# my-dog" in again.library.get(ANNA, "own/my-dog").card
    assert not again.library.visible(BERT)
    pipe = StableDiffusionAPTPipeline.from_pretrained(tiny_sd_path)
    pipe.load_apt_weights(again.library.get(ANNA, "own/my-dog").file)


def test_a_transformer_is_trained_and_drawn_with(tmp_path):
    studio = Studio("miniature-sd3", tmp_path / "adapters", SCRIPT)
    studio.check_trainable()
    studio.trainings.defaults |= {"resolution": 32, "max_sequence_length": 24, "num_inference_steps": 2}
    lesson = Lesson("My glyph", "a sks glyph", steps=3, learning_rate=0.1)
    studio.trainings.start(ANNA, [picture(tmp_path / "0.png")], [], lesson)
    done = wait_for(studio.trainings, lambda status: status.is_over)
    assert (done.state, done.step) == ("finished", 3), done.problem
    settings = {"prompt": "a sks glyph", "steps": 2, "guidance": 1.0, "seed": 0, "width": 32, "height": 32}

    def draw(keys):
        steps = studio.painter.draw(studio.order(ANNA, keys, [1.0] * len(keys), **settings), with_base=False)
        return next(np.asarray(s.pictures[0]) for s in steps if isinstance(s, Progress) and s.done)

    assert not np.array_equal(draw(["own/my-glyph"]), draw([]))


def test_a_transformer_that_the_trainer_does_not_know_is_told(tmp_path, tiny_transformer_path):
    studio = Studio(str(tiny_transformer_path("pixart-sigma")), tmp_path, SCRIPT)
    with pytest.raises(ValueError, match="is a PixArtSigmaPipeline, whose denoiser is a diffusion transformer"):
        studio.check_trainable()


def test_a_trainer_that_fails_or_is_killed_says_so(trainings, tmp_path):
    trainings.defaults["rank"] = 0
    trainings.start(ANNA, [picture(tmp_path / "a.png")], [], Lesson("x", "a sks glyph", steps=5))
    status = wait_for(trainings, lambda status: status.is_over)
    assert status.state == "failed" and "must be at least 1, got 0" in status.problem
    trainings.defaults["rank"] = 4
    trainings.start(ANNA, [picture(tmp_path / "a.png")], [], Lesson("x", "a sks glyph", steps=5))
    process_of(trainings).send_signal(signal.SIGKILL)
    status = wait_for(trainings, lambda status: status.is_over)
    assert status.state == "failed" and "killed" in status.problem
    assert trainings.status(ANNA).name == "x"  # the first x never became an adapter


def test_a_full_disk_is_said_without_a_path_and_leaves_no_process(trainings, tmp_path, monkeypatch):
    good = picture(tmp_path / "a.png")
    launched = []
    popen = subprocess.Popen
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The trainers inherit the limit: what they compile would stay cut off for every process that imports it later.
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    def launch(*args, **settings):
        launched.append(popen(*args, **settings))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # from here on nothing can be written
        return launched[0]

    with monkeypatch.context() as patch:
        patch.setattr("subprocess.Popen", launch)
        try:
            with pytest.raises(OSError) as error:
                trainings.start(ANNA, [good], [], Lesson("x", "a sks glyph", steps=5))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert launched[0].returncode is not None and trainings.status(ANNA) is None  # nothing runs on unknown

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))  # room for the job, not for an adapter
        trainings.start(ANNA, [good], [], Lesson("x", "a sks glyph", steps=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    status = wait_for(trainings, lambda status: status.is_over)
    assert status.state == "failed" and status.problem
    assert str(tmp_path) not in status.problem and "Traceback" not in status.problem


def test_a_refused_training_leaves_the_stopped_one_alone(trainings, tmp_path):
    good = picture(tmp_path / "a.png")
    trainings.start(ANNA, [good], [], Lesson("x", "a sks glyph", steps=5_000))
    process_of(trainings).kill()
    wait_for(trainings, lambda status: status.is_over)
    with pytest.raises(ValueError, match="damaged"):
        trainings.start(ANNA, [cut_off(tmp_path / "b.png")], [], Lesson("y", "a sks glyph"))
    assert trainings.status(ANNA).name == "x"
    assert [path.name for path in (job_file(trainings).parent / "pictures").iterdir()] == ["picture-01.png"]


def test_trainings_of_all_visitors_and_of_one_address_are_limited(trainings, tmp_path):
    trainings.max_per_address = 1
    good = picture(tmp_path / "a.png")
    trainings.start(ANNA, [good], [], Lesson("x", "a sks glyph", steps=5_000), "10.0.0.1")
    with pytest.raises(ValueError, match="1 trainings of your address are running"):
        trainings.start(BERT, [good], [], Lesson("x", "a sks glyph"), "10.0.0.1")  # the cookie was thrown away
    trainings.check(BERT, Lesson("x", "a sks glyph"), "10.0.0.2")
    trainings.max_running = 1
    with pytest.raises(ValueError, match="1 trainings are running here, as many as there may be"):
        trainings.start(BERT, [good], [], Lesson("x", "a sks glyph"), "10.0.0.2")
    assert trainings.status(BERT) is None
    process_of(trainings).kill()
    wait_for(trainings, lambda status: status.is_over)


def test_what_cannot_be_trained_is_refused_before_anything_is_kept(trainings, tmp_path):
    good = picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="at most 100000"):
        trainings.start(ANNA, [good], [], Lesson("x", "a sks glyph", steps=100_001))
    with pytest.raises(ValueError, match="damaged"):
        trainings.start(ANNA, [good, cut_off(tmp_path / "b.png")], [], Lesson("x", "a sks glyph"))
    with pytest.raises(ValueError, match="no training to stop"):
        trainings.cancel(ANNA)
    with pytest.raises(ValueError, match="no stopped training"):
        trainings.resume(ANNA)
    assert trainings.status(ANNA) is None
    trainings.script = tmp_path / "train" / "train_apt_sd.py"
    with pytest.raises(ValueError, match="not here any more"):
        trainings.start(ANNA, [good], [], Lesson("x", "a sks glyph"))


def test_the_command_is_one_for_the_trainer_and_keeps_hostile_prompts_in_their_place(trainings, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from apt_diffusion.training.text_to_image.arguments import parse_args

    lesson = Lesson("x", "--output_dir=/etc; rm", "--seed 3", steps=7, learning_rate=2e-3)
    args = parse_args(trainings.command(ANNA, "x", lesson)[2:])
    assert (args.instance_prompt, args.class_prompt) == ("--output_dir=/etc; rm", "--seed 3")
    assert Path(args.output_dir) == trainings.library.own_folder(ANNA) / "x"
    assert (args.max_train_steps, args.learning_rate, args.seed) == (7, 2e-3, 0)
    assert args.with_prior_preservation and args.train_text_encoder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": " "}, "a name"),
        ({"prompt": ""}, "stand for your subject"),
        ({"steps": 0}, "at least 1"),
        ({"learning_rate": 0}, "learning rate"),
        ({"learning_rate": float("nan")}, "learning rate"),
        ({"class_prompt": "x" * 201}, "200 characters"),
    ],
)
def test_a_lesson_that_makes_no_sense_is_refused_in_words(changes, message):
    with pytest.raises(ValueError, match=message):
        Lesson(**({"name": "x", "prompt": "a sks glyph"} | changes))
