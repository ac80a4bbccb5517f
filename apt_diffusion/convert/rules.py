"""Renames checkpoint keys by rules, and reports what happened to each key."""

import re
from dataclasses import dataclass, field

from torch import Tensor

# The parameters of APT: official name, name here.
APT_NAMES = {
    "mm_tokens": "prompts",
    "mm.0.weight": "low_rank_down",
    "mm.1.weight": "low_rank_up",
    "scale": "log_scale",
}


@dataclass(frozen=True)
class Rule:
    """The fate of keys that match `pattern` as a whole: a new name, three (`parts`), or none, with the reason.

    `target` may use the pattern's groups (`\\\\1`). With `parts` the tensor is cut in three along its first dimension,
    and each part takes its name in place of `{part}`.
    """

    pattern: str
    target: str | None
    reason: str = ""
    parts: tuple[str, ...] = ()


@dataclass
class Account:
    """Every official key with its shape and its fate."""

    entries: list[tuple[str, tuple[int, ...], str]] = field(default_factory=list)
    made: list[tuple[str, str]] = field(default_factory=list)  # keys that are not in the file, and their source

    def add(self, key: str, tensor: Tensor, fate: str) -> None:
        """Notes what became of one official tensor."""
        self.entries.append((key, tuple(tensor.shape), fate))

    def __str__(self) -> str:
        lines = [f"{key} {shape} {fate}" for key, shape, fate in self.entries]
        return "\n".join(lines + [f"(new) {key}: {source}" for key, source in self.made])

    def summary(self) -> str:
        """How many tensors were converted, dropped and made, and why."""
        dropped: dict[str, int] = {}
        for _, _, fate in self.entries:
            if fate.startswith("dropped: "):
                dropped[fate[9:]] = dropped.get(fate[9:], 0) + 1
        count = sum(dropped.values())
        lines = [f"{len(self.entries)} keys: {len(self.entries) - count} converted, {count} dropped"]
        lines += [f"  dropped {number}: {reason}" for reason, number in dropped.items()]
        return "\n".join(lines + [f"  new {key}: {source}" for key, source in self.made])


def rename(state: dict[str, Tensor], rules: tuple[Rule, ...], account: Account) -> dict[str, Tensor]:
    """The tensors under their new names.

    Raises:
        ValueError: naming the keys that no rule knows, or two keys that would get one name.
    """
    renamed: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        found = next(((rule, match) for rule in rules if (match := re.fullmatch(rule.pattern, key))), None)
        if found is None:
            unknown.append(key)
            continue
        rule, match = found
        if rule.target is None:
            account.add(key, tensor, f"dropped: {rule.reason}")
            continue
        target = match.expand(rule.target)
        pieces = tensor.chunk(len(rule.parts)) if rule.parts else (tensor,)
        names = [target.replace("{part}", part) for part in rule.parts] if rule.parts else [target]
        for name, piece in zip(names, pieces, strict=True):
            if name in renamed:
                raise ValueError(f"Two keys of the checkpoint become {name}: it was not written by the official code.")
            renamed[name] = piece.clone()
        account.add(key, tensor, f"-> {', '.join(names)}" + (f" ({rule.reason})" if rule.reason else ""))
    if unknown:
        some = ", ".join(unknown[:5]) + (" ..." if len(unknown) > 5 else "")
        raise ValueError(
            f"{len(unknown)} of {len(state)} keys are unknown: {some}. This converts the official METER (CLIP ViT and "
            "RoBERTa) and ViLT, and APT on both; not other encoders, and not the methods that APT is compared with."
        )
    return renamed


def apt_rules(attention: str, target: str) -> tuple[Rule, ...]:
    """For the four parameters of APT inside the official `attention`, which is `target` here."""
    return tuple(
        Rule(rf"{attention}APT\.{re.escape(official)}", f"{target}.apt.{name}") for official, name in APT_NAMES.items()
    )


def shape(state: dict[str, Tensor], key: str) -> tuple[int, ...]:
    """Shape of a tensor that the checkpoint must contain."""
    if key not in state:
        raise ValueError(f"The checkpoint lacks {key}: it is cut short, or not the official code's.")
    return tuple(state[key].shape)


def count(state: dict[str, Tensor], pattern: str) -> int:
    """How many different numbers stand in the one group of `pattern`."""
    numbers = {match[1] for key in state if (match := re.match(pattern, key))}
    if not numbers:
        raise ValueError(f"The checkpoint has no layer {pattern}: it is cut short, or not the official code's.")
    return len(numbers)
