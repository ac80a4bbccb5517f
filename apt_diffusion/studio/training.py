"""Training jobs: `train/train_apt_sd.py` in a separate process, which outlives browser tab and server.

The state of a job is on disk only, so it is found again after tab or server was closed:

    .visitors/<visitor>/trainings/<name>/job.json     settings and process
    .visitors/<visitor>/trainings/<name>/pictures/    what was uploaded
    .visitors/<visitor>/trainings/<name>/log.txt      what the trainer says
    .visitors/<visitor>/adapters/<name>/              the trainer's output folder
"""

import contextlib
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..data.reading import is_picture
from ..io.atomic import replacing, write_text
from ..io.files import WEIGHTS_NAME
from ..training.checkpoints import list_checkpoints
from ..training.loss_log import LOG_NAME, LossLog, read_log
from ..training.scripts import environment
from .countdown import Countdown
from .library import VISITORS, Library
from .uploads import keep_pictures

JOB_NAME = "job.json"
# How Python and argparse end.
ERROR_LINE = re.compile(r"(?:[\w.]*(?:Error|Exception)|[\w./-]+: error): (.+)")
MAX_RUNNING = 4  # trainings of all visitors
MAX_PER_ADDRESS = 2  # of them for one address: a browser without its cookie counts as somebody new
SAMPLES = 4  # sample grids per training
CLASS_PICTURES = 64


@dataclass(frozen=True)
class Lesson:
    """What to teach. Checked when it is made.

    Raises:
        ValueError: with a sentence for the page.
    """

    name: str
    prompt: str
    class_prompt: str = ""
    steps: int = 400
    learning_rate: float = 1.5e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("Give the adapter a name, by which you will find it again.")
        if not self.prompt.strip():
            raise ValueError("Write the prompt that shall stand for your subject, such as “a sks dog”.")
        for text in (self.name, self.prompt, self.class_prompt):
            if len(text) > 200:
                raise ValueError("Names and prompts may have 200 characters.")
        if self.steps < 1:
            raise ValueError(f"The number of steps must be at least 1, not {self.steps}.")
        if not 0 < self.learning_rate <= 0.1:
            raise ValueError(f"The learning rate must be above 0 and at most 0.1, not {self.learning_rate}.")


@dataclass(frozen=True)
class Status:
    """State of a training job."""

    state: str  # "starting", "running", "stopping", "stopped", "failed" or "finished"
    name: str
    lesson: Lesson
    step: int
    losses: list[tuple[int, float]]
    samples: list[Path]
    seconds_left: float | None = None  # unknown until some steps are done
    problem: str = ""  # why it failed
    stage: str = ""  # what a start is doing
    share: float | None = None  # of that stage, where it is known

    @property
    def is_over(self) -> bool:
        """Whether no process works on it."""
        return self.state in ("stopped", "failed", "finished")


class Trainings:
    """The visitors' training jobs: at most one of each visitor at a time.

    Args:
        script: the trainer, `train_apt_sd.py`; it runs in the server's working folder.
        model: the base model, as the trainer takes it.
        library: where finished adapters go.
        defaults: further flags of the trainer that suit the model.
        max_steps: what a visitor may ask for.
        class_pictures: a folder of captioned pictures of what the model knows, in place of the trainer's pictures
            of the class prompt. Whoever starts a training has drawn them.
        max_running: trainings of all visitors at a time.
        max_per_address: of them for one address.
    """

    def __init__(
        self,
        script: Path,
        model: str,
        library: Library,
        defaults: dict[str, Any],
        max_steps: int,
        class_pictures: Path | None = None,
        max_running: int = MAX_RUNNING,
        max_per_address: int = MAX_PER_ADDRESS,
    ) -> None:
        self.script = script
        self.model = model
        self.library = library
        self.defaults = defaults
        self.max_steps = max_steps
        self.class_pictures = class_pictures
        self.max_running = max_running
        self.max_per_address = max_per_address
        self._lock = threading.Lock()
        self._children: dict[int, subprocess.Popen] = {}  # to be waited for, or they stay zombies
        self._countdowns: dict[str, Countdown] = {}

    def start(
        self,
        visitor: str,
        pictures: Sequence[str | Path],
        captions: Sequence[str],
        lesson: Lesson,
        address: str = "",
        frames: Sequence[float | None] = (),
    ) -> str:
        """Keeps the pictures and starts the trainer; returns the adapter's name. A stopped job is given up.

        Args:
            visitor: whose training it is.
            pictures: uploads.
            captions: one per picture, or fewer.
            lesson: what to teach.
            address: of the visitor's computer.
            frames: for each picture where the square to train on lies on its long side, from 0 to 1; `None` leaves
                that to the trainer.

        Raises:
            ValueError: where one is running already, or for pictures and settings that cannot be used.
        """
        self.check(visitor, lesson, address)
        with self._lock:
            self._refuse_second(visitor)
            self._refuse_too_many(address)
            incoming = self.library.visitor_folder(visitor) / "incoming"
            shutil.rmtree(incoming, ignore_errors=True)
            keep_pictures(pictures, captions, incoming, frames)  # before anything is given up for them
            self._give_up_old(visitor)
            name = self.library.new_name(visitor, lesson.name)
            folder = self._folder(visitor, name)
            try:
                folder.mkdir(parents=True)
                incoming.rename(folder / "pictures")
                self._launch(visitor, name, lesson, address)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            return name

    def check(self, visitor: str, lesson: Lesson, address: str = "") -> None:
        """`ValueError` where `start` would refuse, whatever the pictures are."""
        if lesson.steps > self.max_steps:
            raise ValueError(f"This studio trains for at most {self.max_steps} steps, not {lesson.steps}.")
        if not self.script.is_file():
            raise ValueError(f"The trainer is not here any more: {self.script}. Install apt-diffusion again.")
        self.library.check_room(visitor)
        with self._lock:
            self._refuse_second(visitor)
            self._refuse_too_many(address)

    def resume(self, visitor: str) -> None:
        """Goes on with the job that was stopped, from its last checkpoint.

        Raises:
            ValueError: where there is none, or it is running.
        """
        with self._lock:
            self._refuse_second(visitor)
            job = self._latest(visitor)
            if job is None or self._read(job).state == "finished":
                raise ValueError("There is no stopped training to go on with.")
            self._refuse_too_many(job.get("address", ""))
            self._launch(visitor, job["name"], Lesson(**job["lesson"]), job.get("address", ""))

    def cancel(self, visitor: str) -> None:
        """Asks the job to stop: it ends its step and saves a checkpoint. `ValueError` where none is running."""
        with self._lock:
            job = self._latest(visitor)
            process = None if job is None else self._process(job)
            if job is None or process is None:
                raise ValueError("There is no training to stop.")
            self._write(job | {"cancelled": True})
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()

    def forget(self, visitor: str) -> None:
        """Deletes all that a visitor has; `ValueError` while a training of the visitor is running."""
        with self._lock:
            if any(job["visitor"] == visitor and self._process(job) is not None for job in self._jobs()):
                raise ValueError("A training of this visitor is running: stop it first.")
            shutil.rmtree(self.library.visitor_folder(visitor), ignore_errors=True)

    def running(self) -> list[tuple[str, Status]]:
        """All trainings that are running, with their visitors: for the owner of the studio."""
        with self._lock:
            return [(job["visitor"], self._read(job)) for job in self._jobs() if self._process(job) is not None]

    def status(self, visitor: str) -> Status | None:
        """The visitor's latest job, `None` before the first."""
        with self._lock:
            job = self._latest(visitor)
            return None if job is None else self._read(job)

    # A job on disk

    def _folder(self, visitor: str, name: str) -> Path:
        return self.library.visitor_folder(visitor) / "trainings" / name

    def _output(self, job: dict) -> Path:
        return self.library.own_folder(job["visitor"]) / job["name"]

    def _latest(self, visitor: str) -> dict | None:
        folder = self.library.visitor_folder(visitor) / "trainings"
        jobs = [json.loads(file.read_text()) for file in folder.glob(f"*/{JOB_NAME}")]
        return max(jobs, key=lambda job: job["created"], default=None)

    def _write(self, job: dict) -> None:
        write_text(self._folder(job["visitor"], job["name"]) / JOB_NAME, json.dumps(job, indent=2))

    def _read(self, job: dict) -> Status:
        output, lesson = self._output(job), Lesson(**job["lesson"])
        process = self._process(job)  # before its files: a training that ends meanwhile is not over with old ones
        rows = read_log(output / LOG_NAME)
        step = rows[-1]["step"] if rows else 0
        losses = [(row["step"], row["loss"]) for row in rows]
        samples = sorted((output / "samples").glob("step-*.png"))
        if process is not None:
            is_new = step > job["first_step"]  # a resumed job has rows of the run before
            state = "stopping" if job["cancelled"] else "running" if is_new else "starting"
            left = self._time_left(job, step, lesson.steps)
            stage = self._stage(job, lesson) if state == "starting" else ("", None)
            return Status(state, job["name"], lesson, step, losses, samples, left, "", *stage)
        self._countdowns.pop(self._key(job), None)
        if (output / "README.md").is_file():  # the last thing that the trainer writes
            return Status("finished", job["name"], lesson, step, losses, samples)
        self._keep_last_checkpoint(output)
        step = max(list_checkpoints(output), default=0)
        if job["cancelled"]:
            return Status("stopped", job["name"], lesson, step, losses, samples)
        return Status("failed", job["name"], lesson, step, losses, samples, problem=self._last_words(job))

    @staticmethod
    def _keep_last_checkpoint(output: Path) -> None:
        """The adapter as it was when its training stopped can be used, too."""
        checkpoints = list_checkpoints(output)
        if checkpoints:
            newest = list(checkpoints.values())[-1] / WEIGHTS_NAME
            target = output / WEIGHTS_NAME
            if not target.is_file() or target.stat().st_mtime < newest.stat().st_mtime:
                with replacing(target) as temporary:
                    shutil.copyfile(newest, temporary)

    def _last_words(self, job: dict) -> str:
        """The error in which the trainer ended, as a sentence."""
        log = self._folder(job["visitor"], job["name"]) / "log.txt"
        lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        errors = [match[1] for line in lines if (match := ERROR_LINE.match(line))]
        if errors:
            return errors[-1].replace(f"{self.library.visitor_folder(job['visitor'])}/", "")
        return "The trainer ended without a word, as if it was killed (is there enough memory?)."

    def _refuse_second(self, visitor: str) -> None:
        job = self._latest(visitor)
        if job is not None and self._process(job) is not None:
            raise ValueError("Your training is still running: stop it first, or wait until it has finished.")

    def _refuse_too_many(self, address: str) -> None:
        """Each holds a model in memory."""
        running = [job for job in self._jobs() if self._process(job) is not None]
        if len(running) >= self.max_running:
            raise ValueError(f"{len(running)} trainings are running here, as many as there may be: try again later.")
        same = sum(job.get("address", "") == address for job in running)
        if address and same >= self.max_per_address:
            raise ValueError(
                f"{same} trainings of your address are running, as many as one may have here: try again later."
            )

    def _jobs(self) -> list[dict]:
        return [
            json.loads(file.read_text()) for file in self.library.folder.glob(f"{VISITORS}/*/trainings/*/{JOB_NAME}")
        ]

    def _give_up_old(self, visitor: str) -> None:
        """What a new training replaces: pictures of all jobs, checkpoints of all adapters, and what never had any."""
        shutil.rmtree(self.library.visitor_folder(visitor) / "trainings", ignore_errors=True)
        own = self.library.own_folder(visitor)
        for output in own.iterdir() if own.is_dir() else ():
            for checkpoint in list_checkpoints(output).values():
                shutil.rmtree(checkpoint, ignore_errors=True)
            if not (output / WEIGHTS_NAME).is_file():
                shutil.rmtree(output, ignore_errors=True)

    # Its process

    def _launch(self, visitor: str, name: str, lesson: Lesson, address: str) -> None:
        folder, output = self._folder(visitor, name), self.library.own_folder(visitor) / name
        first_step = max(list_checkpoints(output), default=0)
        if (output / LOG_NAME).is_file():
            LossLog(output, first_step)  # steps that were lost are not taken for new ones
        known = {"visitor": visitor, "name": name, "lesson": dataclasses.asdict(lesson), "address": address}
        with (folder / "log.txt").open("a") as log:
            child = subprocess.Popen(
                self.command(visitor, name, lesson),
                env=environment() | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the server's terminal does not reach it
            )
        try:
            born = psutil.Process(child.pid).create_time()
            file = folder / JOB_NAME
            created = json.loads(file.read_text())["created"] if file.is_file() else time.time()
            process = {"pid": child.pid, "born": born, "first_step": first_step, "cancelled": False}
            self._write(known | process | {"created": created})
        except BaseException:  # a full disk: no process that nobody knows of
            child.kill()
            child.wait()
            raise
        self._children[child.pid] = child

    def command(self, visitor: str, name: str, lesson: Lesson) -> list[str]:
        """The trainer's command line; paths are relative to the working folder where they can be."""
        folder = self._folder(visitor, name)
        flags: dict[str, Any] = {
            "pretrained_model_name_or_path": self.model,
            "instance_data_dir": self._shown(folder / "pictures"),
            "instance_prompt": lesson.prompt,
            "output_dir": self._shown(self.library.own_folder(visitor) / name),
            "max_train_steps": lesson.steps,
            "learning_rate": lesson.learning_rate,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 0,
            "train_text_encoder": True,
            "validation_prompt": lesson.prompt,
            "num_validation_images": 2,
            "validation_steps": max(1, lesson.steps // SAMPLES),
            "checkpointing_steps": max(1, lesson.steps // SAMPLES),
            "checkpoints_total_limit": 1,
            "seed": lesson.seed,
            "report_to": "none",
            "resume_from_checkpoint": "latest",
        } | self.defaults
        if lesson.class_prompt:
            class_dir = self._class_folder(visitor, name)
            flags |= {
                "with_prior_preservation": True,
                "class_data_dir": self._shown(class_dir),
                "class_prompt": lesson.class_prompt,
                "num_class_images": CLASS_PICTURES,
            }
        words = [sys.executable, self._shown(self.script)]
        for flag, value in flags.items():
            words += [f"--{flag}"] if value is True else [f"--{flag}={value}"]  # "=": a prompt may start with dashes
        return words

    @staticmethod
    def _shown(path: Path) -> str:
        """The path as the trainer is given it, which its model card repeats."""
        root = Path.cwd()
        return str(path.relative_to(root) if path.is_relative_to(root) else path)

    def _process(self, job: dict) -> psutil.Process | None:
        """The job's process while it runs; its number may since have gone to another one."""
        child = self._children.get(job["pid"])
        if child is not None and child.poll() is not None:
            del self._children[job["pid"]]
            return None
        try:
            process = psutil.Process(job["pid"])
            same = abs(process.create_time() - job["born"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
            return process if same else None
        except psutil.NoSuchProcess:
            return None

    @staticmethod
    def _key(job: dict) -> str:
        return f"{job['visitor']} {job['name']}"

    def _class_folder(self, visitor: str, name: str) -> Path:
        return self.class_pictures or self._folder(visitor, name) / "class"

    def _stage(self, job: dict, lesson: Lesson) -> tuple[str, float | None]:
        """What a trainer that has done no step yet is doing, and how far it is with it."""
        folder = self._class_folder(job["visitor"], job["name"])
        drawn = sum(is_picture(file) for file in folder.iterdir()) if folder.is_dir() else 0
        if lesson.class_prompt and 0 < drawn < CLASS_PICTURES:
            return f"Drawing pictures of “{lesson.class_prompt}”: {drawn} of {CLASS_PICTURES}", drawn / CLASS_PICTURES
        return "Loading the model and preparing the pictures …", None

    def _time_left(self, job: dict, step: int, steps: int) -> float | None:
        if step <= job["first_step"]:
            return None
        countdown = self._countdowns.setdefault(self._key(job), Countdown())
        return countdown.left(step, steps, time.monotonic())
