"""The grammar of tensor names in an adapter's file: `<component>.<module>.<child>.<parameter>`.

The component is absent for a single model; the child is `apt`, `apt_context` or `apt_text`. Heads (`modules_to_save`)
are stored under their own names. Module names leave out torch's wrappers and the segment `text_model.` (or
`vision_model.`) that some versions of transformers have inside `CLIPTextModel`, so that a file loads with every
version.
"""

import re
from collections import defaultdict
from typing import NamedTuple

from torch import Tensor, nn

from ..architectures import CHILDREN
from ..places import base_modules

WORDS_KEY = "apt_words"  # after the component: embeddings of new words, one row each
PARAMETERS = ("prompts", "low_rank_down", "low_rank_up", "log_scale", "gate")
_NAME = re.compile(rf"(.+)\.({'|'.join(CHILDREN)})\.({'|'.join(PARAMETERS)})")

# {(module name, child): {parameter name: tensor}}
Groups = dict[tuple[str, str], dict[str, Tensor]]


class TensorName(NamedTuple):
    """A tensor's name, parsed; `module` still holds the component."""

    module: str
    child: str
    parameter: str


def parse(name: str) -> TensorName | None:
    """The parts of an adapter tensor's name, `None` for a head's."""
    match = _NAME.fullmatch(name)
    return TensorName(*match.groups()) if match else None


def is_adapter_tensor(name: str) -> bool:
    """Whether the name is that of a tensor in a core; other libraries' and damaged ones are not."""
    return any(f".{child}." in name for child in CHILDREN)


def join(*parts: str) -> str:
    """A dotted name of those parts that are not empty."""
    return ".".join(part for part in parts if part)


def split_component(name: str) -> tuple[str, str]:
    """`(component, rest)` of a tensor's name in a pipeline's file."""
    component, _, rest = name.partition(".")
    return component, rest


def group_tensors(model: nn.Module, tensors: dict[str, Tensor], known: set[str]) -> tuple[Groups, dict[str, Tensor]]:
    """Adapter tensors by module, under the names that the modules have in `model`; and the rest, the heads.

    Names that are all among the `known` ones are not looked up: walking through a model takes its time.
    """
    groups: Groups = defaultdict(dict)
    heads = {}
    parsed = {key: parse(key) for key in tensors}
    names = [name.module for name in parsed.values() if name]
    prefix = common_prefix(names)
    actual = {} if known.issuperset(names) else {neutral: name for name, neutral in neutral_names(model).items()}
    for key, tensor in tensors.items():
        name = parsed[key]
        if name:
            module = actual.get(name.module.removeprefix(prefix), name.module)
            groups[module, name.child][name.parameter] = tensor
        else:
            heads[key] = tensor
    return dict(groups), heads


def neutral_names(model: nn.Module) -> dict[str, str]:
    """`{name of a module: its name in a file}`."""
    names = [name for name, _ in base_modules(model)]
    prefix = common_prefix([name for name in names if "." in name])
    return {name: name.removeprefix(prefix) for name in names}


def common_prefix(names: list[str]) -> str:
    """`text_model.` or `vision_model.` where all names begin with it, else nothing."""
    for prefix in ("text_model.", "vision_model."):
        if names and all(name.startswith(prefix) for name in names):
            return prefix
    return ""
