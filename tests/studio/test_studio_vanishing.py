"""What ends, vanishes or comes twice at the worst moment: trainings, files of visitors, pictures to train on."""

import json
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.testclient import TestClient
from support.gate import until
from support.studio_helpers import ANNA, picture

from apt_diffusion.studio import training
from apt_diffusion.studio.drawings import Drawings
from apt_diffusion.studio.embedded import EMBEDDED
from apt_diffusion.studio.library import Library
from apt_diffusion.studio.samples import subject_pictures
from apt_diffusion.studio.server.admin import Admin
from apt_diffusion.studio.server.sweep import every
from apt_diffusion.studio.training import Lesson, Trainings

TRAINER = """
import json, sys, time
from pathlib import Path
flags = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:])
out = Path(flags["output_dir"])
out.mkdir(parents=True, exist_ok=True)
log = out / "losses.jsonl"
while not (out.parent / "begin").exists():
    time.sleep(0.01)
log.write_text(json.dumps({"step": 1, "loss": 1.0, "lr": 1.0}) + "\\n")
while not (out.parent / "end").exists():
    time.sleep(0.01)
with log.open("a") as file:
    file.write(json.dumps({"step": 2, "loss": 0.5, "lr": 1.0}) + "\\n")
(out / "README.md").write_text("# done")
"""


@pytest.fixture
def trainings(tmp_path):
    """With a trainer of two steps that waits for the files `begin` and `end`."""
    (tmp_path / "train.py").write_text(TRAINER)
    found = Trainings(tmp_path / "train.py", "x", Library(tmp_path / "adapters"), {}, max_steps=10)
    yield found
    found.library.own_folder(ANNA).mkdir(parents=True, exist_ok=True)
    (found.library.own_folder(ANNA) / "begin").touch()
    (found.library.own_folder(ANNA) / "end").touch()


def test_a_training_that_ends_while_it_is_looked_at_is_not_over_with_an_old_step(trainings, tmp_path, monkeypatch):
    trainings.start(ANNA, [picture(tmp_path / "a.png")], [], Lesson("x", "a dog", steps=2))
    own = trainings.library.own_folder(ANNA)
    own.mkdir(parents=True, exist_ok=True)
    (own / "begin").touch()
    until(lambda: trainings.status(ANNA).step == 1)
    original = training.read_log

    def read_log(path):
        rows = original(path)
        (own / "end").touch()
        until(lambda: (own / "x" / "README.md").exists())
        time.sleep(0.5)  # the process ends
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(training, "read_log", read_log)
        status = trainings.status(ANNA)
    assert (status.state, status.step) == ("running", 1)
    until(lambda: trainings.status(ANNA).is_over)
    status = trainings.status(ANNA)
    assert (status.state, status.step) == ("finished", 2)


def test_steps_that_were_lost_are_not_those_of_the_run_that_goes_on(trainings, tmp_path):
    trainings.start(ANNA, [picture(tmp_path / "a.png")], [], Lesson("x", "a dog", steps=2))
    own = trainings.library.own_folder(ANNA)
    trainings.cancel(ANNA)  # before its first checkpoint
    until(lambda: trainings.status(ANNA).is_over)
    (own / "x").mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, "loss": 1.0, "lr": 1.0} for step in (1, 2)]
    (own / "x" / "losses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainings.resume(ANNA)
    status = trainings.status(ANNA)
    assert (status.state, status.step, status.losses) == ("starting", 0, [])


def test_a_visitor_is_not_forgotten_while_a_training_runs(trainings, tmp_path):
    trainings.start(ANNA, [picture(tmp_path / "a.png")], [], Lesson("x", "a dog", steps=2))
    with pytest.raises(ValueError, match="is running: stop it first"):
        trainings.forget(ANNA)
    trainings.cancel(ANNA)
    until(lambda: trainings.status(ANNA).is_over)
    trainings.forget(ANNA)
    assert not trainings.library.visitor_folder(ANNA).exists() and trainings.status(ANNA) is None


def test_the_owners_page_counts_what_is_there_although_files_vanish(trainings, monkeypatch):
    folder = trainings.library.visitor_folder(ANNA)
    folder.mkdir(parents=True)
    for name in ("gone", "there"):
        (folder / name).write_bytes(bytes(2**20))
    studio = SimpleNamespace(library=trainings.library, trainings=trainings, turns=[])
    client = TestClient(Starlette(routes=Admin(studio, "a token of the owner").routes()), "https://studio")
    original = Path.stat

    def stat(self, **options):
        found = original(self, **options)
        if self.name == "gone":
            self.unlink()
        return found

    client.post("/studio/admin", data={"do": "enter", "token": "a token of the owner"})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", stat)
        assert "2.0 MB in 2 files" in client.get("/studio/admin").text
    assert "1.0 MB in 1 files" in client.get("/studio/admin").text


def test_sweeping_goes_on_after_an_error():
    calls, enough = [], threading.Event()

    def work():
        calls.append(1)
        if len(calls) == 1:
            raise OSError("a disk that is away for a moment")
        enough.set()

    ended = every(0.01, work)
    assert enough.wait(60)
    ended.set()


def test_a_picture_that_is_deleted_meanwhile_does_not_spoil_the_archive(tmp_path, monkeypatch):
    drawings = Drawings(Library(tmp_path / "adapters"))
    setting = {
        "prompt": "a dog", "negative_prompt": "", "adapters": [], "weights": [], "steps": 3, "guidance": 3.0,
        "width": 8, "height": 8, "seed": 1, "count": 1, "sampler": "", "blocks": {}, "model": "m",
    }  # fmt: skip
    kept = drawings.keep(ANNA, "adapted", [Image.new("RGB", (8, 8))] * 3, [setting] * 3)
    listed = drawings.of(ANNA)
    kept[1].file.unlink()
    monkeypatch.setattr(drawings, "of", lambda visitor: listed)
    with zipfile.ZipFile(drawings.write_zip(ANNA, tmp_path / "all.zip")) as archive:
        assert len(archive.namelist()) == 2


@pytest.mark.parametrize("model", ["miniature", "miniature-emoji"])
def test_pictures_of_a_subject_are_there_whole_or_not_at_all(tmp_path, model, monkeypatch):
    embedded = EMBEDDED[model]
    name = next(iter(embedded.subjects))
    whole = [file.name for file in subject_pictures(embedded, name, tmp_path / "whole")]
    assert len(whole) > 1

    def save(*args):
        embedded.save(*args)
        next(args[1].glob("*.png")).unlink()
        raise KeyboardInterrupt

    broken = type("Broken", (), {"save": staticmethod(save)})
    with pytest.raises(KeyboardInterrupt):
        subject_pictures(broken, name, tmp_path / "half")
    assert [file.name for file in subject_pictures(embedded, name, tmp_path / "half")] == whole

    def overtaken(*args):
        subject_pictures(embedded, name, tmp_path / "two")

    faster = type("Faster", (), {"save": staticmethod(overtaken)})
    assert [file.name for file in subject_pictures(faster, name, tmp_path / "two")] == whole
