"""Where APT attaches: one row per architecture, and the answers that differ between attention classes.

Classes are recognised by name along the MRO, so that nothing here imports diffusers or transformers, and subclasses of
a known model are known too.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .config import APTConfig


@dataclass(frozen=True)
class Architecture:
    """A family of models: the attention modules that APT corrects by default, and the default settings there."""

    model_classes: tuple[str, ...]
    target_modules: str
    init: str = "paper"
    query_source: str = "hidden_states"
    streams: tuple[str, ...] = ("query",)


ARCHITECTURES = (
    # Stable Diffusion: `identity`, so that adding an untrained adapter does not change one pixel. Who asks and what is
    # corrected was chosen by measurement: docs/miniature.md.
    Architecture(("UNet2DConditionModel",), r".*\.attn2", init="identity"),
    Architecture(("CLIPTextModel", "CLIPTextModelWithProjection"), r".*\.self_attn", init="identity"),
    Architecture(("CLIPPreTrainedModel",), r".*\.self_attn"),
    Architecture(("ViltPreTrainedModel",), r".*encoder\.layer\.\d+\.attention"),
    Architecture(("MeterPreTrainedModel",), r".*cross_modal_(text|image)_layers\.\d+\.(attention|crossattention)"),
)
# Any other model: `target_modules` must be given, the rest is the paper's.
UNKNOWN_ARCHITECTURE = Architecture((), "")

# The attribute in which attention classes keep the width of their input, by preference.
WIDTH_ATTRIBUTES = ("query_dim", "embed_dim", "hidden_size", "all_head_size")


def architecture_of(model: nn.Module) -> Architecture:
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((row for row in ARCHITECTURES if names & set(row.model_classes)), UNKNOWN_ARCHITECTURE)


def resolve_config(model: nn.Module, config: APTConfig) -> APTConfig:
    """`config` with the architecture's defaults in place of `None`."""
    row = architecture_of(model)
    if config.target_modules is None and not row.target_modules:
        raise ValueError(
            f"APT has no default places for {type(model).__name__}: name its attention modules in "
            "APTConfig(target_modules=[...]), for example ['self_attn']."
        )
    defaults = {name: getattr(row, name) for name in ("init", "query_source", "streams", "target_modules")}
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


def matches(name: str, patterns: str | tuple[str, ...]) -> bool:
    """As in PEFT: one regular expression for the full name, or a list of whole-word suffixes."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in patterns)


def find_modules(model: nn.Module, patterns: str | tuple[str, ...], purpose: str) -> dict[str, nn.Module]:
    """The modules that `patterns` name; `ValueError` where a pattern names none."""
    found = {name: module for name, module in _own_modules(model) if matches(name, patterns)}
    unused = [p for p in ([patterns] if isinstance(patterns, str) else patterns) if not _uses(p, patterns, found)]
    if unused:
        some = [name for name, _ in _own_modules(model) if "attn" in name or "attention" in name][:5]
        raise ValueError(
            f"{purpose}={unused} matches no module of {type(model).__name__}; its attention modules are e.g. {some}."
        )
    return found


def _uses(pattern: str, patterns: str | tuple[str, ...], found: dict[str, nn.Module]) -> bool:
    return bool(found) if isinstance(patterns, str) else any(matches(name, (pattern,)) for name in found)


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules without those that APT added."""
    for name, module in model.named_modules():
        if name and not {"apt", "apt_context"} & set(name.split(".")):
            yield name, module


def input_width(name: str, module: nn.Module) -> int:
    """The width d of an attention module's input and output."""
    for candidate in (module, getattr(module, "attention", None), getattr(module, "self", None)):
        for attribute in WIDTH_ATTRIBUTES:
            width = getattr(candidate, attribute, None)
            if isinstance(width, int):
                return width
    linear = next((child for child in module.modules() if isinstance(child, nn.Linear)), None)
    if linear is None or isinstance(module, nn.Linear):
        raise ValueError(f"{name} ({type(module).__name__}) is not an attention module: its width cannot be told.")
    return linear.in_features


def context_width(name: str, module: nn.Module) -> int:
    """The width of the encoder states that a cross-attention module reads."""
    width = getattr(module, "cross_attention_dim", None)
    if not isinstance(width, int) or getattr(module, "is_cross_attention", True) is False:
        raise ValueError(f"{name} ({type(module).__name__}) reads no encoder states: stream 'context' needs them.")
    return width
