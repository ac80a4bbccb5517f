"""Frozen blocks whose weights stay in main memory, and are on the device only while they are used (`--group_offload`).

diffusers' group offloading is for inference: it exchanges what a parameter holds, also under the tensors that the
backward pass has saved, and moves adapters with their blocks. Here a block gets copies of its frozen weights for each
forward pass, which the graph keeps until it has used them: with gradient checkpointing, one block at a time.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .activations import blocks_of

MARK = "apt_offloads_blocks"


class FrozenBlock:
    """The frozen weights of one block in main memory, and the hooks that bring them to the device.

    Args:
        block: whose adapter is attached and stays where it is.
        device: where it computes.
    """

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self.device = device
        self.weights: list[tuple[nn.Module, str, Tensor]] = []
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad:
                    weight = parameter.data.cpu()
                    pinned = weight.pin_memory() if device.type == "cuda" else weight
                    self.weights.append((module, name, pinned))
        self.after(block)
        block.register_forward_pre_hook(self.before)
        # Also where checkpointing ends a recomputation early.
        block.register_forward_hook(self.after, always_call=True)

    def before(self, block: nn.Module, *_: Any) -> None:
        """Pre-hook: new parameters on the device."""
        for module, name, weight in self.weights:
            self._set(module, name, weight.to(self.device, non_blocking=True, copy=True))

    def after(self, block: nn.Module, *_: Any) -> None:
        """Hook: those in main memory again."""
        for module, name, weight in self.weights:
            self._set(module, name, weight)

    @staticmethod
    def _set(module: nn.Module, name: str, weight: Tensor) -> None:
        # A new object: the graph's parameter keeps what it had.
        module._parameters[name] = nn.Parameter(weight, requires_grad=False)


def offload_blocks(model: nn.Module, device: torch.device) -> int:
    """Keeps the frozen weights of a denoiser's blocks in main memory, and moves all else to `device`.

    Args:
        model: on the CPU, with its adapter.
        device: where it computes.

    Returns:
        The bytes that are kept in main memory.
    """
    blocks = [FrozenBlock(block, device) for block in blocks_of(model).values()]
    kept = {(module, name) for block in blocks for module, name, _ in block.weights}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if (module, name) not in kept:
                parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    # DDP takes parameters of one device only; frozen ones need no synchronisation.
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    setattr(model, MARK, True)
    return sum(weight.nbytes for block in blocks for _, _, weight in block.weights)


def offloads_blocks(model: nn.Module) -> bool:
    """Whether `offload_blocks` has placed it: nothing else may move it to a device."""
    return getattr(model, MARK, False)
