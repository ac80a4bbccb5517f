"""The seed of a run, and what follows from it in torch's own generator."""

import logging
import secrets

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..data.order import Purpose, random_at
from .checkpoints import Checkpoint

logger = logging.getLogger(__name__)


def agree_on_seed(given: int | None, resumed: Checkpoint | None) -> int:
    """The seed of all processes: the checkpoint's, else the one given, else a new one."""
    if resumed:
        seed = resumed.state["seed"]
        if given not in (None, seed):
            logger.warning("--seed %d is ignored: the run that is resumed has seed %d.", given, seed)
        return seed
    return broadcast_object_list([secrets.randbelow(2**32) if given is None else given])[0]


def seed_dropout(accelerator: Accelerator, seed: int, micro_step: int) -> None:
    """Torch's own generator serves dropout only; seeded by place, it needs no state in checkpoints.

    Args:
        accelerator: the run's; each process has a place of its own.
        seed: the run's.
        micro_step: batches that this process has seen.
    """
    place = micro_step * accelerator.num_processes + accelerator.process_index
    torch.manual_seed(int(random_at(seed, place, Purpose.STEP).integers(2**63)))
