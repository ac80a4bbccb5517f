"""FSDP2: each process keeps a shard of the frozen base; what is trained is small and stays whole in every process.

`accelerate launch --use_fsdp --fsdp_version 2` asks for it. Wrapping, offloading and precision are those of
accelerate's FSDP plugin. The adapter is left out of the shards, so optimizer, average, files and checkpoints are those
of any run, and its gradients are averaged here.

Every process takes part in each forward pass of a sharded model: evaluations and samples, too.
"""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn

_ASKED = "ACCELERATE_USE_FSDP"  # set by `accelerate launch`


def is_asked_for() -> bool:
    """Whether the launcher asked for shards."""
    return os.environ.get(_ASKED, "false").lower() == "true"


def configure(accelerator: Accelerator, script: str, can_shard: bool) -> bool:
    """Whether the run's model is sharded; call it before any model is loaded.

    Accelerate itself leaves FSDP to GPUs, and with processes on the CPU says nothing.

    Args:
        accelerator: the run's.
        script: its name, for errors.
        can_shard: whether the script's evaluations run in all processes.

    Raises:
        ValueError: for FSDP 1, which cannot mix frozen and trained parameters of different precision; for a script
            whose model is not sharded.
    """
    if not is_asked_for() or accelerator.num_processes == 1:
        return False
    if not can_shard:
        raise ValueError(
            f"{script} does not shard its model. Leave out --use_fsdp, or DeepSpeed's stage 3: each process then has "
            "all of it."
        )
    # With it transformers would load random weights in all processes but one, to be overwritten by a broadcast that
    # the text encoders, which are not sharded, would not get.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    state: Any = accelerator.state
    if getattr(state, "fsdp_plugin", None) is None:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
    state.fsdp_plugin.cpu_ram_efficient_loading = False
    if state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP 1 cannot keep a frozen base and its adapter apart: add --fsdp_version 2 to the launcher."
        )
    return True


def shard(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Cuts the frozen parameters of `model` into shards, in place; the trained ones stay as they are.

    Args:
        accelerator: of a run for which `configure` was true.
        model: with its adapter.
        optimizer: over the trained parameters.
    """
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    trained = [module for module in model.modules() if any(p.requires_grad for p in module.parameters(recurse=False))]
    accelerator.state.fsdp_plugin.ignored_modules = trained
    return fsdp2_prepare_model(accelerator, model), accelerator.prepare_optimizer(optimizer)


def average_gradients(parameters: dict[str, nn.Parameter]) -> None:
    """The mean of all processes' gradients in each; one transfer for each precision."""
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in same])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for gradient, mean in zip(same, flat.split([gradient.numel() for gradient in same]), strict=True):
            gradient.copy_(mean.view_as(gradient))
