"""What APT costs beside other methods on well-known models, for the page of that name."""

from collections.abc import Callable
from dataclasses import dataclass

from ..baselines import get_method
from ..costs import Costs, count_costs, methods_with_costs

# Attention modules of one kind: width, how many, tokens at each.
Group = tuple[int, int, int]


@dataclass(frozen=True)
class Model:
    """A model that is adapted.

    Args:
        tokens: what the slider says at first.
        tokens_mean: what is counted.
        groups: number of tokens -> its adapted attention modules.
        branches: branches per attention module, as the paper's tables count adapters.
    """

    tokens: int
    tokens_mean: str
    groups: Callable[[int], list[Group]]
    branches: float = 1.0


MODELS = {
    "ViLT-B/32": Model(241, "words, patches and [CLS]", lambda n: [(768, 12, n)], branches=2),
    "METER": Model(577, "image tokens; beside them 40 words", lambda n: [(768, 12, 40), (768, 12, n)], branches=1.5),
    "CLIP ViT-B/16": Model(197, "image tokens; beside them 77 words", lambda n: [(768, 12, n), (512, 12, 77)]),
    "Stable Diffusion 1.5": Model(
        4096,
        "cells of the latents; a quarter at every level below",
        lambda n: [(320, 5, n), (640, 5, n // 4), (1280, 5, n // 16), (1280, 1, n // 64)],
    ),
}


def compared_methods() -> dict[str, str]:
    """`{label: name}` of the registered methods that have a closed form for attention modules; APT first."""
    names = [name for name in methods_with_costs() if get_method(name).costs_per != "layer"]
    found = {}
    for name in sorted(names, key=lambda name: name != "apt"):
        label, note = get_method(name).label, get_method(name).costs_note
        found[label[:1].upper() + label[1:] + (f" ({note})" if note else "")] = name
    return found


def compare(model: str, num_prompts: int, rank: int, num_tokens: int) -> dict[str, Costs]:
    """What each method adds to one forward pass; `ValueError` for what is out of range."""
    if model not in MODELS:
        raise ValueError(f"Choose one of {', '.join(MODELS)}.")
    for name, value, high in (("prompts", num_prompts, 2000), ("rank", rank, 256), ("tokens", num_tokens, 65536)):
        if not 1 <= value <= high:
            raise ValueError(f"The number of {name} must be from 1 to {high}, not {value}.")
    chosen = MODELS[model]

    def costs(method: str) -> Costs:
        parts = [
            count_costs(
                method,
                hidden_size=width,
                num_tokens=max(1, tokens),
                num_modules=round(modules * chosen.branches) if get_method(method).costs_per == "branch" else modules,
                num_prompts=num_prompts,
                rank=rank,
            )
            for width, modules, tokens in chosen.groups(num_tokens)
        ]
        return Costs(sum(part.parameters for part in parts), sum(part.macs for part in parts))

    return {label: costs(method) for label, method in compared_methods().items()}


def saving(table: dict[str, Costs]) -> str:
    """The comparison in a sentence."""
    apt, deep = table["APT"], table["Deep prompts"]
    less = 100 * (1 - apt.macs / deep.macs)
    return (
        f"APT adds {in_units(apt.macs)} multiply-accumulates to a forward pass, "
        f"{abs(less):.1f} % {'less' if less >= 0 else 'more'} than deep prompts, "
        f"and trains {in_units(apt.parameters)} parameters."
    )


def in_units(value: int) -> str:
    """`1,916,940` as `1.92 M`."""
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(value)
