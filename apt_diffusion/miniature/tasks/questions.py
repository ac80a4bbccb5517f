"""Questions about a picture, with short answers."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from ..world import COLORS, PATTERNS, SHAPES
from .picture import INVERSE, Claim, Phrase, Picture

DIRECTIONS = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}
RELATIONS = ("left of", "right of", "above", "below", "inside", "around")


@dataclass(frozen=True)
class Question:
    """`kind` is one of `KINDS`, `opening` the words by which VQAv2 would group it."""

    text: str
    answer: str
    kind: str
    opening: str


def _unique(picture: Picture, *parts: str) -> list[tuple[int, Phrase]]:
    """Things that one of their `parts` (color, shape) names without doubt."""
    found = []
    for index, thing in enumerate(picture.things):
        for part in parts:
            phrase = Phrase(**{part: getattr(thing, part)})
            if picture.count(phrase) == 1:
                found.append((index, phrase))
    return found


def _color(picture: Picture, rng: Random) -> tuple[str, str, str] | None:
    kind = rng.choice(("thing", "thing", "place", "background"))
    if kind == "background":
        if picture.pattern != "plain":
            return None
        return "what color is the background?", picture.ground[0], "what color is the"
    if kind == "place" and picture.relation:
        index = rng.randrange(2)
        other = picture.things[1 - index]
        relation = picture.relation_of(index, 1 - index)
        text = f"what color is the shape {relation} the {other.color} {other.shape}?"
        return text, picture.things[index].color, "what color is the"
    named = _unique(picture, "shape")
    if not named:
        return None
    index, phrase = rng.choice(named)
    return f"what color is the {phrase.words}?", picture.things[index].color, "what color is the"


def _shape(picture: Picture, rng: Random) -> tuple[str, str, str] | None:
    index = rng.randrange(len(picture.things))
    thing = picture.things[index]
    if picture.relation and rng.random() < 0.4:
        other = picture.things[1 - index]
        text = f"what is {picture.relation_of(index, 1 - index)} the {other.color} {other.shape}?"
        return text, thing.shape, "what is"
    return f"what shape is {thing.color}?", thing.shape, "what shape is"


def _count(picture: Picture, rng: Random) -> tuple[str, str, str]:
    thing = rng.choice(picture.things)
    color, shape = rng.choice(COLORS), rng.choice(SHAPES)
    phrase = rng.choice((Phrase(), Phrase(shape=thing.shape), Phrase(shape=shape), Phrase(color=color)))
    return f"how many {phrase.plural} are there?", str(picture.count(phrase)), "how many"


def _exists(picture: Picture, rng: Random) -> tuple[str, str, str]:
    """Half of them with the answer yes; a no differs from what is there in one word."""
    thing = rng.choice(picture.things)
    kind = rng.choice(("thing", "shape", "color", "pattern"))
    yes = rng.random() < 0.5
    if kind == "pattern":
        pattern = picture.pattern if yes else rng.choice([p for p in PATTERNS if p != picture.pattern])
        return f"is the background {pattern}?", _yes(picture, Claim(pattern=pattern)), "is the"
    phrase = Phrase(None if kind == "shape" else thing.color, None if kind == "color" else thing.shape)
    while picture.count(phrase) > 0 and not yes:
        changes = [part for part in ("color", "shape") if getattr(phrase, part)]
        part = rng.choice(changes)
        values = {"color": phrase.color, "shape": phrase.shape}
        phrase = Phrase(**{**values, part: rng.choice(COLORS if part == "color" else SHAPES)})
    return f"is there {phrase.with_article}?", _yes(picture, Claim((phrase,))), "is there"


def _relation(picture: Picture, rng: Random) -> tuple[str, str, str] | None:
    if picture.relation is None:
        return None
    named = _unique(picture, "color", "shape")
    if rng.random() < 0.3:
        index, phrase = rng.choice(named)
        relation = picture.relation_of(index, 1 - index)
        if relation in DIRECTIONS:
            return f"on which side is the {phrase.words}?", DIRECTIONS[relation], "on which side"
    first = rng.randrange(2)
    phrases = [Phrase(thing.color, thing.shape) for thing in picture.things]
    relation = picture.relation_of(first, 1 - first)
    assert relation is not None  # of two things
    if rng.random() < 0.5:
        relation = rng.choice([INVERSE[relation], INVERSE[relation], *(r for r in RELATIONS if r != relation)])
    claim = Claim((phrases[first], phrases[1 - first]), relation)
    text = f"is the {phrases[first].words} {relation} the {phrases[1 - first].words}?"
    return text, _yes(picture, claim), "is the"


def _comparison(picture: Picture, rng: Random) -> tuple[str, str, str] | None:
    if picture.relation is None:
        size = rng.choice(("small", "large"))
        phrase = Phrase(shape=picture.things[0].shape, size=size)
        return f"is the {phrase.shape} {size}?", _yes(picture, Claim((phrase,))), "is the"
    first, second = rng.sample(picture.things, 2)
    same = first.shape == second.shape
    if same or rng.random() < 0.4:
        return "are the two shapes of the same kind?", "yes" if same else "no", "are the"
    if picture.relation == "inside":
        outer = picture.things[1].color
        text = f"which is larger, the {first.color} shape or the {second.color} shape?"
        return text, outer, "which is"
    word, wanted = ("higher", "above") if picture.relation in ("above", "below") else ("farther left", "left of")
    index = 0 if picture.relation == wanted else 1
    text = f"which is {word}, the {first.shape} or the {second.shape}?"
    return text, picture.things[index].shape, "which is"


def _yes(picture: Picture, claim: Claim) -> str:
    return "yes" if claim.holds(picture) else "no"


Maker = Callable[[Picture, Random], tuple[str, str, str] | None]
KINDS: dict[str, Maker] = {
    "color": _color, "shape": _shape, "count": _count, "existence": _exists, "relation": _relation,
    "comparison": _comparison,
}  # fmt: skip


def questions_of(picture: Picture, rng: Random, count: int = 4) -> list[Question]:
    """Different questions about one picture, each of another kind as far as its kinds reach."""
    asked: dict[str, Question] = {}
    for kind in rng.sample(list(KINDS), len(KINDS)) * 3:
        if len(asked) == count:
            break
        made = KINDS[kind](picture, rng)
        if made and made[0] not in asked:
            asked[made[0]] = Question(made[0], made[1], kind, made[2])
    return list(asked.values())


def answer_kind(answer: str) -> str:
    """VQAv2's `answer_type`."""
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"


def people_answer(answer: str, rng: Random) -> list[str]:
    """Ten answers: most give the answer, some write numbers out, a few err."""
    others = {"yes/no": ("yes", "no"), "number": ("0", "1", "2")}.get(answer_kind(answer))
    others = others or next((group for group in (COLORS, SHAPES, tuple(DIRECTIONS.values())) if answer in group), ())
    written = {"0": "zero", "1": "one", "2": "two"}
    answers = []
    for _ in range(10):
        given = rng.choice([other for other in others if other != answer]) if rng.random() < 0.04 else answer
        answers.append(written.get(given, given) if rng.random() < 0.1 else given)
    return answers
