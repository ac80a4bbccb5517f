"""Less memory for slower steps: activations that the backward pass computes again, of all blocks or of some."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Has the backward pass compute activations again instead of keeping them.

    Under both of the names that transformers has for it.
    """
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def blocks_of(model: Any, prefixes: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The blocks that a denoiser of diffusers is made of, by name; none contains another.

    Args:
        model: with weights or without.
        prefixes: beginnings of names, whole parts, as `up_blocks` or `transformer_blocks.3`; `None` for all blocks.

    Raises:
        ValueError: for one that begins no block's name.
    """
    kinds = {*(model._repeated_blocks or ()), *(model._no_split_modules or ())}
    named = {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}
    outer = {name for name in named for other in named if other.startswith(f"{name}.")}
    inner = {name: module for name, module in named.items() if name not in outer}
    if prefixes is None:
        return inner
    for prefix in prefixes:
        if not any(_is_under(name, prefix) for name in inner):
            tops = dict.fromkeys(name.split(".")[0] for name in inner)
            raise ValueError(
                f"--gradient_checkpointing_blocks {prefix}: no block of this {type(model).__name__} has a name that "
                f"begins so. They begin with {', '.join(tops)}; one of them is {next(iter(inner))}."
            )
    return {name: module for name, module in inner.items() if any(_is_under(name, prefix) for prefix in prefixes)}


def _is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def checkpoint_blocks(model: Any, prefixes: Sequence[str]) -> None:
    """`checkpoint_activations` for some of a denoiser's blocks; see `blocks_of`."""
    chosen = set(blocks_of(model, prefixes).values())

    def run(module: nn.Module, *args: Any) -> Any:
        return checkpoint(module, *args, use_reentrant=False) if module in chosen else module(*args)

    model.enable_gradient_checkpointing(run)
