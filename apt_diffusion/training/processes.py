"""The models and the optimizer of a step as accelerate wraps them for several processes."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from .frozen_blocks import offloads_blocks


def wrap(
    accelerator: Accelerator, models: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, nn.Module], list[nn.Module], Any]:
    """The models by their names; those in which something is trained; the optimizer.

    The others are not shared between processes: DDP refuses a model in which nothing is trained.
    """
    learning = [name for name, model in models.items() if any(p.requires_grad for p in model.parameters())]
    placed = [*(not offloads_blocks(models[name]) for name in learning), True]
    *prepared, wrapped_optimizer = accelerator.prepare(
        *(models[name] for name in learning), optimizer, device_placement=placed
    )
    wrapped = dict(zip(learning, prepared, strict=True))
    for name in models.keys() - wrapped.keys():
        own = offloads_blocks(models[name])
        wrapped[name] = accelerator.prepare_model(models[name], device_placement=not own, evaluation_mode=True)
    return {name: wrapped[name] for name in models}, prepared, wrapped_optimizer
