"""Several processes of one run: the models and the optimizer as accelerate wraps them, and the end."""

import atexit
import os
import sys
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


def leave() -> None:
    """Ends this process where it is one of several and its run is complete; returns in a run of one.

    DDP and FSDP keep gloo's threads beyond `destroy_process_group`. Where one of them lets go of a tensor while the
    interpreter is taken down, the process aborts, and the launcher reports a complete run as failed. So the
    interpreter is not taken down: functions of `atexit` run, and the process ends.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # set by `accelerate launch` and torchrun
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
