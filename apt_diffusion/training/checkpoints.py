"""Checkpoints: folders `checkpoint-N` that are whole or not there, and from which a run resumes exactly.

    checkpoint-N/pytorch_apt_weights.safetensors   the adapter, as `load_apt_weights` reads it
    checkpoint-N/optimizer.safetensors             the optimizer's tensors, by parameter name
    checkpoint-N/training_state.json               everything that is not a tensor
    checkpoint-N/trained_weights.safetensors       only where the adapter is an average: what training goes on with

A folder is written under a hidden name and renamed, so `kill -9` leaves nothing that could be taken for a checkpoint.
Nothing is pickled: a checkpoint from somebody else is safe to resume.
"""

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..io.atomic import new_folder, remove_folder, write_text
from ..io.files import write_safetensors

logger = logging.getLogger(__name__)

STATE_NAME = "training_state.json"
OPTIMIZER_NAME = "optimizer.safetensors"
TRAINED_NAME = "trained_weights.safetensors"  # beside an average
EVALUATION = "evaluation_due"  # in the state: whether an evaluation follows the checkpoint
_TEMPORARY = ".unfinished-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its folder and what its JSON says (`step`, `seed`, `position`, ...)."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of steps after which it was written."""
        return self.state["step"]

    @property
    def evaluation_due(self) -> bool:
        """Whether the run was stopped before the evaluation of this step."""
        return self.state.get(EVALUATION, False)


def list_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """`{N: folder}` of the folders `checkpoint-N`, by rising N; any other name is left alone."""
    folder = Path(output_dir)
    matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*")]
    return dict(sorted((int(match[1]), path) for match, path in matches if match and path.is_dir()))


def find_checkpoint(output_dir: str | Path, name: str) -> Checkpoint | None:
    """The checkpoint that `--resume_from_checkpoint` means: `"latest"`, a name in `output_dir`, or any path.

    Returns:
        `None` for `"latest"` where there is none yet.

    Raises:
        ValueError: for a checkpoint that is not there or not whole; the message lists those that are there.
    """
    present = list_checkpoints(output_dir)
    names = ", ".join(path.name for path in present.values()) or "none"
    if name == "latest":
        return _read(list(present.values())[-1], names) if present else None
    for folder in (Path(output_dir) / name, Path(name).expanduser()):
        if folder.is_dir():
            return _read(folder, names)
    raise ValueError(f"There is no checkpoint {name!r}, neither in {output_dir} nor as a path. Present: {names}.")


def _read(folder: Path, names: str) -> Checkpoint:
    """The checkpoint, having looked whether its files are there and whole: models are loaded before their tensors."""
    for name in (STATE_NAME, OPTIMIZER_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no checkpoint to resume from: it has no {name}. Present: {names}.")
    file = folder / STATE_NAME
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        state["step"], state["optimizer"]
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt"):
                pass  # opening checks that the file is as long as its header says
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"{folder} is damaged ({file.name}: {error}). Take it away to resume from another. Present: {names}."
        ) from error
    return Checkpoint(folder, state)


@contextlib.contextmanager
def new_checkpoint(output_dir: str | Path, step: int) -> Iterator[Path]:
    """A folder to fill, which becomes `checkpoint-<step>` at the end, and vanishes after an exception."""
    with new_folder(Path(output_dir) / f"checkpoint-{step}", replace=True, prefix=_TEMPORARY) as folder:
        yield folder


def remove_unfinished(output_dir: str | Path) -> None:
    """Clears what a killed run left half-written."""
    for folder in Path(output_dir).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(folder, ignore_errors=True)


def prune_checkpoints(output_dir: str | Path, total_limit: int | None, newest: int) -> None:
    """Keeps `total_limit` checkpoints: `newest`, which was just written, and the last before it.

    Those of higher steps are of a run that was given up, and go first.
    """
    if total_limit is None:
        return
    present = list_checkpoints(output_dir)
    steps = sorted((step for step in present if step != newest), key=lambda step: (step < newest, step))
    others = [present[step] for step in steps]
    for folder in others[: max(0, len(others) - total_limit + 1)]:
        logger.info("Removing %s: the limit is %d checkpoints.", folder, total_limit)
        remove_folder(folder, _TEMPORARY)


def check_finite(parameters: dict[str, nn.Parameter], step: int) -> None:
    """`FloatingPointError` where a step has made values that are no numbers."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters.values()):
        raise FloatingPointError(
            f"What is trained is not finite after step {step}, so it is not saved. Lower --learning_rate, and begin "
            "anew or resume from an earlier checkpoint."
        )


def note_evaluation(output_dir: str | Path, step: int) -> None:
    """Says in `checkpoint-<step>`, if it is there, that its evaluation is done, and none is to be made on resume."""
    file = Path(output_dir) / f"checkpoint-{step}" / STATE_NAME
    if file.is_file():
        write_text(file, json.dumps(json.loads(file.read_text(encoding="utf-8")) | {EVALUATION: False}, indent=2))


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Each group's settings, but for the learning rates, which follow a schedule."""
    aside = ("params", "lr", "initial_lr")
    return [{key: value for key, value in group.items() if key not in aside} for group in optimizer.param_groups]


def save_training_state(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    state: dict[str, Any],
    scaler: Any = None,
    settings: list[dict[str, Any]] | None = None,
) -> None:
    """Writes the optimizer's state under the parameters' names, and `state` (JSON) with all other values.

    Args:
        folder: from `new_checkpoint`.
        optimizer: any whose state per parameter is tensors and plain values (AdamW, 8-bit AdamW, ...).
        parameters: all that it optimizes, by name.
        state: at least `step`.
        scaler: the gradient scaler of fp16 training.
        settings: the `group_settings` before the first step: what has changed since then is state (as Prodigy's `d`).
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                plain.setdefault(name, {})[key] = value
    write_safetensors(tensors, folder / OPTIMIZER_NAME, {"format": "pt"})
    content = state | {"parameters": list(parameters), "optimizer": plain}
    now = group_settings(optimizer)
    before = now if settings is None else settings
    content["groups"] = [
        {key: value for key, value in new.items() if key not in old or old[key] != value}
        for old, new in zip(before, now, strict=True)
    ]
    content["scaler"] = None if scaler is None else scaler.state_dict()
    (folder / STATE_NAME).write_text(json.dumps(content, indent=2), encoding="utf-8")


def load_training_state(
    checkpoint: Checkpoint,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    scaler: Any = None,
) -> None:
    """Inverse of `save_training_state`. Learning rates and other settings of the optimizer stay as they are.

    Raises:
        ValueError: where the checkpoint's optimizer had other parameters.
    """
    states: dict[str, dict[str, Any]] = {name: dict(values) for name, values in checkpoint.state["optimizer"].items()}
    for key, tensor in load_file(checkpoint.folder / OPTIMIZER_NAME).items():
        name, _, field = key.rpartition(".")
        states.setdefault(name, {})[field] = tensor
    before = checkpoint.state.get("parameters") or states  # parameters that no gradient has reached have no state
    if before and set(before) != set(parameters):
        raise ValueError(f"{checkpoint.folder} was trained with other parameters than this run has.")
    names = {id(parameter): name for name, parameter in parameters.items()}
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    current = optimizer.state_dict()
    found = {index: states[name] for index, name in enumerate(ordered) if name in states}
    optimizer.load_state_dict(current | {"state": found})
    for group, changed in zip(optimizer.param_groups, checkpoint.state.get("groups") or [], strict=False):
        group.update(changed)
    if scaler is not None and checkpoint.state["scaler"]:
        scaler.load_state_dict(checkpoint.state["scaler"])
