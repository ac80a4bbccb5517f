"""Adapter names: any non-empty string, even one that torch would refuse as a module name (it may contain a dot)."""

from collections.abc import Iterable, Iterator

from torch import nn

from .equation import ApproximatedPrompt

_TAKEN = frozenset(dir(nn.ModuleDict()))  # `items`, `forward`, `training`, ...


def check_name(adapter_name: object) -> None:
    """Raises `ValueError` for what is not a non-empty string."""
    if not isinstance(adapter_name, str) or not adapter_name:
        raise ValueError(f"An adapter name is a non-empty string, got {adapter_name!r}.")


def module_name(adapter_name: str) -> str:
    """The adapter's name as torch allows it: without dots, and none of torch's own attributes."""
    escaped = adapter_name.replace("%", "%25").replace(".", "%2E")
    return f"%{escaped}" if escaped in _TAKEN else escaped


def adapter_name(module_name: str) -> str:
    """Inverse of `module_name`."""
    if module_name.startswith("%") and module_name[1:] in _TAKEN:
        return module_name[1:]
    return module_name.replace("%2E", ".").replace("%25", "%")


class Adapters(nn.ModuleDict):
    """The adapters of one attention module by name, `name -> ApproximatedPrompt`; names may hold any character."""

    def __getitem__(self, name: str) -> ApproximatedPrompt:
        return self._modules[module_name(name)]

    def __setitem__(self, name: str, adapter: nn.Module) -> None:
        self.add_module(module_name(name), adapter)

    def __delitem__(self, name: str) -> None:
        del self._modules[module_name(name)]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and module_name(name) in self._modules

    def __iter__(self) -> Iterator[str]:
        return map(adapter_name, self._modules)

    def keys(self) -> Iterable[str]:
        """The adapters' names."""
        return [adapter_name(name) for name in self._modules]

    def items(self) -> Iterable[tuple[str, nn.Module]]:
        """Pairs of name and adapter."""
        return [(adapter_name(name), module) for name, module in self._modules.items()]

    def pop(self, name: str) -> nn.Module:
        """Takes one adapter out and returns it."""
        return self._modules.pop(module_name(name))
