"""Learning rates: one for each component of the pipeline, times a ratio for each kind of parameter."""

import argparse
from typing import NamedTuple

from torch import nn

from ...architectures import DENOISERS
from .new_words import is_word

# Kinds of parameters, as flags and logs name them, and their names in an adapter: P, D and U, s, factor of the gate.
KINDS = {
    "prompts": ("prompts",),
    "keys": ("low_rank_down", "low_rank_up"),
    "log_scale": ("log_scale",),
    "gate": ("gate",),
}


class Group(NamedTuple):
    """Parameters with one learning rate, and the name under which logs have it."""

    name: str
    parameters: dict[str, nn.Parameter]
    rate: float


def ratio_of(args: argparse.Namespace, kind: str) -> float:
    """What `--prompts_lr_ratio` and its siblings say of a kind."""
    return getattr(args, f"{kind}_lr_ratio")


def parameter_groups(args: argparse.Namespace, parameters: dict[str, nn.Parameter], factor: float) -> list[Group]:
    """The groups of an optimizer.

    Each component has one, `lr` and `text_encoder_lr`, and one more for every kind with a ratio other than 1:
    `keys_lr`, `text_encoder_keys_lr`. New words have `new_tokens_lr`. Where text encoders are trained alone, theirs is
    `lr`.

    Args:
        args: the flags.
        parameters: by name, `unet.<module>.apt.adapters.default.prompts`.
        factor: on all rates, for `--scale_lr`.
    """
    text_encoder_lr = args.learning_rate if args.text_encoder_lr is None else args.text_encoder_lr
    rates = dict.fromkeys(DENOISERS, args.learning_rate * factor) | {"text_encoder": text_encoder_lr * factor}
    own = {name: kind for kind, names in KINDS.items() for name in names if ratio_of(args, kind) != 1}
    groups: list[Group] = []
    words = {name: value for name, value in parameters.items() if is_word(name)}
    parameters = {name: value for name, value in parameters.items() if name not in words}
    for component, rate in rates.items():
        members = {name: value for name, value in parameters.items() if name.startswith(component)}
        kinds = {name: own.get(name.rpartition(".")[2], "") for name in members}
        prefix = "text_encoder_" if groups and component == "text_encoder" else ""
        for kind in ("", *KINDS):
            chosen = {name: value for name, value in members.items() if kinds[name] == kind}
            if chosen:
                label = f"{prefix}{kind}_lr" if kind else f"{prefix}lr"
                groups.append(Group(label, chosen, rate * ratio_of(args, kind) if kind else rate))
    if words:
        rate = args.learning_rate if args.new_tokens_lr is None else args.new_tokens_lr
        groups.append(Group("new_tokens_lr", words, rate * factor))
    return groups


def describe(groups: list[Group]) -> str:
    """`lr 0.0015 of 1,234 numbers, keys_lr ...`."""
    return ", ".join(
        f"{group.name} {group.rate:g} of {sum(p.numel() for p in group.parameters.values()):,} numbers"
        for group in groups
    )
