"""Finds the modules of one model that an adapter corrects: their names, and the width and binding of each stream."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .architectures import CHILDREN, Architecture, Stream, architecture_of
from .config import APTConfig
from .equation import ApproximatedPrompt
from .hooks import Binding, bind
from .wrappers import unwrapped_name

# The attribute in which attention classes keep the width of their input, by preference.
WIDTH_ATTRIBUTES = ("query_dim", "embed_dim", "hidden_size", "all_head_size")


@dataclass(frozen=True)
class Place:
    """One stream of one attention module."""

    module_name: str
    child: str
    module: nn.Module
    width: int
    binding: Binding


def places_of(model: nn.Module, config: APTConfig) -> list[Place]:
    """The places of a resolved `config`.

    Raises:
        ValueError: for a pattern that names no module, or a module that APT cannot correct; naming it.
    """
    assert config.target_modules is not None and config.streams is not None  # resolved
    row = architecture_of(model)
    found = find_modules(model, config.target_modules, "target_modules")
    places = [place for name, module in found.items() for place in places_at(model, name, module, config.streams)]
    if "text" in config.streams and not any(place.child == row.stream("text").child for place in places):
        raise ValueError(f"None of {list(found)[:5]} is a joint attention: stream 'text' needs its text output.")
    return places


def places_at(model: nn.Module, name: str, module: nn.Module, streams: tuple[str, ...]) -> list[Place]:
    """The places of one attention module of `model`; `ValueError` naming the module where it cannot be corrected."""
    row = architecture_of(model)
    return [
        place_at(model, name, module, row.stream(stream))
        for stream in streams
        if stream != "text" or _reads_text_output(model, row, name, module)
    ]


def place_at(model: nn.Module, name: str, module: nn.Module, stream: Stream) -> Place:
    """One place; `ValueError` naming the module where it cannot be corrected."""
    if getattr(module, "residual_connection", False):
        raise ValueError(f"{name} adds its residual inside: APT corrects an attention's output before the residual.")
    row = architecture_of(model)
    if row.sees_pictures_only and not matches(name, row.places(model)):
        stream = dataclasses.replace(stream, per_sample=True)  # a language model beside the vision tower
    width = context_width(name, module) if stream.output is None else output_width(name, module, stream)
    return Place(name, stream.child, module, width, bind(name, module, stream))


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `model.named_modules()`, with the names that the modules have without torch's wrappers."""
    for name, module in model.named_modules():
        yield unwrapped_name(name), module


def matches(name: str, patterns: str | tuple[str, ...]) -> bool:
    """As in PEFT: one regular expression for the full name, or a list of whole-word suffixes."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in patterns)


def find_modules(model: nn.Module, patterns: str | tuple[str, ...], purpose: str) -> dict[str, nn.Module]:
    """The modules that `patterns` name; `ValueError` where a pattern names none."""
    found = {name: module for name, module in base_modules(model) if matches(name, patterns)}
    unused = [p for p in ([patterns] if isinstance(patterns, str) else patterns) if not _uses(p, patterns, found)]
    if unused:
        some = [name for name, _ in base_modules(model) if "attn" in name or "attention" in name][:5]
        raise ValueError(
            f"{purpose}={unused} matches no module of {type(model).__name__}; its attention modules are e.g. {some}."
        )
    return found


def _uses(pattern: str, patterns: str | tuple[str, ...], found: dict[str, nn.Module]) -> bool:
    return bool(found) if isinstance(patterns, str) else any(matches(name, (pattern,)) for name in found)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules without those that APT added."""
    for name, module in named_modules(model):
        if name and not set(CHILDREN) & set(name.split(".")):
            yield name, module


def _reads_text_output(model: nn.Module, row: Architecture, name: str, module: nn.Module) -> bool:
    """Whether the attention has a text output, and a later block reads it."""
    if not _has_text_output(row, name, module):
        return False
    if row.last_text_is_idle:
        joint = [
            other for other, part in base_modules(model)
            if matches(other, row.places(model)) and _has_text_output(row, other, part)
        ]  # fmt: skip
        return name != joint[-1]
    return True


def _has_text_output(row: Architecture, name: str, module: nn.Module) -> bool:
    if row.text_modules is not None:
        return re.fullmatch(row.text_modules, name) is not None
    return any(getattr(module, projection, None) is not None for projection in ("to_add_out", "to_out_t"))


def output_width(name: str, module: nn.Module, stream: Stream) -> int:
    """The width of the stream's output: of the text stream where its projection names one, else of the input."""
    if stream.output:
        for projection in ("to_add_out", "to_out_t"):
            width = getattr(getattr(module, projection, None), "out_features", None)
            if isinstance(width, int):
                return width
    return input_width(name, module)


def input_width(name: str, module: nn.Module) -> int:
    """The width d of an attention module's input and output."""
    for candidate in (module, getattr(module, "attention", None), getattr(module, "self", None)):
        for attribute in WIDTH_ATTRIBUTES:
            width = getattr(candidate, attribute, None)
            if isinstance(width, int):
                return width
    linear = next((child for child in module.modules() if isinstance(child, nn.Linear)), None)
    if linear is None or isinstance(module, nn.Linear):
        raise ValueError(f"{name} ({type(module).__name__}) is not an attention module: its width is unknown.")
    return linear.in_features


def context_width(name: str, module: nn.Module) -> int:
    """The width of the encoder states that a cross-attention module reads."""
    width = getattr(module, "cross_attention_dim", None)
    if not isinstance(width, int) or getattr(module, "is_cross_attention", True) is False:
        raise ValueError(f"{name} ({type(module).__name__}) reads no encoder states: stream 'context' needs them.")
    return width


def new_adapter(config: APTConfig, width: int, module: nn.Module) -> ApproximatedPrompt:
    """A new adapter of `width` on the device of the attention module.

    It has the module's dtype where that is float32 or better; next to half precision it is float32, in which keys and
    scale are computed anyway: an optimizer's epsilon is zero in float16.
    """
    assert config.init is not None  # resolved
    adapter = ApproximatedPrompt(
        width, config.num_prompts, config.rank, config.activation, config.dropout, config.init
    )
    weight = next(module.parameters(), None)
    if weight is None:
        return adapter
    device = "cpu" if weight.device.type == "meta" else weight.device
    return adapter.to(device, torch.float64 if weight.dtype == torch.float64 else torch.float32)
