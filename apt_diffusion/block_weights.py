"""Adapter weights per component and per block.

For UNets, the format is that of diffusers' `set_adapters`, where a list has one weight per transformer of the block:
`{"unet": {"down": {"block_1": [0.5, 1.0]}, "mid": 0.2, "up": 1.0}, "text_encoder": 0.8}`. For other models, keys are
prefixes of module names: `{"transformer": {"transformer_blocks.0": 0.5, "single_transformer_blocks": 0.0}}`; the
longest matching prefix wins. Modules that match no key have weight 1.
"""

import math
import numbers
import re
from typing import Any, NamedTuple

from torch import nn

from .places import named_modules

_UNET_PLACE = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.attentions\.(\d+)(?=\.|$)")

Place = tuple[str, str | None, str]  # part, number of the block, number of the transformer in it


class Blocks(NamedTuple):
    """What weights by block can name in one model.

    Args:
        transformers: places of a UNet's transformers, adapted or not; none in another model.
        names: of all modules.
    """

    transformers: list[Place]
    names: frozenset[str]


NO_BLOCKS = Blocks([], frozenset())


def blocks_of(model: nn.Module) -> Blocks:
    """The blocks of a component."""
    names = frozenset(name for name, _ in named_modules(model))
    found = (_UNET_PLACE.fullmatch(name) for name, _ in named_modules(model))
    return Blocks([(place[1], place[2], place[3]) for place in found if place], names)


def weight_of(value: Any, component: str, module_name: str, blocks: Blocks) -> float:
    """The weight that `value` gives to one attention module.

    Args:
        value: a number or a nested dict.
        component: name of the component in a pipeline, `""` for a single model.
        module_name: full name of the attention module in its component.
        blocks: those of the component (`blocks_of`); needed where `value` is a dict.

    Raises:
        ValueError: for a weight that is no finite number, a block that does not exist, or a list of a wrong length.
    """
    if isinstance(value, dict) and component:
        value = value.get(component, 1.0)
    if not isinstance(value, dict):
        return check_number("An adapter weight", value)
    place = _UNET_PLACE.search(module_name)
    if not blocks.transformers or place is None:
        return _weight_by_name(value, module_name, blocks.names)
    unknown = set(value) - {"down", "mid", "up"}
    if unknown:
        raise ValueError(f"Unknown UNet parts {sorted(unknown)} in the weights; use 'down', 'mid' and 'up'.")
    part, block, attention = place.groups()
    return _weight_in_part(value.get(part, 1.0), part, block, int(attention), blocks.transformers)


def _weight_by_name(value: dict[str, Any], module_name: str, names: frozenset[str]) -> float:
    unknown = sorted(set(value) - names)
    if unknown:
        parts = module_name.split(".")
        some = [".".join(parts[: length + 1]) for length in range(len(parts) - 1)]
        raise ValueError(f"Unknown blocks {unknown} in the weights: a block is the name of a module, such as {some}.")
    fitting = [name for name in value if f"{module_name}.".startswith(f"{name}.")]
    return check_number("An adapter weight", value[max(fitting, key=len)] if fitting else 1.0)


def _weight_in_part(value: Any, part: str, block: str | None, attention: int, transformers: list[Place]) -> float:
    if isinstance(value, dict):
        blocks = {f"block_{index}" for name, index, _ in transformers if name == part and index is not None}
        unknown = set(value) - blocks
        if unknown:
            raise ValueError(
                f"Unknown blocks {sorted(unknown)} in the weights of {part!r}: there are {sorted(blocks)}."
            )
        value = value.get(f"block_{block}", 1.0)
    if isinstance(value, list | tuple):
        count = sum((name, number) == (part, block) for name, number, _ in transformers)
        if len(value) not in (1, count):
            raise ValueError(f"{part} block {block} has {count} transformers, but {len(value)} weights were given.")
        value = value[attention if len(value) > 1 else 0]
    return check_number("An adapter weight", value)


def check_number(what: str, value: object) -> float:
    """`value` as a Python float; `ValueError` unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, got {value!r}.")
    return float(value)


def plain_weight(value: Any) -> Any:
    """`value` with Python floats in place of all other numbers: it is stored as JSON. `ValueError` for no weight."""
    if isinstance(value, dict):
        return {str(key): plain_weight(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_weight(part) for part in value]
    return check_number("An adapter weight", value)
