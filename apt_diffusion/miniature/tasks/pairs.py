"""Statements about two pictures, in the manner of NLVR2: each is true of one pair and false of another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from .picture import Claim, Phrase, Picture, ground_words

Holds = Callable[[Picture, Picture], bool]


@dataclass(frozen=True)
class Statement:
    """A sentence, whether it holds for (left, right), and its kind."""

    text: str
    holds: Holds
    kind: str


def _names(picture: Picture) -> list[Phrase]:
    """Each thing by colour and shape, by colour, by shape."""
    return [
        phrase
        for thing in picture.things
        for phrase in (Phrase(thing.color, thing.shape), Phrase(thing.color), Phrase(None, thing.shape))
    ]


def _grounds(picture: Picture) -> list[tuple[str, Claim]]:
    if picture.pattern == "plain":
        claim = Claim(pattern="plain", ground=picture.ground)
        return [(ground_words("plain", picture.ground), claim)]
    return [(ground_words(picture.pattern, None), Claim(pattern=picture.pattern))]


def _side(left: Picture, right: Picture, rng: Random) -> Statement | None:
    index = rng.randrange(2)
    text, claim = _single((left, right)[index], rng)
    return Statement(
        f"the {('left', 'right')[index]} picture shows {text}", lambda a, b: claim.holds((a, b)[index]), "one side"
    )


def _single(picture: Picture, rng: Random) -> tuple[str, Claim]:
    """Something true of one picture, and its words."""
    if picture.relation and rng.random() < 0.3:
        phrases = tuple(Phrase(thing.color, thing.shape) for thing in picture.things)
        text = f"{phrases[0].with_article} {picture.relation} {phrases[1].with_article}"
        return text, Claim(phrases, picture.relation)
    if rng.random() < 0.3:
        return rng.choice(_grounds(picture))
    phrase = rng.choice(_names(picture))
    return phrase.with_article, Claim((phrase,))


def _both(left: Picture, right: Picture, rng: Random) -> Statement | None:
    shared = [(phrase.with_article, Claim((phrase,))) for phrase in _names(left) if right.count(phrase)]
    shared += [pair for pair in _grounds(left) if pair[1].holds(right)]
    if not shared:
        return None
    text, claim = rng.choice(shared)
    return Statement(f"both pictures show {text}", lambda a, b: claim.holds(a) and claim.holds(b), "both")


def _exactly_one(left: Picture, right: Picture, rng: Random) -> Statement | None:
    text, claim = _single(rng.choice((left, right)), rng)
    return Statement(
        f"exactly one of the two pictures shows {text}", lambda a, b: claim.holds(a) != claim.holds(b), "one of two"
    )


def _neither(left: Picture, right: Picture, rng: Random) -> Statement | None:
    """Named after a third kind of thing: what the pair lacks, another pair may have."""
    phrase = Phrase(shape=rng.choice(("circle", "square", "triangle", "star", "heart", "cross", "ring")))
    claim = Claim((phrase,))
    text = f"neither picture shows {phrase.with_article}"
    return Statement(text, lambda a, b: not (claim.holds(a) or claim.holds(b)), "neither")


def _total(left: Picture, right: Picture, rng: Random) -> Statement | None:
    phrase = rng.choice((Phrase(), Phrase(shape=rng.choice([t.shape for t in (*left.things, *right.things)]))))
    number = left.count(phrase) + right.count(phrase)
    words = ("no", "one", "two", "three", "four")
    noun = phrase.words if number == 1 else phrase.plural
    text = f"there {'is' if number == 1 else 'are'} {words[number]} {noun} in total"
    return Statement(text, lambda a, b: a.count(phrase) + b.count(phrase) == number, "number")


def _more(left: Picture, right: Picture, rng: Random) -> Statement | None:
    sides, (first, second) = rng.choice(((("left", "right"), (0, 1)), (("right", "left"), (1, 0))))
    return Statement(
        f"the {sides[0]} picture shows more shapes than the {sides[1]} picture",
        lambda a, b: len((a, b)[first].things) > len((a, b)[second].things),
        "comparison",
    )


MAKERS = (_side, _side, _both, _both, _exactly_one, _neither, _total, _more)


def statement_with_pairs(
    pictures: Sequence[Picture], rng: Random, tries: int = 300
) -> tuple[Statement, tuple[int, int], tuple[int, int]]:
    """A statement, a pair of pictures (two indices) for which it holds, and one for which it does not.

    The false pair shares a picture with the true one, so no single picture gives the answer away.
    """
    maker = rng.choice(MAKERS)
    while True:
        left, right = rng.sample(range(len(pictures)), 2)
        statement = maker(pictures[left], pictures[right], rng)
        if statement is None or not statement.holds(pictures[left], pictures[right]):
            continue
        for _ in range(tries):
            other = rng.randrange(len(pictures))
            pair = (left, other) if rng.random() < 0.5 else (other, right)
            if pair[0] != pair[1] and not statement.holds(pictures[pair[0]], pictures[pair[1]]):
                return statement, (left, right), pair
