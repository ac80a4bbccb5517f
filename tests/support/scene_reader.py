"""A second reading of drawn scenes: by geometry and regular expressions, sharing nothing with the tasks' own code."""

import re

from apt_diffusion.miniature.world import COLORS, LAYOUTS, PATTERNS, PLACES, SHAPES, Scenes

COLOR, SHAPE = "|".join(COLORS), "|".join(SHAPES)
RELATION = "left of|right of|above|below|inside|around"
NOUN = rf"(?:(?:small|large) )?(?:(?:{COLOR}) )?(?:{SHAPE}|shape)"


def facts(scenes: Scenes, index: int) -> dict:
    """What the tensors say: things with place and radius, pattern, colours of the background."""
    layout = int(scenes.layout[index])
    things = []
    for slot in range(2 if layout >= 2 else 1):
        x, y, radius = PLACES[layout, slot].tolist()
        size = LAYOUTS[layout] if layout < 2 else None
        color, shape = COLORS[scenes.color[index, slot]], SHAPES[scenes.shape[index, slot]]
        things.append({"color": color, "shape": shape, "size": size, "x": x, "y": y, "radius": radius})
    pattern = PATTERNS[scenes.pattern[index]]
    ground = [COLORS[color] for color in scenes.ground[index]]
    return {"things": things, "pattern": pattern, "ground": ground[:1] if pattern == "plain" else ground}


def stands(a: dict, b: dict, relation: str) -> bool:
    """Whether `a` is there, seen from `b`."""
    dx, dy = a["x"] - b["x"], a["y"] - b["y"]
    return {
        "left of": dx < -10, "right of": dx > 10, "above": dy < -10, "below": dy > 10,
        "inside": dx == dy == 0 and a["radius"] < b["radius"], "around": dx == dy == 0 and a["radius"] > b["radius"],
    }[relation]  # fmt: skip


def named(noun: str, seen: dict) -> list[dict]:
    """Things that `a small red circle`, `circles`, `red shape` ... can mean."""
    singular = {f"{shape}s": shape for shape in SHAPES} | {"crosses": "cross"}
    words = [singular.get(word, word) for word in noun.split() if word not in ("a", "an", "the", "shape", "shapes")]
    return [thing for thing in seen["things"] if all(word in thing.values() for word in words)]


def answer(question: str, seen: dict) -> str:
    things = seen["things"]

    def match(pattern: str) -> re.Match | None:
        return re.fullmatch(pattern, question)

    if question == "what color is the background?":
        assert seen["pattern"] == "plain"
        return seen["ground"][0]
    if m := match(rf"what (color is the shape|is) ({RELATION}) the ({NOUN})\?"):
        (other,) = named(m[3], seen)
        (found,) = [thing for thing in things if thing is not other and stands(thing, other, m[2])]
        return found["color" if m[1].startswith("color") else "shape"]
    if m := match(rf"what color is the ({NOUN})\?"):
        (found,) = named(m[1], seen)
        return found["color"]
    if m := match(rf"what shape is ({COLOR})\?"):
        (found,) = named(m[1], seen)
        return found["shape"]
    if m := match(r"how many (.+) are there\?"):
        return str(len(named(m[1], seen)))
    if m := match(r"on which side is the (.+)\?"):
        (found,) = named(m[1], seen)
        (other,) = [thing for thing in things if thing is not found]
        sides = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
        return next(side for side, relation in sides.items() if stands(found, other, relation))
    if m := match(r"which is (larger|higher|farther left), the (.+) or the (.+)\?"):
        (a,), (b,) = named(m[2], seen), named(m[3], seen)
        relation = {"larger": "around", "higher": "above", "farther left": "left of"}[m[1]]
        assert stands(a, b, relation) != stands(b, a, relation)
        return (a if stands(a, b, relation) else b)["color" if m[1] == "larger" else "shape"]
    if question == "are the two shapes of the same kind?":
        return "yes" if things[0]["shape"] == things[1]["shape"] else "no"
    statement = re.fullmatch(r"is (there|the [a-z ]*?(?:background|shape|" + SHAPE + r")) (.+)\?", question)
    assert statement, question
    subject, rest = statement[1], statement[2]
    return "yes" if holds(f"there is {rest}" if subject == "there" else f"{subject} is {rest}", seen) else "no"


def holds(text: str, seen: dict) -> bool:
    """Whether a sentence or caption of pre-training is true."""
    text = re.sub(r"^(a picture of|a photo of|there is(?! one| no))\s", "", text)
    if m := re.fullmatch(r"there (?:is|are) (no|one|two) (.+)", text):
        return len(named(m[2], seen)) == ["no", "one", "two"].index(m[1])
    if m := re.fullmatch(r"the background is (\w+)", text):
        plain = seen["pattern"] == "plain" and seen["ground"] == [m[1]]
        return plain or seen["pattern"] == m[1]
    if m := re.fullmatch(rf"the ({NOUN}) is ({RELATION}) the ({NOUN})", text):
        return any(stands(a, b, m[2]) for a in named(m[1], seen) for b in named(m[3], seen) if a is not b)
    if m := re.fullmatch(rf"the ({NOUN}) is (?:an? )?(\w+)", text):
        return any(m[2] in thing.values() for thing in named(m[1], seen))
    text, _, ground = text.partition(" on a")
    if ground:
        words = ground.removeprefix("n").split()
        pattern = words[0] if words[0] in PATTERNS else "plain"
        if pattern != seen["pattern"] or {word for word in words if word in COLORS} != set(seen["ground"]):
            return False
    if m := re.fullmatch(rf"an? ({NOUN}) ({RELATION}) an? ({NOUN})", text):
        return any(stands(a, b, m[2]) for a in named(m[1], seen) for b in named(m[3], seen) if a is not b)
    m = re.fullmatch(rf"an? ({NOUN})", text)
    assert m, text
    return bool(named(m[1], seen))


def holds_for_pair(text: str, left: dict, right: dict) -> bool:
    def shown(words: str, seen: dict) -> bool:
        if m := re.fullmatch(r"an? (\w+) background", words):
            return holds(f"the background is {m[1]}", seen)
        return holds(words, seen)

    if m := re.fullmatch(r"the (left|right) picture shows (a.*)", text):
        return shown(m[2], left if m[1] == "left" else right)
    if m := re.fullmatch(r"(both|neither|exactly one of the two) pictures? shows? (.*)", text):
        return shown(m[2], left) + shown(m[2], right) == {"both": 2, "neither": 0}.get(m[1], 1)
    if m := re.fullmatch(r"there (?:is|are) (\w+) (.+) in total", text):
        total = len(named(m[2], left)) + len(named(m[2], right))
        return ["no", "one", "two", "three", "four"].index(m[1]) == total
    m = re.fullmatch(r"the (left|right) picture shows more shapes than the (left|right) picture", text)
    sides = {"left": len(left["things"]), "right": len(right["things"])}
    return sides[m[1]] > sides[m[2]]
