"""Aspect-ratio buckets: pictures keep about their shape, and every batch has pictures of one size.

A bucket is a size, `(height, width)` in pixels; a picture belongs to the one whose shape is nearest to its own. The
choice and the format of `--aspect_ratio_buckets` are diffusers'.
"""

import bisect
import itertools
from collections.abc import Sequence

from .order import Branch, Purpose, epoch_order, random_at

Size = tuple[int, int]  # height, width
ROUNDS_KEPT = 16


def parse_buckets(text: str) -> tuple[Size, ...]:
    """The sizes in `"height,width;height,width"`, each once.

    Raises:
        ValueError: for another format, or a size that is not above 0.
    """
    from diffusers.training_utils import parse_buckets_string

    try:
        sizes = [(height, width) for height, width in parse_buckets_string(text)]
    except ValueError as error:
        raise ValueError(
            f'--aspect_ratio_buckets: {error} Give "auto", or sizes as "512,768;768,512" (height, width).'
        ) from error
    return tuple(dict.fromkeys(sizes))


def generate_buckets(resolution: int, stride: int) -> tuple[Size, ...]:
    """Sizes of about `resolution`² pixels, from 1:2 to 2:1; their sides are whole numbers of latent cells.

    Args:
        resolution: side of a square.
        stride: pixels per latent cell.
    """
    from diffusers.training_utils import generate_aspect_ratio_buckets

    cells = max(1, min(8, resolution // stride // 8))  # 64 pixels for Stable Diffusion: whole cells in all its layers
    return tuple(generate_aspect_ratio_buckets(resolution, divisibility=cells * stride))


def nearest_bucket(height: int, width: int, buckets: Sequence[Size]) -> Size:
    """The bucket of a picture."""
    from diffusers.training_utils import find_nearest_bucket

    return buckets[find_nearest_bucket(height, width, buckets)]


class BucketOrder:
    """The entries at the positions of an endless stream, in groups of one bucket.

    Entries of a bucket are shown in rounds, in a new order in each, and a group may run from one round into the next:
    no entry is shown more often than another. An epoch has the groups that are full once its rounds are there, the
    buckets in a random order. Everything follows from seed and position.

    Args:
        bucket_of: the bucket of each entry of an epoch.
        group: how many positions belong together: a batch of all processes.
        seed: the run's.
    """

    def __init__(self, bucket_of: Sequence[Size], group: int, seed: int) -> None:
        names = sorted(set(bucket_of))
        self.group = group
        self.seed = seed
        self._number_of = [names.index(bucket) for bucket in bucket_of]
        self._counts = [self._number_of.count(number) for number in range(len(names))]
        self._rounds: dict[int, list[list[int]]] = {}
        self._groups: tuple[int, list[tuple[int, int]]] = (-1, [])

    def entry_at(self, position: int) -> int:
        """The entry at a position."""
        number, place = divmod(position, self.group)
        # The last epoch that begins with this group or one before it: those before it may have no full group.
        most = (number + len(self._counts) + 1) * self.group // len(self._number_of) + 2
        epoch = bisect.bisect_right(range(most), number, key=self._groups_before) - 1
        bucket, index = self._groups_of(epoch)[number - self._groups_before(epoch)]
        round_number, at = divmod(index * self.group + place, self._counts[bucket])
        return self._round(round_number)[bucket][at]

    def _groups_before(self, epoch: int) -> int:
        return sum(epoch * count // self.group for count in self._counts)

    def _groups_of(self, epoch: int) -> list[tuple[int, int]]:
        """Bucket, and number in the bucket's stream, of each group of an epoch."""
        if self._groups[0] != epoch:
            first = [epoch * count // self.group for count in self._counts]
            behind = [(epoch + 1) * count // self.group for count in self._counts]
            buckets = [b for b, (start, end) in enumerate(zip(first, behind, strict=True)) for _ in range(start, end)]
            order = random_at(self.seed, epoch, Purpose.ORDER, Branch.BUCKETS).permutation(len(buckets))
            next_of = [itertools.count(start) for start in first]
            self._groups = epoch, [(buckets[place], next(next_of[buckets[place]])) for place in order]
        return self._groups[1]

    def _round(self, number: int) -> list[list[int]]:
        """The entries of each bucket in the order of one round."""
        if number not in self._rounds:
            if len(self._rounds) >= ROUNDS_KEPT:
                self._rounds.clear()
            found: list[list[int]] = [[] for _ in self._counts]
            for entry in epoch_order(self.seed, number, len(self._number_of)):
                found[self._number_of[entry]].append(entry)
            self._rounds[number] = found
        return self._rounds[number]
