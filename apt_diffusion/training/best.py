"""The adapter whose loss on held-out pictures was the lowest so far: `--keep_best` keeps it in `best/`."""

import contextlib
import json
import math
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..io.atomic import replacing
from ..io.files import WEIGHTS_NAME
from .loss_log import METRICS_NAME, VALIDATION_LOSS, read_log

FOLDER = "best"


def lowest_loss(output_dir: Path) -> float:
    """The loss of the adapter in `best/`; infinite where there is none, or none of this run."""
    step = _step_of(output_dir / FOLDER)
    rows = read_log(output_dir / METRICS_NAME)
    return next((row[VALIDATION_LOSS] for row in rows if row["step"] == step and VALIDATION_LOSS in row), math.inf)


def carry_over(checkpoint: Path, output_dir: Path, step: int) -> None:
    """Where a run goes on from a checkpoint, `best/` is what was the best up to there, if that is still to be had.

    Args:
        checkpoint: the folder that is resumed.
        output_dir: of this run; the checkpoint may be another's.
        step: of the checkpoint.
    """
    source = checkpoint.resolve().parent
    kept = _step_of(source / FOLDER)
    if source == output_dir.resolve() and kept is not None and kept <= step:
        return
    rows = [row for row in read_log(source / METRICS_NAME) if row["step"] <= step and VALIDATION_LOSS in row]
    lowest = min((row[VALIDATION_LOSS] for row in rows), default=math.inf)
    steps = [row["step"] for row in rows if row[VALIDATION_LOSS] == lowest]
    found = source / FOLDER if kept in steps else checkpoint if kept is not None and step in steps else None
    remove(output_dir)  # of a run that was given up
    if found is not None:
        with replacing(output_dir / FOLDER / WEIGHTS_NAME) as unfinished:
            shutil.copyfile(found / WEIGHTS_NAME, unfinished)


def remove(output_dir: Path) -> bool:
    """Removes `best/` if a trainer has written it, and nothing else that may be in it; whether there was one."""
    folder = output_dir / FOLDER
    if _step_of(folder) is None:
        return False
    (folder / WEIGHTS_NAME).unlink()
    with contextlib.suppress(OSError):  # something of the user's is there
        folder.rmdir()
    return True


def _step_of(folder: Path) -> int | None:
    """The step of the adapter in a folder, `None` where no trainer has written one."""
    try:
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as content:
            return json.loads((content.metadata() or {})["training"])["step"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
