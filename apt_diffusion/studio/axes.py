"""Grids of pictures that compare settings: the possible axes, and the drawing settings of each cell."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from .order import BLOCKS, Order, real, whole

MAX_CELLS = 36
STRENGTHS = "0, 0.2, 0.4, 0.6, 0.8, 1, 1.2"


@dataclass(frozen=True)
class Axis:
    """A setting that differs along rows or columns.

    Args:
        example: values as a visitor may write them.
        change: gives an order with one of the values.
    """

    example: str
    change: Callable[[Order, str], Order]


def _block(name: str) -> Callable[[Order, str], Order]:
    def change(order: Order, value: str) -> Order:
        blocks = dict(order.blocks) | {name: real(value, f"strength of the block {name}")}
        return dataclasses.replace(order, blocks=tuple(blocks.items()))

    return change


def _first_weight(order: Order, value: str) -> Order:
    if not order.adapters:
        raise ValueError("Choose an adapter first: its weight is to be compared.")
    first, *rest = order.adapters
    return dataclasses.replace(order, adapters=((first[0], real(value, "weight")), *rest))


AXES: dict[str, Axis] = {
    "Strength of all adapters": Axis(
        STRENGTHS, lambda order, value: dataclasses.replace(order, strength=real(value, "strength"))
    ),
    "Weight of the first adapter": Axis("0, 0.5, 1, 1.5", _first_weight),
    "Steps": Axis("5, 10, 20, 40", lambda order, value: dataclasses.replace(order, steps=whole(value, "steps"))),
    "Guidance": Axis(
        "1, 3, 5, 7.5", lambda order, value: dataclasses.replace(order, guidance=real(value, "guidance"))
    ),
    "Seed": Axis("1, 2, 3, 4", lambda order, value: dataclasses.replace(order, seed=whole(value, "seed"))),
    "Sampler": Axis("DDIM, Euler, DPM++ 2M", lambda order, value: dataclasses.replace(order, sampler=value)),
    "Words": Axis("red, blue, green", lambda order, value: order),  # see `cells_of`
    **{f"Block: {name}": Axis("0, 0.5, 1", _block(name)) for name in BLOCKS},
}


def values_of(name: str, values: str) -> list[str]:
    """What an axis goes through: what a visitor wrote, or its example for nothing.

    Raises:
        ValueError: for an unknown axis.
    """
    if name not in AXES:
        raise ValueError("Choose what to compare.")
    return [value.strip() for value in (values.strip() or AXES[name].example).split(",") if value.strip()]


def cells_of(
    order: Order, top: str, top_values: list[str], side: str = "", side_values: list[str] | None = None
) -> list[Order]:
    """The orders of a grid, row by row: one picture each, all of the same seed.

    Args:
        order: what the cells share.
        top: the axis along the columns.
        top_values: its values.
        side: the axis along the rows, if there is one.
        side_values: its values.

    Raises:
        ValueError: for too many cells, or a value that makes no sense.
    """
    rows = side_values if side and side_values else [""]
    if top == side:
        raise ValueError("Choose two different settings to compare.")
    if not 1 <= len(top_values) * len(rows) <= MAX_CELLS:
        raise ValueError(
            f"A grid may have {MAX_CELLS} pictures, not {len(top_values) * len(rows)}: give fewer values."
        )
    if not order.adapters and (top.startswith(("Strength", "Block")) or side.startswith(("Strength", "Block"))):
        raise ValueError("Choose an adapter first: its strength is to be compared.")
    one = dataclasses.replace(order, count=1)
    cells = []
    for row in rows:
        changed = _changed(one, side, row, rows[0]) if side else one
        cells += [_changed(changed, top, value, top_values[0]) for value in top_values]
    return cells


def _changed(order: Order, name: str, value: str, first: str) -> Order:
    if name != "Words":
        return AXES[name].change(order, value)
    if first not in order.prompt:
        raise ValueError(
            f"The prompt does not contain “{first[:40]}”: the first of the words is replaced by the others."
        )
    return dataclasses.replace(order, prompt=order.prompt.replace(first, value))
