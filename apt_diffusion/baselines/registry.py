"""The base class of adaptation methods, and the registry read by trainers, benchmarks, cost tables and the studio.

A method is one object. It attaches to a model, lists its parameters, counts its costs, and declares settings that
become flags of the trainers. `register_method` adds a method, also from code outside this package.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from torch import nn

T = TypeVar("T", bool, int, float, str, "str | None")
CHILD = "compared_method"  # the name under which a module holds what a method adds to it


class Costs(NamedTuple):
    """What a method adds to the frozen model."""

    parameters: int
    macs: int  # per forward pass of one sample; keys of `apt` are made once for all samples of a batch


@dataclass(frozen=True)
class Setting(Generic[T]):
    """One value that a method can be set to; the trainers have a flag of the same name.

    Args:
        name: a Python identifier.
        default: its type is that of the setting; `None` for a choice that is open.
        help: one sentence for `--help`.
        choices: the only values, where there are few.
        is_size: a positive integer that is a dimension of the method's tensors: a file that claims another one is
            refused before anything of that size is made.
    """

    name: str
    default: T
    help: str
    choices: tuple[Any, ...] | None = None
    is_size: bool = False

    @property
    def type(self) -> type:
        """The type that its values have on a command line."""
        return str if self.default is None else type(self.default)

    def check(self, value: Any) -> None:
        """`ValueError` for a value that it cannot have."""
        if self.choices is not None:
            if value != self.default and value not in self.choices:
                raise ValueError(f"{self.name} must be one of {list(self.choices)}, got {value!r}.")
        elif self.is_size:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{self.name} must be positive and whole, got {value!r}.")
        elif self.type is float:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{self.name} must be a finite number, got {value!r}.")
        elif type(value) is not self.type:
            raise ValueError(f"{self.name} must be of type {self.type.__name__}, got {value!r}.")


class Method(ABC):
    """One method of adaptation. Subclass it, and give an instance to `register_method`.

    The defaults suit a method whose parameters all sit in modules that it adds as children named `CHILD`, with hooks
    that are bound methods of these children; such a method defines `attach` alone.

    Attributes:
        label: its name in tables and pages.
        settings: its settings, which `attach` takes by name.
        model_classes: names of base classes of the models that it works on; empty for any model.
        trains_base: whether all parameters of the model are trained and stored.
        learning_rates: the learning rates that a comparison tries.
        costs_per: the unit that `costs` counts: an `"attention"` module, a `"branch"` (attention or feed-forward part
            of a layer), or a whole `"layer"`.
        costs_note: a note that cost tables show in brackets after the label.
    """

    name: str = ""  # set by `register_method`
    label: str = ""
    settings: tuple[Setting[Any], ...] = ()
    model_classes: tuple[str, ...] = ()
    trains_base: bool = False
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    costs_per: str = "attention"
    costs_note: str = ""

    @abstractmethod
    def attach(self, model: nn.Module, *_: Any, **settings: Any) -> list[str]:
        """Attaches to `model`, with a value for each of `settings`; freezes nothing.

        Returns:
            The names of the modules that it acts on.
        """

    def detach(self, model: nn.Module) -> None:
        """Undoes `attach`: afterwards the model has the same modules and hooks as before `attach`."""
        for module in list(model.modules()):
            child = module._modules.pop(CHILD, None)
            if child is not None:
                remove_hooks(model, child)

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Full names and values of the parameters that it trains in a model to which it is attached."""
        return [(name, p) for name, p in model.named_parameters() if CHILD in name.split(".")]

    def costs(self, hidden_size: int, tokens: Sequence[int], *_: Any, **settings: Any) -> Costs:
        """The closed form for modules of one width, with a number of tokens for each of them.

        A method that has one also takes by name, with their defaults, the settings that its costs depend on.
        """
        raise ValueError(f"There is no closed form of what {self.name!r} costs.")

    def config(self, **settings: Any) -> Any:
        """What `add_method` takes for these settings."""
        return MethodConfig(self.name, **settings)

    @property
    def has_costs(self) -> bool:
        """Whether it brings a closed form."""
        return type(self).costs is not Method.costs

    def defaults(self) -> dict[str, Any]:
        """Its settings' default values by name."""
        return {setting.name: setting.default for setting in self.settings}

    def check_model(self, model: nn.Module) -> None:
        """`ValueError` for a model that it does not work on."""
        names = {cls.__name__ for cls in type(model).__mro__}
        if self.model_classes and not names & set(self.model_classes):
            known = ", ".join(name.removesuffix("PreTrainedModel") for name in self.model_classes)
            raise ValueError(f"{self.name!r} is made for {known}, not for {type(model).__name__}.")


@dataclass(frozen=True, init=False)
class MethodConfig:
    """A method and its settings; what is not given has the method's default, that of the published tables.

    Args:
        method: the name of a registered method other than APT, which has `APTConfig`.
        trained: name suffixes of modules and parameters that are trained together with the method; the heads of the
            model's family if `None`.
        settings: the method's own, such as `num_prompts`, `rank` or `bottleneck`.

    Raises:
        ValueError: for an unknown method, a setting that it does not have, or a value that the setting cannot have.
    """

    method: str
    trained: tuple[str, ...] | None
    settings: dict[str, Any] = field(hash=False)

    def __init__(self, method: str, *, trained: Sequence[str] | None = None, **settings: Any) -> None:
        found = get_method(method)
        if type(found).config is not Method.config:
            raise ValueError(f"{method!r} has a door of its own: give its {type(found.config()).__name__} instead.")
        unknown = sorted(set(settings) - set(found.defaults()))
        if unknown:
            own = ", ".join(found.defaults()) or "none"
            raise ValueError(f"{method!r} has no setting {', '.join(unknown)}; its settings: {own}.")
        values = found.defaults() | settings
        for setting in found.settings:
            setting.check(values[setting.name])
        if isinstance(trained, str) or not all(isinstance(name, str) for name in trained or ()):
            raise ValueError(f"trained must be a list of names, got {trained!r}.")
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "trained", None if trained is None else tuple(trained))
        object.__setattr__(self, "settings", values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the method's name, `trained`, and each setting under its name."""
        return {
            "method": self.method,
            "trained": None if self.trained is None else list(self.trained),
            **self.settings,
        }


_METHODS: dict[str, Method] = {}


def register_method(name: str, method: Method, exist_ok: bool = False) -> None:
    """Adds a method to the comparison: trainers, benchmarks, cost tables and the studio know it from now on.

    Args:
        name: its name on command lines and in files: small letters, digits and underscores.
        method: the method.
        exist_ok: whether it may take the place of another one of that name.

    Raises:
        TypeError: for anything but an instance of `Method`.
        ValueError: for a name in use or not allowed, or a setting of another type than that of a registered method.
    """
    if not isinstance(method, Method):
        raise TypeError(f"A method is an instance of a subclass of Method, got {method!r}.")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"A method's name has small letters, digits and underscores, got {name!r}.")
    if name in _METHODS and not exist_ok:
        raise ValueError(f"There is a method {name!r} already: choose another name, or pass exist_ok=True.")
    for setting in method.settings:
        if not setting.name.isidentifier() or setting.name in ("method", "trained"):
            raise ValueError(f"A setting cannot be called {setting.name!r}.")
        for other_name, other in _settings_called(setting.name):
            if other_name != name and other.type is not setting.type:
                raise ValueError(
                    f"The setting {setting.name} of {name!r} has the type {setting.type.__name__}, that of "
                    f"{other_name!r} {other.type.__name__}: one flag serves both, so give it another name."
                )
    method.name = name
    method.label = method.label or name
    _METHODS[name] = method


def unregister_method(name: str) -> None:
    """Removes a registered method; `ValueError` for an unknown name."""
    get_method(name)
    del _METHODS[name]


def get_method(name: str) -> Method:
    """The method of that name; for an unknown name, a `ValueError` that lists all methods."""
    if name not in _METHODS:
        raise ValueError(f"Unknown method {name!r}, expected one of {tuple(_METHODS)}.")
    return _METHODS[name]


def method_names() -> tuple[str, ...]:
    """All registered methods, in the order of their registration."""
    return tuple(_METHODS)


def _settings_called(name: str) -> Iterator[tuple[str, Setting[Any]]]:
    for method_name, method in _METHODS.items():
        yield from ((method_name, setting) for setting in method.settings if setting.name == name)


def add_child(module: nn.Module, child: nn.Module) -> None:
    """Registers what a method adds to `module`, on the device and in the dtype of the module's parameters."""
    weight = next(module.parameters())
    module.add_module(CHILD, child.to(weight.device, weight.dtype))


def remove_hooks(model: nn.Module, owner: nn.Module) -> None:
    """Removes all hooks that are bound methods of `owner`; a deep copy of a model has no handles to remove them by."""
    for module in model.modules():
        for hooks, extras in (
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        ):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
                del hooks[key]
                for extra in extras:
                    extra.pop(key, None)
