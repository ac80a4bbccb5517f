"""Attaching APT to a model and steering it: names and meaning follow diffusers' LoRA functions.

Every function takes one model (UNet, transformer, CLIP, ViLT, METER, any `nn.Module` with `target_modules`), a
diffusers pipeline (its denoisers and text encoders), or a dict of such components. Wrapped models (`torch.compile`,
DDP, FSDP) are seen through.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .architectures import CHILDREN, DENOISERS
from .block_weights import check_number, plain_weight
from .components import components_of, config_per_component, wrapped_components
from .config import APTConfig
from .model import AdapterWeight, Call, ModelAdapters, named_cores
from .processor import APTProcessorCore, Sample
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
    for component in check_present(model, [] if adapter_name is None else [adapter_name]).values():
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
    active = _checked_weights(components, dict(zip(names, values, strict=True)))
    for part, component in components.items():
        ModelAdapters.of(component).set_active(active, part)


def _checked_weights(components: dict[str, nn.Module], active: dict[str, Any]) -> dict[str, AdapterWeight]:
    """The weights as Python numbers, checked on every component before the first is changed."""
    active = {name: plain_weight(weight) for name, weight in active.items()}
    for part, component in components.items():
        ModelAdapters.of(component).check_weights(active, part)
    unused = {
        part
        for name, weight in active.items()
        for part in (weight if isinstance(weight, dict) and "" not in components else ())
        if part not in components or name not in ModelAdapters.of(components[part]).configs
    }
    if unused:
        logger.warning("Ignoring adapter weights of components that carry no adapters: %s.", sorted(unused))
    return active


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


@contextlib.contextmanager
def apt_call(
    model: Any,
    scale: float | dict[str, AdapterWeight] | None = None,
    adapter_names: Sequence[Sample] | None = None,
    images_per_prompt: int = 1,
) -> Iterator[None]:
    """Within it the adapters act with the settings of one call; at its end with the model's own again.

    What is changed during the call (scale, weights, adapters) acts at once and stays.

    Args:
        model: see the module's docstring.
        scale: a number in place of the model's scale, or `{adapter: weight}`: exactly these adapters.
        adapter_names: per sample of the batch an adapter's name, `{adapter: weight}` for a mix, or `None` for the
            base model. A name alone has its weight in `scale` or its active one, else 1.
        images_per_prompt: how often the denoisers repeat each sample.

    Raises:
        ValueError: for unknown adapters or weights that are not numbers.
        RuntimeError: while another call is under way on the same model.
    """
    components = check_present(model, names_of_call(scale, adapter_names))
    carrying = {part: ModelAdapters.of(c) for part, c in components.items() if ModelAdapters.of(c).configs}
    number = None if scale is None or isinstance(scale, dict) else check_number("apt_scale", scale)
    weights = _checked_weights(components, scale) if isinstance(scale, dict) else None
    samples: tuple[Any, ...] | None = None
    if adapter_names is not None:
        samples = tuple(_checked_weights(components, s) if isinstance(s, dict) else s for s in adapter_names)
    begun = []
    try:
        for part, adapters in carrying.items():
            active = weights if weights is None or samples is None else adapters.active | weights
            repeats = images_per_prompt if part in DENOISERS else 1
            rows = samples and tuple(sample for sample in samples for _ in range(repeats))
            adapters.begin_call(Call(number, active, rows), part)
            begun.append(adapters)
        yield
    finally:
        for adapters in begun:
            adapters.end_call()


def names_of_call(scale: Any, adapter_names: Sequence[Sample] | None) -> list[str]:
    """The adapters that the arguments of `apt_call` name."""
    names = list(scale) if isinstance(scale, dict) else []
    for sample in adapter_names or ():
        names += [sample] if isinstance(sample, str) else list(sample or ())
    return names


@contextlib.contextmanager
def prepared_apt(model: Any) -> Iterator[None]:
    """Within it, and without gradients, keys and scales are computed once per adapter, not once per call.

    A change of weights is seen there too, unless it hides from PyTorch's version counter (`parameter.data.copy_`):
    that is why this is a context and not the rule. Pipelines enter it for every call; around several calls it serves
    them all.
    """
    before = [(core, core.keep_folded) for core in cores_of(model)]
    for core, _ in before:
        core.set_keep_folded(True)
    try:
        yield
    finally:
        for core, keep_folded in before:
            core.set_keep_folded(keep_folded)


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

    An adapter on a layer whose output nobody reads is never trained. Returns the names.
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
    """Within it the model looks like the base model: no APT children, base heads. For saving the base."""
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


def cores_of(model: Any) -> Iterator[APTProcessorCore]:
    """The processor cores of all components."""
    for component in components_of(model).values():
        yield from (core for _, core in named_cores(component))


def check_present(model: Any, adapter_names: Sequence[str]) -> dict[str, nn.Module]:
    """The components; `ValueError` for an adapter that none of them has."""
    components = components_of(model)
    present = {name for component in components.values() for name in ModelAdapters.of(component).configs}
    missing = set(adapter_names) - present
    if missing:
        raise ValueError(f"Adapter name(s) {sorted(missing)} not in the list of present adapters: {sorted(present)}.")
    return components


def _as_list(adapter_names: str | Sequence[str]) -> list[str]:
    return [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
