"""A cache for values computed from tensors: a value is computed again only after one of its input tensors has changed.

The check takes microseconds per tensor. The prompts' keys in the denoising loop and the text features of a
classifier's classes are cached this way.
"""

import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


class Memo:
    """One value, with the tensors and plain settings that it was computed from.

    A tensor that was replaced, moved, or changed in place makes the value be computed anew. Changes that hide from
    PyTorch's version counter, such as `parameter.data.add_(1)`, are not seen; call `clear` then.
    """

    def __init__(self) -> None:
        self._settings: Any = None
        self._stamps: list[_Stamp] | None = None
        self.value: Any = None

    def get(self, compute: Callable[[], Any], tensors: list[Tensor], settings: Any) -> Any:
        """`compute()`, or its previous result if neither `tensors` nor `settings` have changed since."""
        if any(tensor.is_inference() for tensor in tensors):
            return compute()  # inference tensors do not count their changes
        if not self._holds(tensors, settings):
            self.value = compute()
            self._settings, self._stamps = settings, [_Stamp(tensor) for tensor in tensors]
        return self.value

    def clear(self) -> None:
        """Forgets the value."""
        self._settings = self._stamps = self.value = None

    def _holds(self, tensors: list[Tensor], settings: Any) -> bool:
        return (
            self._stamps is not None
            and self._settings == settings
            and len(self._stamps) == len(tensors)
            and all(stamp.fits(tensor) for stamp, tensor in zip(self._stamps, tensors, strict=True))
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"_settings": None, "_stamps": None, "value": None}  # a copy belongs to other modules


class _Stamp:
    """The state of one tensor. Weak references: replaced weights are not kept alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = weakref.ref(tensor)
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.state = tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device

    def fits(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the one that was seen, unchanged."""
        # An address may be used again after its storage was freed: a living storage at the same address is the same.
        state = tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device
        return self.tensor() is tensor and self.state == state and not self.storage.expired()


class ModuleCache:
    """One value that modules compute from constants, kept until one of the modules changes.

    Seen are: parameters and buffers (replaced, moved, or changed in place), modules and hooks that come or go, the
    settings of APT (scale, weights, names, on and off) and of PEFT's LoRA (scaling, names, on and off), autocast, and
    `key`.
    """

    def __init__(self) -> None:
        self._memo = Memo()

    def get(self, modules: list[nn.Module], key: Hashable, compute: Callable[[], Any]) -> Any:
        """`compute()`, or its result in the same state. It must not depend on randomness, and keep no graph."""
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        settings = [key, _autocast(tensors), *_settings(m for module in modules for m in module.modules())]
        return self._memo.get(compute, tensors, settings)

    def clear(self) -> None:
        """Forgets the value."""
        self._memo.clear()


def _settings(modules: Iterable[nn.Module]) -> Iterable[tuple]:
    """Everything besides the tensors that decides how modules act. Hooks are numbered in the order of creation."""
    for module in modules:
        found: tuple = (id(type(module)), module.training, *module._forward_hooks, None, *module._forward_pre_hooks)
        if hasattr(module, "memo_settings"):  # APT's processor core
            found += module.memo_settings()
        elif isinstance(getattr(module, "scaling", None), dict) and hasattr(module, "active_adapters"):
            found += (tuple(module.scaling.items()), tuple(module.active_adapters), module.disable_adapters)
        yield found


def _autocast(tensors: list[Tensor]) -> tuple:
    kind = tensors[0].device.type if tensors else "cpu"
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
