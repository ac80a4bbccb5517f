"""The settings of one pipeline or model call: scale, adapter weights, adapters per sample, and cached prompt keys."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .architectures import DENOISERS
from .block_weights import check_number, plain_weight
from .components import components_of, cores_of
from .model import AdapterWeight, Call, ModelAdapters
from .processor import Sample

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def apt_call(
    model: Any,
    scale: float | dict[str, AdapterWeight] | None = None,
    adapter_names: Sequence[Sample] | None = None,
    images_per_prompt: int = 1,
) -> Iterator[None]:
    """Context manager: applies settings for one call, and restores the model's own settings at the end.

    Changes that are made during the call (scale, weights, adapters) act at once and stay.

    Args:
        model: a model, a diffusers pipeline or a dict of components.
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
    weights = checked_weights(components, scale) if isinstance(scale, dict) else None
    samples: tuple[Any, ...] | None = None
    if adapter_names is not None:
        samples = tuple(checked_weights(components, s) if isinstance(s, dict) else s for s in adapter_names)
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
    """Context manager: without gradients, keys and scales are computed once per adapter, not once per call.

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


def check_idle(model: Any) -> None:
    """`RuntimeError` while a call is under way on one of the components."""
    for component in components_of(model).values():
        ModelAdapters.of(component).check_idle()


def check_present(model: Any, adapter_names: Sequence[str]) -> dict[str, nn.Module]:
    """The components; `ValueError` for an adapter that none of them has."""
    components = components_of(model)
    present = {name for component in components.values() for name in ModelAdapters.of(component).configs}
    missing = set(adapter_names) - present
    if missing:
        raise ValueError(f"Adapter name(s) {sorted(missing)} not in the list of present adapters: {sorted(present)}.")
    return components


def checked_weights(components: dict[str, nn.Module], active: dict[str, Any]) -> dict[str, AdapterWeight]:
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
