"""A value that a module computes from constants, kept until something that it depends on changes.

Asking whether something changed costs a millisecond, where the value may cost minutes: the text features of a
classifier's classes are the case in point.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .processor import APTProcessorCore


class ModuleCache:
    """One value, and the state of the modules that it was computed in.

    Seen are: parameters and buffers (replaced, moved, or changed in place), modules and hooks that come or go, what
    switches APT (scale, weights, names, on and off) and PEFT's LoRA (scaling, names, on and off), autocast, and `key`.
    Not seen: changes that hide from PyTorch's version counter, such as `parameter.data.add_(1)`; call `clear` then.
    """

    def __init__(self) -> None:
        self._state: list | None = None
        self._value: Any = None

    def get(self, modules: list[nn.Module], key: Hashable, compute: Callable[[], Any]) -> Any:
        """`compute()`, or what it gave in the same state. It must not depend on randomness, and keep no graph."""
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        if any(tensor.is_inference() for tensor in tensors):
            return compute()  # such tensors do not count their changes
        state = [key, _autocast(tensors), *(_settings(m) for module in modules for m in module.modules())]
        state += [_stamp(tensor) for tensor in tensors]
        if state != self._state:
            self._value, self._state = compute(), state
        return self._value

    def clear(self) -> None:
        self._state = self._value = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_state": None, "_value": None}  # a copy belongs to other modules


def _stamp(tensor: Tensor) -> tuple:
    # Weak references keep no replaced weights alive, and equal only others to the same tensor and the same storage: an
    # address alone may be used again.
    storage = StorageWeakRef(tensor.untyped_storage())
    return _Same(tensor), tensor._version, storage, tensor.data_ptr(), tensor.dtype, tensor.device


class _Same:
    """Compares tensors by identity."""

    def __init__(self, tensor: Tensor) -> None:
        self.reference = weakref.ref(tensor)

    def __eq__(self, other: object) -> bool:
        mine = self.reference()
        return isinstance(other, _Same) and mine is not None and mine is other.reference()

    __hash__ = None


def _settings(module: nn.Module) -> tuple:
    """What decides how a module acts, beside its tensors. Hooks are numbered in order of their making."""
    found: tuple = (id(type(module)), module.training, *module._forward_hooks, None, *module._forward_pre_hooks)
    if isinstance(module, APTProcessorCore):
        found += (module.enabled, module.scale, tuple(module.weights.items()), module.adapters_per_sample)
        found += tuple(module.query_sources.items())
    elif isinstance(getattr(module, "scaling", None), dict) and hasattr(module, "active_adapters"):
        found += (tuple(module.scaling.items()), tuple(module.active_adapters), module.disable_adapters)
    return found


def _autocast(tensors: list[Tensor]) -> tuple:
    kind = tensors[0].device.type if tensors else "cpu"
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
