"""Wrappers around a model (DDP, FSDP, torch.compile, ...): what is inside, and what cannot be done through them."""

from torch import nn

# By class name: importing FSDP or DeepSpeed takes seconds. Both keep the model as `module`.
_AS_MODULE = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}
# What torch's wrappers add to the names of the modules inside them.
_SEGMENTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_SHARED = {"DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}


def wrapper_kind(model: nn.Module) -> str | None:
    """The class name of the wrapper that `model` is, `None` for a model itself."""
    names = [cls.__name__ for cls in type(model).__mro__]
    return next((name for name in names if name in _AS_MODULE or name == "OptimizedModule"), None)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, FSDP, DeepSpeed and `torch.compile`, however nested."""
    while (kind := wrapper_kind(model)) is not None:
        model = model._orig_mod if kind == "OptimizedModule" else model.module
    return model


def check_can_grow(model: nn.Module) -> None:
    """`ValueError` for a wrapper that has registered its parameters already: new ones would not be synchronised."""
    while (kind := wrapper_kind(model)) is not None:
        if kind in _SHARED:
            raise ValueError(
                f"{kind} has registered the model's parameters already and would not synchronise new ones. Attach "
                f"or load adapters first, then wrap the model; or pass the model inside, `{kind}.module`."
            )
        model = model._orig_mod if kind == "OptimizedModule" else model.module


def check_can_be_read(model: nn.Module) -> None:
    """`ValueError` where FSDP's first version keeps only this process's shards of the parameters."""
    for module in model.modules():
        if wrapper_kind(module) == "FullyShardedDataParallel":
            raise ValueError(
                "This model's parameters are sharded by FullyShardedDataParallel. Save and load adapters within "
                "`with FullyShardedDataParallel.summon_full_params(model):`, or shard with `fully_shard`."
            )


def unwrapped_name(name: str) -> str:
    """`name` without the segments of `torch.compile`, FSDP and activation checkpointing."""
    if "._" not in f".{name}":
        return name
    return ".".join(segment for segment in name.split(".") if segment not in _SEGMENTS)
