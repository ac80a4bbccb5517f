"""Parses adapter tags in prompts, `a sks dog <apt:dog:0.8>`, in the style of the `<lora:...>` tags of other tools."""

import math
import re
from collections.abc import Mapping
from typing import Any

from ..processor import Sample

# Negative prompts are parsed, too: a tag there raises an error instead of being drawn as text.
TEXT_ARGUMENTS = re.compile(r"(negative_)?prompt(_\d)?")
_TAG = re.compile(r"<apt:([^<>]*)>")


def split_tags(prompt: str) -> tuple[str, dict[str, float]]:
    """The prompt without its tags, and `{adapter name: weight}`; a tag without a weight weighs 1, equal ones add up.

    Raises:
        ValueError: for a tag without a name, or with a weight that is no finite number.
    """
    weights: dict[str, float] = {}
    for tag in _TAG.finditer(prompt):
        name, colon, text = tag[1].rpartition(":")
        name, weight = (name.strip(), _number(tag[0], text)) if colon else (text.strip(), 1.0)
        if not name:
            raise ValueError(f"{tag[0]!r} names no adapter: write <apt:name> or <apt:name:0.8>.")
        weights[name] = weights.get(name, 0.0) + weight
    return re.sub(" {2,}", " ", _TAG.sub("", prompt)).strip() if weights else prompt, weights


def _number(tag: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"{tag!r} has the weight {text!r}, which is no finite number: write <apt:name:0.8>.")
    return weight


def take_tags(
    kwargs: dict[str, Any], scale: Any, names: Any, active: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Sample] | None]:
    """A pipeline's arguments with the tags taken out of the prompts, and the adapters of every prompt.

    Args:
        kwargs: the call's arguments by name.
        scale, names: its `apt_scale` and `apt_adapter_names`.
        active: adapters and weights for a prompt without tags in a batch that has some.

    Returns:
        The arguments, and `apt_adapter_names`: as given where no prompt has a tag.

    Raises:
        ValueError: for a tag that cannot be read, one in a negative prompt, or adapters given in two ways.
    """
    found: dict[int, dict[str, float]] = {}
    cleaned = {}
    count = 1
    for key, value in kwargs.items():
        texts = [value] if isinstance(value, str) else value
        if not TEXT_ARGUMENTS.fullmatch(key) or not isinstance(texts, list) or not all(map(_is_text, texts)):
            continue
        split = [split_tags(text) for text in texts]
        if key.startswith("negative") and any(weights for _, weights in split):
            raise ValueError(f"An <apt:...> tag stands in {key}: put it into the prompt, with a negative weight.")
        cleaned[key] = split[0][0] if isinstance(value, str) else [text for text, _ in split]
        count = max(count, len(texts))
        for row, (_, weights) in enumerate(split):
            found[row] = found.get(row, {}) | weights
    if not any(found.values()):
        return kwargs, names
    if names is not None or isinstance(scale, dict):
        raise ValueError("The prompt names adapters in <apt:...> tags, and so does the call: name them in one place.")
    return kwargs | cleaned, [found.get(row) or dict(active) for row in range(count)]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
