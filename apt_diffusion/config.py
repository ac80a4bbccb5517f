"""APTConfig: what one adapter is, as plain data. It travels as JSON in the header of the adapter's file."""

import dataclasses
import json
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = ("relu", "softmax")
INITS = ("paper", "released", "identity")
QUERY_SOURCES = ("hidden_states", "attn_output")
STREAMS = ("query", "context", "text")


@dataclass(frozen=True)
class APTConfig:
    """Settings of one APT adapter. `None` means "the architecture's default", resolved when the adapter is attached.

    Args:
        num_prompts: learnable prompts p per attention module (200: the paper's tables).
        rank: rank r of the map that turns prompts into keys (4: the paper's tables).
        activation: `"relu"` (paper) or `"softmax"` over the prompts (the paper's intermediate step).
        dropout: dropout on the affinities while training (0 in the paper).
        init: `"paper"`, `"released"` or `"identity"`; see [`ApproximatedPrompt`].
        query_source: what queries the prompts: `"hidden_states"` (paper: the attention's input X) or
            `"attn_output"` (its output O, which in a cross-attention carries the text).
        streams: which streams are corrected: `"query"` (paper: the attention's output), `"context"` (the encoder
            states before they become keys and values), `"text"` (the text output of joint attention).
        target_modules: name suffixes of the attention modules, or one regular expression for full names.
        modules_to_save: name suffixes of modules (heads), or of single parameters, that are trained and stored
            together with the adapter.
        num_prompts_pattern, rank_pattern: other sizes for some modules, as PEFT's `rank_pattern`: a name suffix or
            regular expression for the end of a full name -> size; the first that matches holds.

    Raises:
        ValueError: for a value outside these, naming it.
    """

    num_prompts: int = 200
    rank: int = 4
    activation: str = "relu"
    dropout: float = 0.0
    init: str | None = None
    query_source: str | None = None
    streams: tuple[str, ...] | None = None
    target_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    num_prompts_pattern: dict[str, int] | None = None
    rank_pattern: dict[str, int] | None = None

    def __post_init__(self) -> None:
        # NumPy's numbers become Python's and lists (JSON, command lines) become tuples, so that the config is
        # hashable, compares by value and can be written as JSON.
        for name in ("num_prompts", "rank"):
            object.__setattr__(self, name, _size(name, getattr(self, name)))
            object.__setattr__(self, f"{name}_pattern", _pattern(f"{name}_pattern", getattr(self, f"{name}_pattern")))
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, numbers.Real) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a number in [0, 1), got {self.dropout!r}.")
        object.__setattr__(self, "dropout", float(self.dropout))
        _check_choice("activation", self.activation, ACTIVATIONS)
        if self.init is not None:
            _check_choice("init", self.init, INITS)
        if self.query_source is not None:
            _check_choice("query_source", self.query_source, QUERY_SOURCES)
        for name in ("streams", "target_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str) and name == "target_modules":
                _check_expression(name, value)
                continue
            if value is not None:
                object.__setattr__(self, name, _names(name, value))
        for stream in self.streams or ():
            _check_choice("streams", stream, STREAMS)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values (tuples become lists)."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain: dict[type, type] = {tuple: list, _Pattern: dict}
        return {key: plain[type(value)](value) if type(value) in plain else value for key, value in values.items()}

    def to_json(self) -> str:
        """The settings as a JSON object."""
        return json.dumps(self.to_dict())

    def at(self, module_name: str) -> "APTConfig":
        """The settings for one attention module: this config with the sizes that the patterns give there."""
        sizes: dict[str, Any] = {
            name: _first_match(getattr(self, f"{name}_pattern"), module_name, getattr(self, name))
            for name in ("num_prompts", "rank")
        }
        return dataclasses.replace(self, **sizes, num_prompts_pattern=None, rank_pattern=None)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "APTConfig":
        """Inverse of `to_dict`; an unknown setting raises `ValueError` (the file may come from a newer version)."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"Unknown APTConfig settings {unknown}: was this written by a newer apt-diffusion?")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> "APTConfig":
        """Inverse of `to_json`."""
        return cls.from_dict(json.loads(text))


def pattern_matches(pattern: str, module_name: str) -> bool:
    """Whether a key of `rank_pattern` or `num_prompts_pattern` names the module, as in PEFT."""
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module_name) is not None


class _Pattern(dict):
    """A dict that can be part of a frozen, hashable config."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


def _first_match(pattern: dict[str, int] | None, module_name: str, otherwise: int) -> int:
    found = (size for key, size in (pattern or {}).items() if pattern_matches(key, module_name))
    return next(found, otherwise)


def _size(field: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{field} must be a positive integer, got {value!r}.")
    return int(value)


def _pattern(field: str, value: object) -> _Pattern | None:
    if value is None or value == {}:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"{field} must be a dict of sizes by name suffix, got {value!r}.")
    for key in value:
        if not isinstance(key, str) or not key:
            raise ValueError(f"{field} must have non-empty strings as keys, got {key!r}.")
        _check_expression(field, key)
    return _Pattern({key: _size(f"{field}[{key!r}]", size) for key, size in value.items()})


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}.")


def _check_expression(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field} must be a list or a regular expression, got {pattern!r}: {error}.") from error


def _names(field: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple | set | frozenset) or not value:
        raise ValueError(f"{field} must be a non-empty list of names, got {value!r}.")
    names = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{field} must hold non-empty strings, got {value!r}.")
    return names
