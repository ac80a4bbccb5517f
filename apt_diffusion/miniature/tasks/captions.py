"""Sentences about one picture: those of pre-training, and other wordings that only the tasks use."""

from collections.abc import Callable
from random import Random

from .picture import INVERSE, Claim, Phrase, Picture, ground_words

OPENINGS = ("", "", "a picture of ", "a photo of ", "there is ")
COUNT_WORDS = ("no", "one", "two")


def describe(picture: Picture, rng: Random, sentences: float = 0.4) -> tuple[str, Claim]:
    """A pre-training text about a picture: a caption, whole or with omissions, or a sentence about one attribute.

    Args:
        picture: what is shown.
        rng: decides everything.
        sentences: share of sentences; the rest are captions.

    Returns:
        The text, and the claim that it makes, to tell whether it holds for another picture.
    """
    if rng.random() < sentences:
        return attribute_sentence(picture, rng)
    sized = rng.random() < 0.5
    phrases = [Phrase(thing.color, thing.shape, thing.size if sized else None) for thing in picture.things]
    relation = picture.relation
    if len(phrases) == 2 and rng.random() < 0.25:
        phrases, relation = [rng.choice(phrases)], None
    if rng.random() < 0.3:
        index = rng.randrange(len(phrases))
        phrases[index] = omit(phrases[index], rng)
    text = phrases[0].with_article
    if relation:
        text += f" {relation} {phrases[1].with_article}"
    if rng.random() < 0.6:
        claim = Claim(tuple(phrases), relation, picture.pattern, picture.ground)
        text += f" on {ground_words(picture.pattern, picture.ground)}"
    else:
        claim = Claim(tuple(phrases), relation)
    return rng.choice(OPENINGS) + text, claim


def omit(phrase: Phrase, rng: Random) -> Phrase:
    """Without its colour, its shape or its size."""
    kept = {"color": phrase.color, "shape": phrase.shape, "size": phrase.size}
    kept[rng.choice([name for name, value in kept.items() if value])] = None
    return Phrase(**kept)


def attribute_sentence(picture: Picture, rng: Random) -> tuple[str, Claim]:
    """`the circle is red`, `the background is striped`, `the red shape is above the star`, `there are two shapes`."""
    thing = rng.choice(picture.things)
    kind = rng.choice(("color", "shape", "ground", "place", "place", "number"))
    whole = Phrase(thing.color, thing.shape)
    if kind == "color":
        return f"the {thing.shape} is {thing.color}", Claim((whole,))
    if kind == "shape":
        return f"the {thing.color} shape is {Phrase(shape=thing.shape).with_article}", Claim((whole,))
    if kind == "ground":
        if picture.pattern == "plain":
            return f"the background is {picture.ground[0]}", Claim(pattern="plain", ground=picture.ground)
        return f"the background is {picture.pattern}", Claim(pattern=picture.pattern)
    if kind == "place" and picture.relation is None:
        return f"the {thing.shape} is {thing.size}", Claim((Phrase(None, thing.shape, thing.size),))
    if kind == "place":
        first, second = (short_name(thing, rng) for thing in picture.things)
        text = f"the {first.words} is {picture.relation} the {second.words}"
        return text, Claim((first, second), picture.relation)
    phrase = Phrase(shape=rng.choice((None, thing.shape)))
    number = picture.count(phrase)
    noun = phrase.plural if number == 2 else phrase.words
    return f"there {'are' if number == 2 else 'is'} {COUNT_WORDS[number]} {noun}", Claim((phrase,), number=number)


def short_name(thing, rng: Random) -> Phrase:
    """By colour, by shape or by both."""
    color, shape = rng.choice(((thing.color, None), (None, thing.shape), (thing.color, thing.shape)))
    return Phrase(color, shape)


# Wordings that pre-training never uses. Each says all that the picture shows, except for the short ones.


def behind(picture: Picture) -> str:
    """`striped blue and green`, `plain blue`."""
    return f"{picture.pattern} {' and '.join(picture.ground)}"


def _ground_first(picture: Picture, first: str, second: str, relation: str) -> str:
    shown = f"a {second} {INVERSE[relation]} a {first}" if second else f"a {first}"
    return f"in front of {behind(picture)} we see {shown}"


def _colors_last(picture: Picture, first: str, second: str, relation: str) -> str:
    parts = [f"a {thing.shape} in {thing.color}" for thing in picture.things]
    shown = f"{parts[0]}, {relation} {parts[1]}" if second else f"{parts[0]}, {picture.things[0].size}"
    return f"{shown}, over {behind(picture)}"


def _list(picture: Picture, first: str, second: str, relation: str) -> str:
    return f"{f'{first} and {second}' if second else first}, {behind(picture)} behind"


def _from_the_second(picture: Picture, first: str, second: str, relation: str) -> str:
    ground = ground_words(picture.pattern, picture.ground)
    if not second:
        return f"{ground} with one {first} in the middle"
    return f"{ground} with a {second} that has a {first} {PREPOSITIONS[relation]}"


PREPOSITIONS = {
    "left of": "on its left", "right of": "on its right", "above": "over it", "below": "under it",
    "inside": "within it",
}  # fmt: skip
WORDINGS: tuple[Callable[[Picture, str, str, str], str], ...] = (_ground_first, _colors_last, _list, _from_the_second)


def captions_of(picture: Picture) -> list[str]:
    """Five captions of one picture, worded differently: the first as in pre-training, four as only the tasks have."""
    names = [Phrase(thing.color, thing.shape, thing.size) for thing in picture.things]
    first, second = names[0].words, names[1].words if len(names) == 2 else ""
    relation = picture.relation or ""
    shown = f"{names[0].with_article} {relation} {names[1].with_article}" if second else names[0].with_article
    own = f"{shown} on {ground_words(picture.pattern, picture.ground)}"
    return [own, *(word(picture, first, second, relation).replace("a orange", "an orange") for word in WORDINGS)]
