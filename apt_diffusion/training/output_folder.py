"""The folder that a run writes to: it is made, and what another run has left in it does not pass for this one's."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from . import best, checkpoints
from .checkpoints import Checkpoint
from .loss_log import METRICS_NAME, LossLog, read_log

SAMPLE = re.compile(r"step-(\d{6})(-\d+)?\.png")

logger = logging.getLogger(__name__)


def make(output_dir: Path) -> None:
    """Makes the folder, without what a killed run left half-written; `ValueError` where it cannot be made."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} cannot be made: {error}.") from error
    checkpoints.remove_unfinished(output_dir)


def settle(output_dir: Path, resumed: Checkpoint | None) -> None:
    """Before the first step: samples, metrics and the best adapter in the folder are what the run has left so far.

    Args:
        output_dir: the folder.
        resumed: the checkpoint that the run goes on from; of a run that begins anew nothing is there.
    """
    if resumed is None:
        _begin_anew(output_dir)
        return
    best.carry_over(resumed.folder, output_dir, resumed.step)
    source = resumed.folder.resolve().parent / METRICS_NAME
    if source.is_file():
        LossLog(output_dir, resumed.step, source, METRICS_NAME)
    elif _is_metrics(output_dir / METRICS_NAME):
        (output_dir / METRICS_NAME).unlink()
    for file in _samples(output_dir, after=resumed.step):
        file.unlink(missing_ok=True)


def _begin_anew(output_dir: Path) -> None:
    """Takes away what only a trainer writes, and says so; checkpoints stay, with a warning."""
    samples = list(_samples(output_dir, after=0))
    for file in samples:
        file.unlink(missing_ok=True)
    taken = [f"{len(samples)} samples"] if samples else []
    if _is_metrics(output_dir / METRICS_NAME):
        (output_dir / METRICS_NAME).unlink()
        taken.append(METRICS_NAME)
    if best.remove(output_dir):
        taken.append(best.FOLDER)
    if taken:
        logger.info("Of an earlier run in %s these were taken away: %s.", output_dir, ", ".join(taken))
    present = checkpoints.list_checkpoints(output_dir)
    if present:
        logger.warning(
            "%s has checkpoints of an earlier run, up to step %d, and this run begins anew: take them away, or "
            "--resume_from_checkpoint latest may mean one of them.", output_dir, max(present),
        )  # fmt: skip


def _samples(output_dir: Path, after: int) -> Iterator[Path]:
    for file in sorted(output_dir.glob("samples/step-*.png")):
        match = SAMPLE.fullmatch(file.name)
        if match and int(match[1]) > after:
            yield file


def _is_metrics(file: Path) -> bool:
    """Whether a run has written it: another file of the name is the user's."""
    rows = read_log(file)
    return bool(rows) and all(isinstance(row, dict) and "step" in row for row in rows)
