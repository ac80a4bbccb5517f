"""Names of tensors in an adapter's file, and which module of a model each belongs to."""

import re
from collections import defaultdict

from torch import Tensor, nn

_KEY = re.compile(r"(.+)\.(apt|apt_context)\.(prompts|low_rank_down|low_rank_up|log_scale|gate)")

# {(module name, "apt" or "apt_context"): {parameter name: tensor}}
Groups = dict[tuple[str, str], dict[str, Tensor]]


def group_tensors(model: nn.Module, tensors: dict[str, Tensor], known: set[str]) -> tuple[Groups, dict[str, Tensor]]:
    """Adapter tensors by module, under the names that the modules have in `model`; and the rest, the heads.

    Names that are all among the `known` ones are not looked up: walking through a model takes its time.
    """
    groups: Groups = defaultdict(dict)
    heads = {}
    names = [match[1] for match in map(_KEY.fullmatch, tensors) if match]
    prefix = _common_prefix(names)
    looked_up = {} if known.issuperset(names) else neutral_names(model)
    actual = {neutral: name for name, neutral in looked_up.items()}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match:
            neutral = match[1].removeprefix(prefix)
            groups[actual.get(neutral, match[1]), match[2]][match[3]] = tensor
        else:
            heads[key] = tensor
    return dict(groups), heads


# transformers 5.6 dropped the segment `text_model.` inside `CLIPTextModel` (and `vision_model.` likewise). Names that
# all share it are written and compared without it, so that a file made on either side loads on both.


def _common_prefix(names: list[str]) -> str:
    for prefix in ("text_model.", "vision_model."):
        if names and all(name.startswith(prefix) for name in names):
            return prefix
    return ""


def neutral_names(model: nn.Module) -> dict[str, str]:
    """`{name of a module: its name in a file}`."""
    names = [name for name, _ in model.named_modules() if name]
    prefix = _common_prefix([name for name in names if "." in name])
    return {name: name.removeprefix(prefix) for name in names}
