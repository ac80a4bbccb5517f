"""The models and the optimizer of a step as accelerate wraps them for several processes."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn


def wrap(
    accelerator: Accelerator, models: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, nn.Module], list[nn.Module], Any]:
    """The models by their names; those in which something is trained; the optimizer.

    The others are not shared between processes: DDP refuses a model in which nothing is trained.
    """
    learning = [name for name, model in models.items() if any(p.requires_grad for p in model.parameters())]
    *prepared, wrapped_optimizer = accelerator.prepare(*(models[name] for name in learning), optimizer)
    wrapped = dict(zip(learning, prepared, strict=True))
    for name in models.keys() - wrapped.keys():
        wrapped[name] = accelerator.prepare_model(models[name], evaluation_mode=True)
    return {name: wrapped[name] for name in models}, prepared, wrapped_optimizer
