"""Compares the costs of APT and other methods on well-known models, for the page Cost."""

from ..cost_models import MODELS, compare, compared_methods
from ..costs import Costs

__all__ = ["MODELS", "compare", "compared_methods", "in_units", "saving"]


def saving(table: dict[str, Costs]) -> str:
    """The comparison in a sentence."""
    apt, deep = table["APT"], table["Deep prompts"]
    less = 100 * (1 - apt.macs / deep.macs)
    return (
        f"APT adds {in_units(apt.macs)} multiply-accumulates to a forward pass, "
        f"{abs(less):.1f} % {'less' if less >= 0 else 'more'} than deep prompts, "
        f"and trains {in_units(apt.parameters)} parameters."
    )


def conclusion(table: dict[str, Costs]) -> str:
    """What to conclude from the comparison, for somebody who has to choose."""
    apt, deep, lora = table["APT"], table["Deep prompts"], table["LoRA (merged)"]
    small = min(table, key=lambda label: table[label].parameters)
    if apt.macs < deep.macs:
        times = deep.macs / apt.macs
        first = f"So the same prompts need {times:.1f} times less arithmetic as APT than as deep prompts"
    else:
        first = "So APT saves no arithmetic at these sizes: that takes fewer prompts, or more tokens"
    size = apt.parameters / max(lora.parameters, 1)
    second = f"its file is {size:.1f} times as large as LoRA's" if size >= 1 else "its file is smaller than LoRA's"
    third = f"{small} trains the fewest parameters" if small != "APT" else "APT trains the fewest parameters"
    return (
        f"{first}; {second}, and {third}. Choose APT where adapters are mixed or switched from picture to picture, "
        "and merged LoRA where one adapter is used for good."
    )


def in_units(value: int) -> str:
    """`1,916,940` as `1.92 M`."""
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(value)
