"""APTConfig: what one adapter is, as plain data. It travels as JSON in the header of the adapter's file."""

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = ("relu", "softmax")
INITS = ("paper", "released", "identity")
QUERY_SOURCES = ("hidden_states", "attn_output")
STREAMS = ("query", "context")


@dataclass(frozen=True)
class APTConfig:
    """Settings of one APT adapter. `None` means "the architecture's default", resolved when the adapter is attached.

    Args:
        num_prompts: learnable prompts p per attention module (200: the paper's tables).
        rank: rank r of the map that turns prompts into keys (4: the paper's tables).
        activation: `"relu"` (paper) or `"softmax"` over the prompts (the paper's intermediate step).
        dropout: dropout on the affinities while training (0 in the paper).
        init: `"paper"`, `"released"` or `"identity"`; see [`ApproximatedPrompt`].
        query_source: who asks the prompts: `"hidden_states"` (paper: the attention's input X) or
            `"attn_output"` (its output O, which in a cross-attention carries the text).
        streams: which streams are corrected: `"query"` (paper: the attention's output) and / or
            `"context"` (the encoder states before they become keys and values).
        target_modules: name suffixes of the attention modules, or one regular expression for full names.
        modules_to_save: name suffixes of modules (heads), or of single parameters, that are trained and stored
            beside the adapter.

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

    def __post_init__(self) -> None:
        for name in ("num_prompts", "rank"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a number in [0, 1), got {self.dropout!r}.")
        _check_choice("activation", self.activation, ACTIVATIONS)
        if self.init is not None:
            _check_choice("init", self.init, INITS)
        if self.query_source is not None:
            _check_choice("query_source", self.query_source, QUERY_SOURCES)
        # Lists (JSON, command lines) become tuples, so that the config is hashable and compares by value.
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
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "APTConfig":
        """Inverse of `to_dict`; an unknown setting raises `ValueError` (the file may come from a newer version)."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"Unknown APTConfig settings {unknown}: was this written by a newer apt-diffusion?")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> "APTConfig":
        return cls.from_dict(json.loads(text))


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
