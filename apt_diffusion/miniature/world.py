"""The drawn world: coloured shapes on coloured backgrounds, with captions.

`Scenes` describes a batch of pictures as integer tensors; `render` draws it from signed distance fields, `caption`
words it. The world is of low entropy on purpose (fixed places, two sizes, no rotation, one word order): that decides
how soon a small model learns it. Axes: B batch, O = 2 objects, H = W = 64 pixels.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond", "moon")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan", "white", "black")
PATTERNS = ("plain", "striped", "checkered")
LAYOUTS = ("small", "large", "left of", "right of", "above", "below", "inside")
INSIDE = LAYOUTS.index("inside")
RGB = torch.tensor(
    [
        (0.90, 0.10, 0.12), (0.12, 0.65, 0.20), (0.13, 0.28, 0.90), (0.98, 0.88, 0.12), (0.98, 0.52, 0.06),
        (0.50, 0.14, 0.66), (1.00, 0.58, 0.78), (0.15, 0.83, 0.90), (0.97, 0.97, 0.97), (0.06, 0.06, 0.07),
    ]
)  # fmt: skip
# Of each shape the one colour that is never drawn in pre-training, so that composition can be tested.
HELD_OUT_COLOR = torch.tensor([(3 * shape + 1) % len(COLORS) for shape in range(len(SHAPES))])
# Centre and radius in pixels from the middle, of the objects of each layout.
PLACES = torch.tensor(
    [
        [[0, 0, 16], [0, 0, 0]],
        [[0, 0, 26], [0, 0, 0]],
        [[-16, 0, 15], [16, 0, 15]],
        [[16, 0, 15], [-16, 0, 15]],
        [[0, -16, 15], [0, 16, 15]],
        [[0, 16, 15], [0, -16, 15]],
        [[0, 0, 12], [0, 0, 30]],
    ],
    dtype=torch.float32,
)  # fmt: skip
PLACE_JITTER = 1.5  # pixels
COLOR_JITTER = 0.03
TILE = 16  # width of a stripe, side of a square of a checkered background


@dataclass
class Scenes:
    """A batch of described pictures."""

    layout: Tensor  # (B,) into LAYOUTS; the first two have one object
    shape: Tensor  # (B, O) into SHAPES; the second object stands behind, and is unused where there is one
    color: Tensor  # (B, O) into COLORS
    pattern: Tensor  # (B,) into PATTERNS
    ground: Tensor  # (B, 2) into COLORS; twice the same for plain

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, index: Tensor | slice) -> "Scenes":
        return Scenes(*(getattr(self, field.name)[index] for field in fields(self)))

    @property
    def has_two(self) -> Tensor:
        """`(B,)`: whether the scene has a second thing."""
        return self.layout >= 2


def sample_scenes(
    count: int, generator: torch.Generator, two: float = 0.6, patterned: float = 0.5, held_out: bool = False
) -> Scenes:
    """Random scenes whose parts all differ in colour.

    Args:
        count: B.
        generator: decides everything.
        two: share of pictures with two objects.
        patterned: share of striped and checkered backgrounds.
        held_out: draw the first object in the colour that pre-training never shows with its shape.
    """

    def draw(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=generator)

    is_two = torch.rand(count, generator=generator) < two
    layout = torch.where(is_two, 2 + draw(len(LAYOUTS) - 2, count), draw(2, count))
    is_patterned = torch.rand(count, generator=generator) < patterned
    pattern = torch.where(is_patterned, 1 + draw(len(PATTERNS) - 1, count), torch.zeros(count, dtype=torch.long))
    color = torch.rand(count, len(COLORS), generator=generator).argsort(1)[:, :4]  # four different ones
    shape = draw(len(SHAPES), count, 2)
    if held_out:
        first = HELD_OUT_COLOR[shape[:, 0]]
        color = torch.where(color == first[:, None], color[:, :1], color)
        color[:, 0] = first
    for slot in (1,) if held_out else (0, 1):
        while bool((forbidden := HELD_OUT_COLOR[shape[:, slot]] == color[:, slot]).any()):
            shape[forbidden, slot] = draw(len(SHAPES), int(forbidden.sum()))
    # Only circles and squares have room inside; where one's colour is held out, it is the other.
    container = shape[:, 1] % 2
    container = torch.where(HELD_OUT_COLOR[container] == color[:, 1], 1 - container, container)
    shape[:, 1] = torch.where(layout == INSIDE, container, shape[:, 1])
    ground = color[:, 2:].clone()
    ground[:, 1] = torch.where(pattern == 0, ground[:, 0], ground[:, 1])
    return Scenes(layout, shape, color[:, :2].clone(), pattern, ground)


def caption(scenes: Scenes, index: int) -> str:
    """`a small red circle on a blue background`, `a red star above a pink ring on a striped cyan and blue ...`."""
    layout = LAYOUTS[scenes.layout[index]]
    first, second = (f"{COLORS[scenes.color[index, slot]]} {SHAPES[scenes.shape[index, slot]]}" for slot in (0, 1))
    objects = f"a {first} {layout} a {second}" if scenes.has_two[index] else f"a {layout} {first}"
    colors = [COLORS[color] for color in scenes.ground[index]]
    pattern = PATTERNS[scenes.pattern[index]]
    return f"{objects} on a {colors[0] if pattern == 'plain' else f'{pattern} {colors[0]} and {colors[1]}'} background"


def render(scenes: Scenes, generator: torch.Generator) -> Tensor:
    """`(B, 3, 64, 64)` in [-1, 1]; the generator draws the small variation of colours and places."""
    image = background(scenes.pattern, jitter_colors(RGB[scenes.ground], generator))
    places = PLACES[scenes.layout]
    for slot in (1, 0):
        rgb = jitter_colors(RGB[scenes.color[:, slot]], generator)
        shift = (torch.rand(len(scenes), 2, generator=generator) * 2 - 1) * PLACE_JITTER
        mask = coverage(scenes.shape[:, slot], places[:, slot, :2] + shift, places[:, slot, 2].clamp(min=1))
        image = paint(image, mask * scenes.has_two[:, None, None] if slot == 1 else mask, rgb)
    return image * 2 - 1


def jitter_colors(rgb: Tensor, generator: torch.Generator) -> Tensor:
    """Colours in [0, 1] with some noise: no two reds are alike."""
    return (rgb + COLOR_JITTER * torch.randn(rgb.shape, generator=generator)).clamp(0, 1)


def background(pattern: Tensor, rgb: Tensor) -> Tensor:
    """`(B, 3, H, W)` in [0, 1] of patterns `(B,)` in two colours `(B, 2, 3)`."""
    x, y = pixel_grid()
    columns, rows = (((axis + SIZE / 2) // TILE) % 2 for axis in (x, y))
    masks = torch.stack([torch.zeros_like(columns), columns, (columns + rows) % 2])[pattern]  # (B, H, W)
    return paint(rgb[:, 0, :, None, None].expand(-1, -1, SIZE, SIZE), masks, rgb[:, 1])


def paint(image: Tensor, mask: Tensor, rgb: Tensor) -> Tensor:
    """`image (B, 3, H, W)` with `rgb (B, 3)` laid over it where `mask (B, H, W)` is 1."""
    return image + mask[:, None] * (rgb[:, :, None, None] - image)


def coverage(shape: Tensor, center: Tensor, radius: Tensor) -> Tensor:
    """Anti-aliased masks `(B, H, W)` of shapes `(B,)` at centres `(B, 2)` with radii `(B,)` in pixels."""
    grid_x, grid_y = pixel_grid()
    x = (grid_x - center[:, 0, None, None]) / radius[:, None, None]
    y = (grid_y - center[:, 1, None, None]) / radius[:, None, None]
    distance = torch.empty_like(x)
    for kind, name in enumerate(SHAPES):
        chosen = shape == kind
        if chosen.any():
            distance[chosen] = signed_distance(name, x[chosen], y[chosen])
    return (0.5 - distance * radius[:, None, None]).clamp(0, 1)


def pixel_grid() -> tuple[Tensor, Tensor]:
    """x (to the right) and y (down) of every pixel `(H, W)`, from the middle of the picture."""
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    return axis.expand(SIZE, SIZE), axis[:, None].expand(SIZE, SIZE)


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance to the outline of a shape of about unit radius, negative inside; y points down."""
    r = torch.hypot(x, y)
    match shape:
        case "circle":
            return r - 0.92
        case "square":
            return torch.maximum(x.abs(), y.abs()) - 0.80
        case "triangle":
            return torch.maximum(0.866 * x.abs() - 0.5 * (y + 0.95), y - 0.72)
        case "star":
            return _star(x, y, r)
        case "heart":  # two discs on a wedge
            discs = torch.hypot(x.abs() - 0.43, y + 0.32) - 0.50
            return torch.minimum(discs, torch.maximum(0.742 * x.abs() + 0.67 * (y + 0.32) - 0.80, -(y + 0.32)))
        case "cross":
            across, down = (torch.maximum(a.abs() - 0.95, b.abs() - 0.30) for a, b in ((x, y), (y, x)))
            return torch.minimum(across, down)
        case "ring":
            return (r - 0.70).abs() - 0.24
        case "diamond":
            return (1.25 * x.abs() + 0.95 * y.abs() - 0.98) / 1.57
        case "moon":  # a disc without another
            return torch.maximum(r - 0.95, 0.78 - torch.hypot(x - 0.46, y + 0.12))
    raise ValueError(f"Unknown shape {shape!r}; there are {SHAPES}.")


def _star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Five points: the plane folded into one tenth, where the outline is one straight edge."""
    half = math.pi / 5
    angle = ((torch.atan2(x, -y) + half).remainder(2 * half) - half).abs()
    across, along = r * angle.sin(), r * angle.cos()
    tip, notch = (0.0, 1.05), (0.44 * math.sin(half), 0.44 * math.cos(half))
    normal = (tip[1] - notch[1], notch[0] - tip[0])
    return (normal[0] * (across - tip[0]) + normal[1] * (along - tip[1])) / math.hypot(*normal)
