"""Limits on what visitors may use of the machine: waiting requests, training steps and trainings."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits on what visitors may use of the machine.

    Args:
        queue: requests that may wait for the model.
        queue_per_visitor: waiting requests of one visitor.
        queue_per_address: waiting requests of one network address, which a classroom may share.
        train_steps: steps of one training.
        trainings: trainings at a time.
        trainings_per_address: trainings at a time from one address.
    """

    queue: int = 32
    queue_per_visitor: int = 4
    queue_per_address: int = 32
    train_steps: int = 2000
    trainings: int = 4
    trainings_per_address: int = 2
