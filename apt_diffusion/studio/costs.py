"""What APT costs next to other methods on well-known models, for the page of that name."""

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


def in_units(value: int) -> str:
    """`1,916,940` as `1.92 M`."""
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(value)
