"""The adapter whose loss on held-out pictures was the lowest so far: `--keep_best` keeps it in `best/`."""

import json
import math
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..io.atomic import new_folder
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
    rows = [row for row in read_log(source / METRICS_NAME) if row["step"] <= step and VALIDATION_LOSS in row]
    kept = _step_of(source / FOLDER)
    if kept is None or not rows:
        return
    lowest = min(row[VALIDATION_LOSS] for row in rows)
    steps = [row["step"] for row in rows if row[VALIDATION_LOSS] == lowest]
    found = source / FOLDER if kept in steps else checkpoint if step in steps else None
    if found is not None and found.resolve() != (output_dir / FOLDER).resolve():
        with new_folder(output_dir / FOLDER, replace=True) as unfinished:
            shutil.copyfile(found / WEIGHTS_NAME, unfinished / WEIGHTS_NAME)


def _step_of(folder: Path) -> int | None:
    try:
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as content:
            return json.loads((content.metadata() or {})["training"])["step"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
