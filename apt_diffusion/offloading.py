"""Attaching adapters to a model whose weights diffusers or accelerate move between devices, or to disk."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Context manager: loads the offloaded weights of `module`, for code that reads them without a forward pass."""
    hooks = [getattr(module, "_hf_hook", None), _group_hook(module)]  # accelerate's and diffusers'
    hooks = [hook for hook in hooks if hook is not None]
    for hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.post_forward(module, None)


@torch.no_grad()
def keep_off_disk(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Removes `parameters` from the groups that diffusers keeps on disk, where they could not be read or written."""
    hooks = [_group_hook(module) for module in model.modules() if "_diffusers_hook" in vars(module)]
    for group in {hook.group for hook in hooks if hook and hook.group.offload_to_disk_path}:
        ours = [parameter for parameter in parameters if parameter in group.tensor_to_key]
        if ours:
            group.onload_()
            for parameter in ours:
                del group.key_to_tensor[group.tensor_to_key.pop(parameter)]
                parameter.data = parameter.data.to(group.offload_device, copy=True)  # not mapped from the file
            group.offload_()


def _group_hook(module: nn.Module) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    return registry and registry.get_hook("group_offloading")


def regroup_offloaded(model: nn.Module) -> None:
    """Rebuilds the parameter lists of `model`'s offloaded blocks, as diffusers does for a LoRA that is loaded later.

    With streams, a parameter that is missing in its block's list ends the next forward pass in a `KeyError`. Leaves,
    and blocks on disk, move what is in their lists and nothing else: there an adapter stays where it is.
    """
    offloading: Any = sys.modules.get("diffusers.hooks.group_offloading")
    hook = offloading and offloading._get_top_level_group_offload_hook(model)
    if hook and hook.config.offload_type == "block_level" and not hook.config.offload_to_disk_path:
        offloading._maybe_remove_and_reapply_group_offloading(model)
