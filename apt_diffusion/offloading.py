"""Adapters that come into a model whose blocks diffusers already moves between devices."""

import sys

from torch import nn


def regroup_offloaded(model: nn.Module) -> None:
    """Makes the parameter lists of `model`'s offloaded blocks anew, as diffusers does for a LoRA that comes late.

    With streams, a parameter that is missing in its block's list ends the next forward pass in a `KeyError`. Leaves,
    and blocks on disk, move what is in their lists and nothing else: there an adapter stays where it is.
    """
    offloading = sys.modules.get("diffusers.hooks.group_offloading")
    hook = offloading and offloading._get_top_level_group_offload_hook(model)
    if hook and hook.config.offload_type == "block_level" and not hook.config.offload_to_disk_path:
        offloading._maybe_remove_and_reapply_group_offloading(model)
