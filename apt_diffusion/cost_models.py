"""Attention modules of well-known models by width and number of tokens: input of the closed forms in `costs.py`."""

from collections.abc import Callable
from dataclasses import dataclass

from .baselines import get_method
from .costs import Costs, count_costs, methods_with_costs

# Attention modules of one kind: width, how many, tokens at each.
Group = tuple[int, int, int]


@dataclass(frozen=True)
class Model:
    """A model that is adapted.

    Args:
        tokens: how many there are usually.
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
    "METER": Model(577, "image tokens; next to them 40 words", lambda n: [(768, 12, 40), (768, 12, n)], branches=1.5),
    "CLIP ViT-B/16": Model(197, "image tokens; next to them 77 words", lambda n: [(768, 12, n), (512, 12, 77)]),
    "Stable Diffusion 1.5": Model(
        4096,
        "cells of the latents; a quarter at every level below",
        lambda n: [(320, 5, n), (640, 5, n // 4), (1280, 5, n // 16), (1280, 1, n // 64)],
    ),
    "Stable Diffusion XL": Model(
        4096,
        "cells of the latents at the first level with attention, a quarter of all; a quarter of these at the next",
        lambda n: [(640, 10, n), (1280, 60, n // 4)],
    ),
    # Diffusion transformers at 1024 x 1024. Where text and image run through one attention, both are its tokens.
    "Stable Diffusion 3.5 medium": Model(4096, "image tokens", lambda n: [(1536, 24, n)]),
    "Stable Diffusion 3.5 large": Model(4096, "image tokens", lambda n: [(2432, 38, n)]),
    "Flux.1-dev": Model(4096, "image tokens; next to them 512 words", lambda n: [(3072, 19, n), (3072, 38, n + 512)]),
    "Flux.2-dev": Model(4096, "image tokens; next to them 512 words", lambda n: [(6144, 8, n), (6144, 48, n + 512)]),
    "Qwen-Image": Model(4096, "image tokens", lambda n: [(3072, 60, n)]),
    "Z-Image": Model(4096, "image tokens; next to them 128 words", lambda n: [(3840, 30, n + 128)]),
}


def compared_methods(merged: bool = True) -> dict[str, str]:
    """`{label: name}` of the registered methods that have a closed form for attention modules; APT first.

    Labels say where a count is that of `merged` weights.
    """
    names = [name for name in methods_with_costs() if get_method(name).costs_per != "layer"]
    found = {}
    for name in sorted(names, key=lambda name: name != "apt"):
        label, note = get_method(name).label, get_method(name).costs_note if merged else ""
        found[label[:1].upper() + label[1:] + (f" ({note})" if note else "")] = name
    return found


def compare(
    model: str, num_prompts: int, rank: int, num_tokens: int, bottleneck: int = 96, merged: bool = True
) -> dict[str, Costs]:
    """What each method adds to one forward pass of one of `MODELS`, by label; arguments as for `count_costs`.

    Raises:
        ValueError: for an unknown model, or a number that is out of range.
    """
    if model not in MODELS:
        raise ValueError(f"Choose one of {', '.join(MODELS)}.")
    limits = {"number of prompts": (num_prompts, 2000), "rank": (rank, 256), "number of tokens": (num_tokens, 65536)}
    for name, (value, high) in (limits | {"bottleneck": (bottleneck, 65536)}).items():
        if not 1 <= value <= high:
            raise ValueError(f"The {name} must be from 1 to {high}, not {value}.")
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
                bottleneck=bottleneck,
                merged=merged,
            )
            for width, modules, tokens in chosen.groups(num_tokens)
        ]
        return Costs(sum(part.parameters for part in parts), sum(part.macs for part in parts))

    return {label: costs(method) for label, method in compared_methods(merged).items()}
