"""The content of a picture of the drawn world in words, and claims about a picture that are true or false.

Every text of the tasks is a `Claim` or is computed from the `Picture`, so its truth can be decided for any picture,
not only for the one that it was made from.
"""

from dataclasses import dataclass
from itertools import permutations

from ..world import COLORS, LAYOUTS, PATTERNS, SHAPES, Scenes

INVERSE = {
    "left of": "right of", "right of": "left of", "above": "below", "below": "above", "inside": "around",
    "around": "inside",
}  # fmt: skip
PLURAL = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}


@dataclass(frozen=True)
class Thing:
    """One drawn shape; it has a size (`small`, `large`) only where it is alone."""

    color: str
    shape: str
    size: str | None = None


@dataclass(frozen=True)
class Picture:
    """Things (one or two), where the first is from the second, the background."""

    things: tuple[Thing, ...]
    relation: str | None  # of the first thing to the second
    pattern: str
    ground: tuple[str, ...]  # its colours: one if plain, else two

    def relation_of(self, first: int, second: int) -> str | None:
        """Where thing `first` is from thing `second`."""
        if self.relation is None or first == second:
            return None
        return self.relation if (first, second) == (0, 1) else INVERSE[self.relation]

    def count(self, phrase: "Phrase") -> int:
        """How many things of the picture the phrase fits."""
        return sum(map(phrase.fits, self.things))


def read_picture(scenes: Scenes, index: int) -> Picture:
    """One scene of a batch."""
    layout = LAYOUTS[scenes.layout[index]]
    two = bool(scenes.has_two[index])
    size = None if two else layout
    slots = (0, 1) if two else (0,)
    color, shape, ground = (values[index].tolist() for values in (scenes.color, scenes.shape, scenes.ground))
    pattern = PATTERNS[scenes.pattern[index]]
    return Picture(
        things=tuple(Thing(COLORS[color[slot]], SHAPES[shape[slot]], size) for slot in slots),
        relation=layout if two else None,
        pattern=pattern,
        ground=tuple(COLORS[value] for value in (ground[:1] if pattern == "plain" else ground)),
    )


@dataclass(frozen=True)
class Phrase:
    """A noun: `red circle`, `circle`, `red shape`, `shape`."""

    color: str | None = None
    shape: str | None = None
    size: str | None = None

    @property
    def words(self) -> str:
        """`large red circle`; what is not named is left out, and any shape is a `shape`."""
        return " ".join(filter(None, (self.size, self.color, self.shape or "shape")))

    @property
    def plural(self) -> str:
        """`red circles`."""
        return " ".join(filter(None, (self.color, PLURAL[self.shape] if self.shape else "shapes")))

    @property
    def with_article(self) -> str:
        """`an orange star`."""
        return f"{'an' if self.words[0] in 'aeiou' else 'a'} {self.words}"

    def fits(self, thing: Thing) -> bool:
        """Whether the thing has every property that the phrase names."""
        wanted = ((self.color, thing.color), (self.shape, thing.shape), (self.size, thing.size))
        return all(want is None or want == have for want, have in wanted)


@dataclass(frozen=True)
class Claim:
    """There are things that `phrases` fit, one each, the first in `relation` to the second, on such a background.

    `number` claims how many things of the picture the first phrase fits. What is `None` is not claimed.
    """

    phrases: tuple[Phrase, ...] = ()
    relation: str | None = None
    pattern: str | None = None
    ground: tuple[str, ...] | None = None
    number: int | None = None

    def holds(self, picture: Picture) -> bool:
        """Whether the claim is true of the picture."""
        if self.pattern is not None and self.pattern != picture.pattern:
            return False
        if self.ground is not None and set(self.ground) != set(picture.ground):
            return False
        if self.number is not None:
            return picture.count(self.phrases[0]) == self.number
        return any(
            self._fits(picture, chosen) for chosen in permutations(range(len(picture.things)), len(self.phrases))
        )

    def _fits(self, picture: Picture, chosen: tuple[int, ...]) -> bool:
        if not all(p.fits(picture.things[index]) for p, index in zip(self.phrases, chosen, strict=True)):
            return False
        return self.relation is None or picture.relation_of(*chosen) == self.relation


def ground_words(pattern: str, ground: tuple[str, ...] | None) -> str:
    """`a blue background`, `a striped blue and green background`, `a striped background`."""
    colors = " and ".join(ground or ())
    words = " ".join(filter(None, ("" if pattern == "plain" and ground else pattern, colors, "background")))
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
