"""Unwraps models (DDP, FSDP, torch.compile, ...), and refuses operations that do not work on a wrapped model."""

from torch import Tensor, nn

# By class name: importing FSDP or DeepSpeed takes seconds. Both keep the model as `module`.
_AS_MODULE = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}
# What torch's wrappers add to the names of the modules inside them.
_SEGMENTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_SHARED = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}


def _kinds(module: nn.Module) -> list[str]:
    return [cls.__name__ for cls in type(module).__mro__]


def wrapper_kind(model: nn.Module) -> str | None:
    """The class name of the wrapper that `model` is, `None` for a model itself."""
    return next((kind for kind in _kinds(model) if kind in _AS_MODULE or kind == "OptimizedModule"), None)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, FSDP, DeepSpeed and `torch.compile`, however nested."""
    while (kind := wrapper_kind(model)) is not None:
        model = model._orig_mod if kind == "OptimizedModule" else model.module
    return model


def is_shared(model: nn.Module) -> bool:
    """Whether a wrapper around the model synchronises its gradients between processes."""
    return any(kind in _SHARED for module in model.modules() for kind in _kinds(module))


def check_can_grow(model: nn.Module) -> None:
    """`ValueError` where the model's parameters are registered already: new ones would not be synchronised."""
    kinds = [kind for module in (model, *model.modules()) for kind in _kinds(module) if kind in _SHARED]
    if kinds:
        raise ValueError(
            f"{kinds[0]} has registered the model's parameters already and would not synchronise new ones. Attach or "
            "load adapters first, then wrap the model"
            + ("." if kinds[0] == "FSDPModule" else f"; for inference, pass the model inside, `{kinds[0]}.module`.")
        )


def check_is_whole(name: str, prompts: Tensor | None, down: Tensor | None) -> None:
    """`ValueError` where FSDP's first version keeps only this process's shards of an adapter's parameters."""
    if prompts is None or down is None or prompts.ndim != 2 or down.ndim != 2 or prompts.shape[1] != down.shape[1]:
        raise ValueError(
            f"The adapter's parameters at {name} are sharded by FullyShardedDataParallel. Save and swap adapters "
            "within `with FullyShardedDataParallel.summon_full_params(model):`, or shard with `fully_shard`."
        )


def unwrapped_name(name: str) -> str:
    """`name` without the segments of `torch.compile`, FSDP and activation checkpointing."""
    if "._" not in f".{name}":
        return name
    return ".".join(segment for segment in name.split(".") if segment not in _SEGMENTS)
