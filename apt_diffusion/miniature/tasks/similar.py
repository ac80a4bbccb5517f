"""Hard negatives: scenes that differ from a given scene in one part only."""

import torch
from torch import Tensor

from ..world import HELD_OUT_COLOR, INSIDE, Scenes, sample_scenes

GROUP = 4
PARTS = {"shape": 0, "second shape": 1, "color": 2, "second color": 3, "layout": 4, "background": 5}
WEIGHTS = (3.0, 3.0, 1.0, 1.0, 2.0, 1.0)  # shapes are what is learnt last
ALL = len(PARTS)  # every part changes


def similar_scenes(count: int, generator: torch.Generator) -> Scenes:
    """Groups of four in a row: a scene, two that differ from it in one part, and a scene of its own."""
    base = sample_scenes(-(-count // GROUP), generator)[torch.arange(count) // GROUP]
    other = sample_scenes(count, generator)
    member = torch.arange(count) % GROUP
    part = torch.multinomial(torch.tensor(WEIGHTS), count, replacement=True, generator=generator)
    part = part.where(member < GROUP - 1, torch.tensor(ALL))

    def mixed(name: str, of_base: Tensor, of_other: Tensor) -> Tensor:
        changes = ((part == PARTS.get(name, -1)) | (part == ALL)) & (member > 0)
        return of_other.where(changes.view(-1, *[1] * (of_base.ndim - 1)), of_base)

    shape = [
        mixed(name, base.shape[:, slot], other.shape[:, slot]) for slot, name in enumerate(("shape", "second shape"))
    ]
    color = [
        mixed(name, base.color[:, slot], other.color[:, slot]) for slot, name in enumerate(("color", "second color"))
    ]
    scenes = Scenes(
        layout=mixed("layout", base.layout, other.layout),
        shape=torch.stack(shape, 1),
        color=torch.stack(color, 1),
        pattern=mixed("background", base.pattern, other.pattern),
        ground=mixed("background", base.ground, other.ground),
    )
    right = allowed(scenes)
    for name, values in vars(other).items():  # a mixture that the world does not draw gives way to a scene of its own
        mine = getattr(scenes, name)
        setattr(scenes, name, mine.where(right.view(-1, *[1] * (mine.ndim - 1)), values))
    return scenes


def allowed(scenes: Scenes) -> Tensor:
    """`(B,)`: no pair that pre-training leaves out, no colour twice, room inside for what is inside."""
    held_out = (HELD_OUT_COLOR[scenes.shape] == scenes.color).any(1)
    alike = scenes.color[:, 0] == scenes.color[:, 1]
    hidden = (scenes.color[:, :, None] == scenes.ground[:, None, :]).flatten(1).any(1)
    no_room = (scenes.layout == INSIDE) & (scenes.shape[:, 1] > 1)
    return ~(held_out | alike | hidden | no_room)
