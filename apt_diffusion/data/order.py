"""Randomness by position: every random choice of a training run is a function of (seed, position, purpose).

A run reads one endless stream of samples, epoch after epoch, each in its own order. Nothing depends on a global
generator, on loader workers, on how many processes share the work, or on where a run was interrupted.
"""

from enum import IntEnum
from functools import lru_cache

import numpy as np


class Purpose(IntEnum):
    """What a generator is for; generators of different purposes are independent."""

    ORDER = 0
    SAMPLE = 1
    PRIOR_SAMPLE = 2
    STEP = 3


class Branch(IntEnum):
    """Further generators of the same place and purpose, independent of the first."""

    MAIN = 0
    CAPTION = 1
    BUCKETS = 2


def random_at(seed: int, position: int, purpose: Purpose, branch: Branch = Branch.MAIN) -> np.random.Generator:
    """The generator of one place: Philox, a counter-based generator that is keyed, not advanced.

    Branches begin 2^192 steps of the counter apart.
    """
    key = np.array([seed, position * 4 + purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, branch], dtype=np.uint64)))


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, length: int) -> tuple[int, ...]:
    """The order in which an epoch visits its `length` entries."""
    return tuple(random_at(seed, epoch, Purpose.ORDER).permutation(length).tolist())


def entry_at(seed: int, position: int, length: int) -> int:
    """The entry at `position` of the endless stream."""
    epoch, place = divmod(position, length)
    return epoch_order(seed, epoch, length)[place]


def micro_batches(
    first_position: int, num_batches: int, batch_size: int, process_index: int = 0, num_processes: int = 1
) -> list[range]:
    """Positions of each batch of one process; together the processes read the stream without gaps.

    Two processes with batches of B see in every step what one process with a batch of 2B sees. Batches are always
    full: they run on over the end of an epoch.
    """
    firsts = (first_position + (batch * num_processes + process_index) * batch_size for batch in range(num_batches))
    return [range(first, first + batch_size) for first in firsts]
