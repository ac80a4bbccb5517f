"""How the error of a prediction counts, and how the samples of a batch make its loss.

axes: B batch, c channels, h height, w width
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor], Tensor]  # an error to what it counts, element by element

LOSS_TYPES = ("l2", "l1", "huber")


def squared(error: Tensor) -> Tensor:
    """e²."""
    return error.square()


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """2 c (√(e² + c²) - c): near e² for errors well below c, near 2 c |e| above (`huber` of kohya's scripts)."""
    return 2 * c * (torch.sqrt(error.square() + c**2) - c)


def distance_of(loss_type: str, huber_c: float) -> Distance:
    """The distance that `--loss_type` and `--huber_c` name."""
    if loss_type == "huber":
        return functools.partial(pseudo_huber, c=huber_c)
    return {"l1": torch.abs, "l2": squared}[loss_type]


def masked(distance: Distance, weights: Tensor) -> Distance:
    """A distance in which each place counts as much as its weight, `(B, 1, h, w)`: at 0 the gradient is exactly 0."""
    return lambda error: distance(error) * weights


def mean_errors(prediction: Tensor, target: Tensor, distance: Distance) -> Tensor:
    """The mean over each sample `(B, c, h, w)`, `(B,)`."""
    return distance(prediction.float() - target.float()).flatten(1).mean(1)


def batch_loss(errors: Tensor, prior_weight: float | None = None) -> Tensor:
    """The mean of `errors` `(B,)`; with `prior_weight` the second half of them is the class and weighs that much."""
    if prior_weight is None:
        return errors.mean()
    instance, prior = errors.chunk(2)
    return instance.mean() + prior_weight * prior.mean()
