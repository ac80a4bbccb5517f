"""What a session does for every trainer, seen on a model of a few numbers."""

import argparse
import logging
import os
import signal

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import Dataset

from apt_diffusion.training.loss_log import LOG_NAME, METRICS_NAME, read_log
from apt_diffusion.training.run_config import parse_args
from apt_diffusion.training.session import Session


class Numbers(Dataset):
    """position -> a number."""

    def __getitem__(self, position):
        if position == 5:
            raise ValueError("the fifth number is missing")
        return torch.tensor([float(position)])

    def describe(self, position):
        return f"number {position}"


class Line(nn.Module):
    """A slope that learns, and one that nothing reads."""

    def __init__(self):
        super().__init__()
        self.slope, self.unread = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.slope * x


def flags(folder, **changes):
    values = {
        "output_dir": str(folder), "logging_dir": "logs", "report_to": "none", "mixed_precision": "no", "seed": 0,
        "allow_tf32": False, "gradient_accumulation_steps": 2, "train_batch_size": 1, "max_train_steps": 2,
        "num_train_epochs": 1, "resume_from_checkpoint": None, "push_to_hub": False, "hub_model_id": None,
        "hub_token": None, "dataloader_num_workers": 0, "checkpointing_steps": 100, "checkpoints_total_limit": None,
        "learning_rate": 0.1, "max_grad_norm": None,
    }  # fmt: skip
    parser = argparse.ArgumentParser()
    for name, value in (values | changes).items():
        parser.add_argument(f"--{name}", default=value)
    parser.add_argument("--config")
    return parse_args(parser, [])


def begin(folder, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Session.start(flags(folder, **changes), "train_apt_line")


def prepare(session, model, optimizer_class=torch.optim.SGD):
    session.open_output()
    session.plan(epoch_length=4, evaluates_after=lambda step: step % 2 == 0)
    parameters = dict(model.named_parameters())
    optimizer = optimizer_class(parameters.values(), lr=0.1)
    optimizer.param_groups[0]["initial_lr"] = 0.1
    return session.prepare({"line": model}, parameters, optimizer, lambda step: 1 / (step + 1))["line"]


def run(session, model, at_step=lambda session: None, optimizer_class=torch.optim.SGD):
    line, due = prepare(session, model, optimizer_class), []
    for batch in session.batches(session.loader(Numbers(), torch.stack)):
        with session.step():
            session.backward(line(batch).sum())
        at_step(session)
        due.append((session.steps_done, session.checkpoint_due, session.evaluation_due))
        if session.evaluation_due:
            session.log({"slope": model.slope.item()})
    return due


def test_batches_make_steps_and_what_is_due_is_due_once(tmp_path):
    model = Line()
    with begin(tmp_path) as session:
        due = run(session, model)
    assert due == [(0, False, False), (1, False, False), (1, False, False), (2, True, False)]
    # Gradients of 0 and 1, of 2 and 3, averaged; rates 0.1 and 0.05.
    assert model.slope.item() == pytest.approx(1 - 0.1 * 0.5 - 0.05 * 2.5)
    rows = read_log(tmp_path / LOG_NAME)
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.05])
    assert rows[0]["loss"] == pytest.approx(0.5) and rows[1]["loss"] == pytest.approx(2.5 * 0.95)


def test_evaluations_are_logged_but_not_after_the_last_step(tmp_path):
    with begin(tmp_path, max_train_steps=4, gradient_accumulation_steps=1) as session:
        due = run(session, Line())
    assert [step for step, _, evaluation in due if evaluation] == [2]
    assert [row["step"] for row in read_log(tmp_path / METRICS_NAME)] == [2]


def test_one_warning_names_parameters_that_no_gradient_reaches(tmp_path, caplog):
    with begin(tmp_path) as session:
        run(session, Line())
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("1 of 2 trained parameters have no gradient") and "(unread)" in warning


def test_a_run_with_a_parameter_that_no_gradient_reaches_resumes(tmp_path):
    """The optimizer has no state for it."""
    straight, first, second = Line(), Line(), Line()
    changes = {"gradient_accumulation_steps": 1, "resume_from_checkpoint": "latest"}

    def save(session):
        if session.checkpoint_due:
            session.save_checkpoint(lambda folder: None)

    def train(folder, model, steps):
        with begin(tmp_path / folder, max_train_steps=steps, **changes) as session:
            run(session, model, save, torch.optim.AdamW)

    train("straight", straight, 4)
    train("parts", first, 2)
    second.load_state_dict(first.state_dict())
    train("parts", second, 4)
    assert second.slope.item() == straight.slope.item() != first.slope.item()


def test_an_error_in_the_data_names_the_step_and_the_examples(tmp_path, caplog):
    with pytest.raises(ValueError, match="fifth number"), begin(tmp_path, max_train_steps=9) as session:
        run(session, Line())
    assert "The run failed after step 2. Examples read last: number 5." in caplog.text


@pytest.mark.parametrize("where", ["loss", "evaluation"])
def test_after_an_error_signals_are_handled_as_before(tmp_path, caplog, where):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def fail(session):
        assert signal.getsignal(signal.SIGTERM) != before[0]
        raise RuntimeError(where)

    with pytest.raises(RuntimeError, match=where), begin(tmp_path) as session:
        run(session, Line(), at_step=fail)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert "Examples read last: number 0." in caplog.text


def test_epochs_give_the_number_of_steps(tmp_path):
    with begin(tmp_path, max_train_steps=None, num_train_epochs=3) as session:
        session.plan(epoch_length=5)
    assert session.steps_per_epoch == 3 and session.args.max_train_steps == 9
    assert [list(batch) for batch in session.positions][:3] == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("threads", "said"),
    [
        (8, "On the CPU: 8 of 8 cores."),
        (1, "1 of 8 cores. `accelerate launch --num_cpu_threads_per_process 8`, or OMP_NUM_THREADS, takes more."),
    ],
)
def test_a_run_on_the_cpu_says_how_many_cores_it_takes(tmp_path, monkeypatch, caplog, threads, said):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    begin(tmp_path)
    assert said in caplog.text
