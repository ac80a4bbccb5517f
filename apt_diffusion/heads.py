"""`modules_to_save`: heads that belong to an adapter, kept apart from the base model's own.

The head's module stays in the model, so parameter names do not change. Only its values are swapped in place: those of
the base model, or those of the adapter whose heads are in use.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .architectures import CHILDREN
from .places import find_modules, matches


@dataclass
class Heads:
    """Head values of the base model and of the adapters not in use; `in_use` is the adapter whose heads are active."""

    base: dict[str, Tensor] = field(default_factory=dict)
    stored: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    in_use: str | None = None

    def add(self, model: nn.Module, adapter_name: str, modules_to_save: tuple[str, ...]) -> None:
        """A new adapter starts from the base's heads."""
        names = list(head_tensors(model, modules_to_save))
        self.use(model, None)
        for name, tensor in _tensors(model, names).items():
            self.base.setdefault(name, tensor.detach().clone())
        self.stored[adapter_name] = {name: self.base[name].clone() for name in names}

    def use(self, model: nn.Module, adapter_name: str | None) -> None:
        """Puts the heads of `adapter_name` (`None`: the base's) into the model and keeps those that were there."""
        if adapter_name == self.in_use:
            return
        if self.in_use is not None:
            self.stored[self.in_use] = self.state(model, self.in_use)
        values = self.base if adapter_name is None else {**self.base, **self.stored[adapter_name]}
        _write(model, values)
        self.in_use = adapter_name

    def state(self, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        """A copy of the adapter's head values, wherever they are now."""
        stored = self.stored[adapter_name]
        source = _tensors(model, list(stored)) if self.in_use == adapter_name else stored
        return {name: tensor.detach().clone() for name, tensor in source.items()}

    def write(self, model: nn.Module, adapter_name: str, values: dict[str, Tensor]) -> None:
        """Gives the adapter other head values: in the model where they are in use, else in the store."""
        if self.in_use == adapter_name:
            _write(model, values)
        else:
            self.stored[adapter_name] = {name: tensor.clone() for name, tensor in values.items()}

    def delete(self, model: nn.Module, adapter_name: str) -> None:
        """Forgets an adapter's heads; the base model's are put back where they were in use."""
        if self.in_use == adapter_name:
            self.use(model, None)
        self.stored.pop(adapter_name, None)
        if not self.stored:
            self.base.clear()


def head_tensors(model: nn.Module, modules_to_save: tuple[str, ...]) -> dict[str, Tensor]:
    """Parameters and buffers of what `modules_to_save` names, by full name: modules, or parameters themselves.

    The full name of a parameter means this parameter alone, not others whose names end like it.
    """
    own = {name: p for name, p in model.named_parameters() if not set(CHILDREN) & set(name.split("."))}
    suffixes = tuple(name for name in modules_to_save if name not in own)
    parameters = {name: p for name, p in own.items() if name in modules_to_save or matches(name, suffixes)}
    modules = tuple(name for name in modules_to_save if not any(matches(found, (name,)) for found in parameters))
    tensors: dict[str, Tensor] = {}
    for prefix, module in (find_modules(model, modules, "modules_to_save") if modules else {}).items():
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in module.state_dict(keep_vars=True).items()}
    return tensors | parameters


def _tensors(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensors[name] for name in names}


def _write(model: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _tensors(model, list(values)).items():
            tensor.copy_(values[name])
