"""Attaching APT to a model and steering it: names and meaning follow diffusers' LoRA functions.

Every function takes one model (UNet, transformer, CLIP, ViLT, METER, any `nn.Module` with `target_modules`), a
diffusers pipeline (its denoisers and text encoders), or a dict of such components. Wrapped models (`torch.compile`,
DDP, FSDP) are unwrapped first.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .architectures import CHILDREN
from .block_weights import check_number
from .calls import apt_call as apt_call
from .calls import check_present, checked_weights
from .calls import prepared_apt as prepared_apt
from .components import components_of, config_per_component, wrapped_components
from .components import cores_of as cores_of
from .config import APTConfig
from .model import AdapterWeight, ModelAdapters, named_cores
from .processor import APTProcessorCore
from .words import remove_from_pipeline
from .wrappers import check_can_grow, is_shared, unwrap

logger = logging.getLogger(__name__)


def add_apt(
    model: Any, config: APTConfig | dict[str, APTConfig] | None = None, adapter_name: str = "default"
) -> list[str]:
    """Attaches a new adapter and makes it the active one. Freezes nothing. All or nothing.

    A compiled model sees it: its graphs are made again at the next call.

    Args:
        model: see the module's docstring.
        config: settings; for a pipeline also a dict of them by component. One config for a whole pipeline gives its
            `query_source` and `streams` to the denoisers; text encoders keep their defaults.
        adapter_name: a new name, any non-empty string.

    Returns:
        The names of the attention modules that were adapted.

    Raises:
        ValueError: for a name in use, places that do not exist or cannot be adapted, or a pipeline of which APT knows
            the text encoders only.
    """
    wrapped = wrapped_components(model)
    components = {name: unwrap(part) for name, part in wrapped.items()}
    configs = config_per_component(model, components, config or APTConfig())
    for part in configs:
        check_can_grow(wrapped[part])
    adapters = {part: ModelAdapters.of(components[part]) for part in configs}
    plans = {part: adapters[part].plan(configs[part], adapter_name) for part in configs}
    with undo_on_failure() as done:
        for part, (resolved, planned) in plans.items():
            before = dict(adapters[part].active)
            adapters[part].attach(adapter_name, resolved, planned)
            done.append((adapters[part], adapter_name, before))
    names = {part: dict.fromkeys(place.module_name for place, _ in planned) for part, (_, planned) in plans.items()}
    return [f"{part}.{name}".strip(".") for part in plans for name in names[part]]


@contextlib.contextmanager
def undo_on_failure() -> Iterator[list[tuple[ModelAdapters, str, dict[str, AdapterWeight]]]]:
    """Takes the adapters of the list `(adapters, name, active before)` away again if the block raises."""
    done: list[tuple[ModelAdapters, str, dict[str, AdapterWeight]]] = []
    try:
        yield done
    except BaseException:
        for adapters, name, before in done:
            adapters.active = before
            adapters.delete(name)
        raise


def remove_apt(model: Any, adapter_name: str | None = None) -> None:
    """Takes one adapter away, or all: the base model again, bit for bit, without hooks, children or settings."""
    components = check_present(model, [] if adapter_name is None else [adapter_name]).values()
    remove_from_pipeline(model, adapter_name)
    for component in components:
        adapters = ModelAdapters.of(component)
        if adapter_name is None:
            adapters.reset()
        elif adapter_name in adapters.configs:
            adapters.delete(adapter_name)


def delete_apt_adapters(model: Any, adapter_names: str | Sequence[str]) -> None:
    """Takes the named adapters away; `ValueError` for an unknown one, before any is deleted."""
    names = _as_list(adapter_names)
    check_present(model, names)
    for name in dict.fromkeys(names):
        remove_apt(model, name)


def set_apt_adapters(
    model: Any, adapter_names: str | Sequence[str], weights: AdapterWeight | Sequence[AdapterWeight] | None = None
) -> None:
    """Activates exactly these adapters: `Y = O + Σ λ_i (Y_i − O)`.

    Args:
        model: see the module's docstring.
        adapter_names: one or several; each must be present in at least one component.
        weights: λ per adapter (one number for all, or a list): a number, or as in diffusers a dict by component and
            block, `{"unet": {"down": 1.0, "mid": 0.5, "up": {"block_0": [0.2, 0.4]}}, "text_encoder": 0.8}`.

    Raises:
        ValueError: for unknown names, a wrong number of weights, or a weight that is not a finite number.
    """
    names = _as_list(adapter_names)
    components = check_present(model, names)
    values = list(weights) if isinstance(weights, list | tuple) else [1.0 if weights is None else weights] * len(names)
    if len(values) != len(names):
        raise ValueError(
            f"Length of adapter names {len(names)} is not equal to the length of the weights {len(values)}."
        )
    active = checked_weights(components, dict(zip(names, values, strict=True)))
    for part, component in components.items():
        ModelAdapters.of(component).set_active(active, part)


def get_active_apt_adapters(model: Any) -> list[str]:
    """Names of the active adapters, in the order of activation."""
    parts = components_of(model).values()
    return list(dict.fromkeys(name for part in parts for name in ModelAdapters.of(part).active))


def get_list_apt_adapters(model: Any) -> list[str] | dict[str, list[str]]:
    """All adapters: a list of names, or for a pipeline one list per component that has any."""
    lists = {part: list(ModelAdapters.of(component).configs) for part, component in components_of(model).items()}
    return lists[""] if "" in lists else {part: names for part, names in lists.items() if names}


def set_apt_scale(model: Any, scale: float) -> None:
    """A factor on the weights of all adapters, also later ones: 0 is the base model bit for bit, 1 changes nothing."""
    scale = check_number("scale", scale)
    for component in components_of(model).values():
        ModelAdapters.of(component).set_scale(scale)


def enable_apt(model: Any) -> None:
    """Undoes `disable_apt`."""
    for component in components_of(model).values():
        ModelAdapters.of(component).set_enabled(True)


class disable_apt:
    """Switches all adapters (and their heads) off at once; as a context manager, until its end."""

    def __init__(self, model: Any) -> None:
        adapters = [ModelAdapters.of(component) for component in components_of(model).values()]
        self.before = [(component, component.enabled) for component in adapters]
        for component, _ in self.before:
            component.set_enabled(False)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc_info: object) -> None:
        for component, enabled in self.before:
            component.set_enabled(enabled)


def freeze_base(model: Any) -> tuple[int, int]:
    """Only the active adapters and their `modules_to_save` stay trainable. Call it last, after any LoRA was added.

    Returns:
        `(trainable, total)` numbers of parameters.
    """
    whole = model if isinstance(model, dict) else {"": model} if isinstance(model, nn.Module) else model.components
    whole = {part: module for part, module in whole.items() if isinstance(module, nn.Module)}
    trained = {parameter for module in whole.values() for parameter in module.parameters() if parameter.requires_grad}
    for module in whole.values():
        module.requires_grad_(False)
    for parameter in adapter_parameters(model):
        parameter.requires_grad_(True)
    if any(map(is_shared, whole.values())) and any(not parameter.requires_grad for parameter in trained):
        logger.warning(
            "freeze_base came after DistributedDataParallel, which waits for the gradients of parameters that are "
            "frozen now: wrap the model after freeze_base."
        )
    parameters = [p for module in whole.values() for p in module.parameters()]
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def adapter_parameters(model: Any) -> list[nn.Parameter]:
    """Parameters of the active adapters and of their heads."""
    return [p for component in components_of(model).values() for p in ModelAdapters.of(component).parameters()]


def warn_untrained(model: Any) -> list[str]:
    """Call it once after the first backward pass: one warning names the adapter parameters that have no gradient.

    An adapter on a layer whose output is unused is never trained. Returns the parameters' names.
    """
    names = [
        f"{part}.{name}.{parameter_name}".strip(".")
        for part, component in components_of(model).items()
        for name, core in named_cores(component)
        for parameter_name, parameter in core.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    if names:
        logger.warning(
            "%d adapter parameters got no gradient in the first backward pass and will not be trained, e.g. %s: does "
            "the loss depend on these modules? Leave them out with target_modules.",
            len(names),
            ", ".join(names[:3]),
        )
    return names


@contextlib.contextmanager
def hidden_apt(model: Any) -> Iterator[None]:
    """Context manager: the model has no APT children and the base model's heads. For saving the base."""
    with disable_apt(model):
        hidden = [
            (module, child, module._modules.pop(child))
            for component in components_of(model).values()
            for module in list(component.modules())
            for child in CHILDREN
            if isinstance(module._modules.get(child), APTProcessorCore)
        ]
        try:
            yield
        finally:
            for module, child, core in hidden:
                module._modules[child] = core


def _as_list(adapter_names: str | Sequence[str]) -> list[str]:
    return [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
