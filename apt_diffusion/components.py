"""Selects the components of a pipeline that get adapters, and the `APTConfig` of each component."""

import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from .architectures import COMPONENTS, DENOISERS, TEXT_ENCODERS, architecture_of, is_known
from .config import APTConfig, pattern_matches
from .model import named_cores
from .places import base_modules, matches
from .processor import APTProcessorCore
from .wrappers import unwrap

logger = logging.getLogger(__name__)


def components_of(model: Any) -> dict[str, nn.Module]:
    """The models that can carry adapters: of a pipeline by name, a single model under the name `""`."""
    return {name: unwrap(part) for name, part in wrapped_components(model).items()}


def wrapped_components(model: Any) -> dict[str, nn.Module]:
    """As `components_of`, with the wrappers (DDP, FSDP, `torch.compile`) around them."""
    if isinstance(model, nn.Module):
        return {"": model}
    parts = model if isinstance(model, dict) else getattr(model, "components", None)
    if not isinstance(parts, dict):
        raise TypeError(f"Expected a torch.nn.Module, a diffusers pipeline or a dict of models, got {type(model)}.")
    return {name: parts[name] for name in COMPONENTS if isinstance(parts.get(name), nn.Module)}


def check_has_models(model: Any, components: dict[str, nn.Module]) -> None:
    """`ValueError` for a pipeline whose models have not been loaded; a modular one of diffusers starts without."""
    if not components and not isinstance(model, dict):
        raise ValueError(f"{type(model).__name__} holds no models yet: load them first, with load_components().")


def cores_of(model: Any) -> Iterator[APTProcessorCore]:
    """The processor cores of all components."""
    for component in components_of(model).values():
        yield from (core for _, core in named_cores(component))


def config_per_component(
    model: Any, components: dict[str, nn.Module], config: APTConfig | dict[str, APTConfig]
) -> dict[str, APTConfig]:
    """The settings of each component that is to be adapted; `ValueError` if the config fits no component."""
    if isinstance(config, dict):
        unknown = sorted(set(config) - set(components))
        if unknown or not config:
            raise ValueError(f"No component {unknown} here; there are {sorted(components)}.")
        return config
    if "" in components:
        return {"": config}
    check_has_models(model, components)
    chosen = {}
    for part, component in components.items():
        settings = _settings_for(part, component, config)
        if settings is not None:
            chosen[part] = settings
    if config.target_modules is not None and not chosen:
        raise ValueError(f"target_modules={config.target_modules} matches no module of {sorted(components)}.")
    return _checked_choice(model, components, config, chosen)


def _settings_for(part: str, component: nn.Module, config: APTConfig) -> APTConfig | None:
    """One pipeline-wide config as it is for one component; `None` where it names nothing there."""
    settings = config.to_dict() | ({} if part in DENOISERS else {"query_source": None, "streams": None})
    if config.target_modules is None:
        usable = is_known(component) and not (part in TEXT_ENCODERS and architecture_of(component).sees_pictures_only)
        return APTConfig.from_dict(_own_sizes(component, settings)) if usable else None
    names = [
        name for name, _ in base_modules(component)
    ]  # each component takes the patterns that name something in it
    if isinstance(config.target_modules, str):
        used: Any = config.target_modules if any(matches(name, config.target_modules) for name in names) else None
    else:
        used = [p for p in config.target_modules if any(matches(name, (p,)) for name in names)]
    return APTConfig.from_dict(_own_sizes(component, settings | {"target_modules": used})) if used else None


def _own_sizes(component: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    names = [name for name, _ in base_modules(component)]
    for field in ("num_prompts_pattern", "rank_pattern"):
        pattern = settings[field] or {}
        kept = {key: size for key, size in pattern.items() if any(pattern_matches(key, name) for name in names)}
        settings = settings | {field: kept}
    return settings


def _checked_choice(
    model: Any, components: dict[str, nn.Module], config: APTConfig, chosen: dict[str, APTConfig]
) -> dict[str, APTConfig]:
    skipped = {part: type(component).__name__ for part, component in components.items() if part not in chosen}
    denoisers = {type(component).__name__ for part, component in components.items() if part in DENOISERS}
    whole = not isinstance(model, dict)
    if config.target_modules is None and not set(chosen) & set(DENOISERS) and (denoisers or whole or not chosen):
        raise ValueError(
            f"APT has no default places for {sorted(denoisers) or type(model).__name__}"
            + (f", only for {sorted(chosen)}" if chosen else "")
            + ': name the attention modules, for example {"transformer": APTConfig(target_modules=["attn"])}, or '
            "register_architecture."
        )
    if config.target_modules is None and skipped:
        logger.info("No adapter for %s: APT has no default places there.", skipped)
    for field in ("num_prompts_pattern", "rank_pattern"):
        kept = {key for settings in chosen.values() for key in getattr(settings, field) or {}}
        unused = sorted(set(getattr(config, field) or {}) - kept)
        if unused:
            raise ValueError(f"{field} has keys that match no module of {sorted(chosen)}: {unused}.")
    return chosen
