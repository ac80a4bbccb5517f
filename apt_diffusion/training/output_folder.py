"""The folder that a run writes to: it is made, and what an earlier run has left in it does not pass for this one's."""

import logging
import shutil
from pathlib import Path

from . import best, checkpoints
from .checkpoints import Checkpoint
from .loss_log import METRICS_NAME

logger = logging.getLogger(__name__)


def make(output_dir: Path) -> None:
    """Makes the folder, without what a killed run left half-written; `ValueError` where it cannot be made."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} cannot be made: {error}.") from error
    checkpoints.remove_unfinished(output_dir)


def settle(output_dir: Path, resumed: Checkpoint | None) -> None:
    """Before the first step: what is in the folder is what the run has left up to there.

    Args:
        output_dir: the folder.
        resumed: the checkpoint that the run goes on from.
    """
    if resumed is None:
        _clear(output_dir)
    else:
        best.carry_over(resumed.folder, output_dir, resumed.step)


def _clear(output_dir: Path) -> None:
    """For a run that begins anew: takes away samples, metrics and the best adapter; of checkpoints it warns."""
    for file in (output_dir / METRICS_NAME, *output_dir.glob("samples/step-*.png")):
        file.unlink(missing_ok=True)
    shutil.rmtree(output_dir / best.FOLDER, ignore_errors=True)
    present = checkpoints.list_checkpoints(output_dir)
    if present:
        logger.warning(
            "%s has checkpoints of an earlier run, up to step %d, and this run begins anew: take them away, or "
            "--resume_from_checkpoint latest may mean one of them.", output_dir, max(present),
        )  # fmt: skip
