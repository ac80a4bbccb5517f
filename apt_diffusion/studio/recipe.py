"""Settings of a drawing as text: in the pictures themselves, in links, and in what the browser remembers."""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from PIL import Image

from ..provenance import encoded
from .library import slug
from .order import BLOCKS, MAX_ADAPTERS, Order, names, real, text, whole

TEXT_KEY = "apt_diffusion"  # of the PNG's text: settings as JSON
COMMON_KEY = "parameters"  # the same in the words of other tools
MAX_TEXT = 20_000  # characters of JSON

Settings = dict[str, Any]


def settings_of(order: Order, model: str) -> Settings:
    """The settings that draw an order again; start pictures are not among them."""
    return {
        "prompt": order.prompt,
        "negative_prompt": order.negative_prompt,
        "adapters": [adapter.key for adapter, _ in order.adapters],
        "weights": [weight for _, weight in order.adapters],
        "steps": order.steps,
        "guidance": order.guidance,
        "width": order.width,
        "height": order.height,
        "seed": order.seed,
        "count": order.count,
        "sampler": order.sampler,
        "blocks": dict(order.blocks),
        "model": model,
    }


def checked(values: Mapping[str, Any]) -> Settings:
    """Settings from a stranger's file or link: the known ones, each of its type.

    Raises:
        ValueError: with a sentence that names the setting.
    """
    found: Settings = {}
    for name in ("prompt", "negative_prompt", "sampler", "model"):
        if name in values:
            found[name] = text(values[name], name)[:1000]
    for name in ("steps", "width", "height", "seed", "count"):
        if name in values:
            found[name] = whole(values[name], name)
    if "guidance" in values:
        found["guidance"] = real(values["guidance"], "guidance")
    if "adapters" in values:
        found["adapters"] = names(values["adapters"], "adapters")[:MAX_ADAPTERS]
    if "weights" in values:
        if not isinstance(values["weights"], list):
            raise ValueError("The weights must be a list of numbers.")
        found["weights"] = [real(weight, "weight") for weight in values["weights"][:MAX_ADAPTERS]]
    if isinstance(values.get("blocks"), dict):
        found["blocks"] = {name: real(values["blocks"][name], name) for name in BLOCKS if name in values["blocks"]}
    return found


def as_query(settings: Settings) -> str:
    """Settings as the query of a link."""
    flat: dict[str, Any] = {
        key: value for key, value in settings.items() if key != "model" and value not in ("", [], {})
    }
    for name in ("adapters", "weights"):
        if name in flat:
            flat[name] = ",".join(map(str, flat[name]))
    if "blocks" in flat:
        flat["blocks"] = ",".join(f"{name}:{value:g}" for name, value in flat["blocks"].items())
    return urlencode(flat)


def from_query(query: Mapping[str, str]) -> Settings:
    """The settings of a link; `ValueError` with a sentence where they make no sense."""
    values: dict[str, Any] = dict(query)
    if values.get("adapters"):
        values["adapters"] = values["adapters"].split(",")
    if values.get("weights"):
        values["weights"] = values["weights"].split(",")
    if values.get("blocks"):
        pairs = (part.partition(":") for part in values["blocks"].split(","))
        values["blocks"] = {name: value for name, _, value in pairs}
    return checked(values)


def common_text(settings: Settings) -> str:
    """The settings in the form that other tools write and read."""
    lines = [settings["prompt"]]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    facts = {
        "Steps": settings["steps"], "Sampler": settings["sampler"] or "default", "CFG scale": settings["guidance"],
        "Seed": settings["seed"], "Size": f"{settings['width']}x{settings['height']}", "Model": settings["model"],
    }  # fmt: skip
    adapters = zip(settings["adapters"], settings["weights"], strict=True)
    facts |= {"APT": " ".join(f"{key.split('/')[-1]}:{weight:g}" for key, weight in adapters)}
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in facts.items() if value != "")])


def png_with(picture: Image.Image, settings: Settings) -> bytes:
    """The picture as PNG that says how it was drawn, and by the mark of the IPTC that a model drew it."""
    texts = {COMMON_KEY: common_text(settings), TEXT_KEY: json.dumps(settings, ensure_ascii=False)}
    return encoded(picture, "png", texts)


def settings_in(picture: Image.Image) -> Settings:
    """The settings that a picture carries; `ValueError` where it carries none of the studio's."""
    return settings_in_text(getattr(picture, "text", {}).get(TEXT_KEY, ""))


def settings_in_text(said: Any) -> Settings:
    """Settings from the text that a picture carries; `ValueError` where it is none of the studio's."""
    if not isinstance(said, str) or not 0 < len(said) <= MAX_TEXT:
        raise ValueError("This picture carries no settings of the studio: it must be a PNG as it was downloaded.")
    try:
        values = json.loads(said)
    except (ValueError, RecursionError) as error:
        raise ValueError("The settings in this picture are damaged.") from error
    if not isinstance(values, dict):
        raise ValueError("The settings in this picture are damaged.")
    return checked(values)


def telling_name(settings: Settings, ending: str = "png") -> str:
    """A file name that says what is in the picture: `a-red-circle-seed-5.png`."""
    return f"{slug(settings['prompt'])}-seed-{settings['seed']}.{ending}"
