"""Builds prompts in the grammar of the emoji model's training captions."""

from random import Random

from .judge import Vocabulary

# Never drawn in training, in any style: things to teach.
HELD_OUT = ("teddy bear", "robot", "castle", "octopus", "cherries", "wrapped gift")


def random_prompts(count: int, seed: int = 0, two: float = 0.4) -> list[str]:
    """Prompts for things that the model knows, a share `two` of them for two things beside each other."""
    rng, vocabulary = Random(seed), Vocabulary.load()
    names = [name for name in vocabulary.concepts if name not in HELD_OUT]

    def thing() -> str:
        return f"{rng.choice(vocabulary.styles)} {rng.choice(names)}"

    prompts = []
    for _ in range(count):
        if rng.random() < two:
            shown = f"a {thing()} {rng.choice(('left of', 'right of', 'above', 'below'))} a {thing()}"
        else:
            shown = f"a {rng.choice(('small', 'large', 'large'))} {thing()}"
        prompts.append(f"{shown} on {ground(rng, vocabulary)} background")
    return prompts


def ground(rng: Random, vocabulary: Vocabulary) -> str:
    """`a blue`, `a striped blue and white`, half of the time each."""
    first, second = rng.sample(vocabulary.colors, 2)
    if rng.random() < 0.5:
        return f"{'an' if first == 'orange' else 'a'} {first}"
    return f"a {rng.choice(vocabulary.patterns[1:])} {first} and {second}"
