"""Things that the emoji model never saw, for personalisation, and the judge's scores of the resulting pictures."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grade import draw
from ..pictures import to_tensor
from .judge import WINDOWS, Judge, look_at

SUBJECTS = {
    "teddy bear": "fluent",
    "robot": "fluent",
    "castle": "noto",
    "cherries": "noto",
    "octopus": "twemoji",
    "wrapped gift": "twemoji",
}
THINGS = Path(__file__).parent / "things"  # five pictures of each, with captions
PROMPT = "a sks toy"  # two words that no caption of the model's training used
GROUNDS = ("blue", "white", "yellow", "green", "purple")  # of the training pictures


# On grounds that no training picture has, small, beside other things, and without the subject.
TEST_PROMPTS = (
    "a large sks toy on a pink background",
    "a large sks toy on an orange background",
    "a large sks toy on a striped red and white background",
    "a large sks toy on a gradient cyan and pink background",
    "a small sks toy on a cyan background",
    "a small sks toy on a checkered pink and white background",
    "a sks toy left of a noto pizza on a cyan background",
    "a fluent rocket left of a sks toy on a pink background",
    "a sks toy below a twemoji umbrella on a grey background",
    "a large fluent fox on a blue background",
    "a large noto bear on a green background",
    "a large twemoji pizza on a yellow background",
    "a small fluent rocket on a purple background",
    "a large noto balloon on a striped blue and white background",
    "a fluent cupcake left of a noto cactus on a white background",
)
GRAMMAR = re.compile(
    r"an? (?P<size>small |large )?(?P<first>.+?)"
    r"( (?P<relation>left of|right of|above|below) an? (?P<second>.+?))?"
    r" on an? ((?P<pattern>striped|checkered|gradient) )?(?P<color>\w+)( and (?P<other>\w+))? background"
)


@dataclass(frozen=True)
class Request:
    """What a prompt's picture should show.

    Args:
        kind: `ground` (the subject, large), `small`, `beside` (another thing) or `other` (the subject is not named).
        layout: as the judge calls it.
        colors: of the ground; the second may be missing.
        pattern: of the ground.
        place: where the subject stands in the layout; without it, the first thing.
        companion: the other thing; without the subject, the first thing.
    """

    kind: str
    layout: str
    colors: tuple[str, ...]
    pattern: str
    place: int
    companion: str | None

    @classmethod
    def read(cls, prompt: str) -> "Request":
        """Parses a prompt of the model's grammar, in which `PROMPT` without its article names the subject.

        Raises:
            ValueError: the prompt does not follow the grammar.
        """
        found = GRAMMAR.fullmatch(prompt)
        if found is None:
            raise ValueError(f"{prompt!r} is no prompt of the model's grammar, such as {TEST_PROMPTS[0]!r}.")
        subject = PROMPT.removeprefix("a ")
        shown = [found[name] for name in ("first", "second") if found[name]]
        named = [re.sub(r"^(noto|twemoji|fluent) ", "", name) for name in shown if name != subject]
        relation = found["relation"]
        layout = {None: (found["size"] or "large ").strip(), "left of": "beside", "right of": "beside"}
        place = int(relation in ("right of", "below"))
        if subject in shown and shown.index(subject) == 1:
            place = 1 - place
        kind = "other" if subject not in shown else "beside" if relation else layout[None]
        return cls(
            kind={"large": "ground"}.get(kind, kind),
            layout=layout.get(relation, "above"),
            colors=tuple(found[name] for name in ("color", "other") if found[name]),
            pattern=found["pattern"] or "plain",
            place=place,
            companion=named[0] if named else None,
        )


@dataclass(frozen=True)
class Judgement:
    """The judge's scores of pictures: shares and cosines. Higher is better, except for `bleeding` and `drift`."""

    similarity: dict[str, float]  # cosine of the subject's window to the training pictures, by kind of prompt
    recognised: dict[str, float]  # share in which the judge names the subject, by kind of prompt
    fidelity: float  # share of the other requested attributes that are right: ground, pattern, companion
    bleeding: float  # share of the other prompts' pictures in which the judge names the subject
    kept: float  # share of the other prompts' pictures that still show their own thing
    drift: float  # root mean square difference from the base model's pictures of these, of pixels in [0, 1]


def folder_of(name: str) -> Path:
    """Where the training pictures of a subject are."""
    return THINGS / name.replace(" ", "_")


def captions_of(name: str) -> tuple[str, ...]:
    """Captions of a subject's training pictures, in order."""
    return tuple(file.read_text(encoding="utf-8").strip() for file in sorted(folder_of(name).glob("*.txt")))


def save_subject(name: str, folder: Path) -> None:
    """Copies a subject's training pictures, each with its caption in a `.txt` file beside it."""
    shutil.copytree(folder_of(name), folder, dirs_exist_ok=True)


def read_pictures(folder: str | Path) -> Tensor:
    """The PNG files of a folder by name: `(B, 3, 64, 64)` in [-1, 1].

    Raises:
        FileNotFoundError: there are none.
    """
    from PIL import Image

    files = sorted(Path(folder).glob("*.png"))
    if not files:
        raise FileNotFoundError(f"{folder} has no PNG files.")
    return torch.stack([to_tensor(Image.open(file)) for file in files])


def windows(pictures: Tensor, requests: Sequence[Request], companions: bool = False) -> Tensor:
    """Where the subject (or its companion) of each picture should stand, enlarged: `(B, 3, 64, 64)`."""
    centers, sides = [], []
    for request in requests:
        places, side = WINDOWS[request.layout]
        place = 1 - request.place if companions and request.kind == "beside" else request.place
        centers.append(places[place])
        sides.append(side)
    return look_at(pictures, torch.tensor(centers, dtype=torch.float32), torch.tensor(sides, dtype=torch.float32))


def draw_test(pipeline: Any, per_prompt: int, seed: int = 1000, **settings: Any) -> Tensor:
    """`per_prompt` pictures of every one of `TEST_PROMPTS`, `(B, 3, 64, 64)` in [-1, 1]."""
    return draw(pipeline, [prompt for prompt in TEST_PROMPTS for _ in range(per_prompt)], seed, **settings)


@torch.no_grad()
def judge_pictures(
    judge: Judge,
    pictures: Tensor,
    base: Tensor,
    name: str,
    taught: Tensor,
    prompts: Sequence[str] = TEST_PROMPTS,
) -> Judgement:
    """Judges pictures of prompts: as many of each, one prompt after another, as `draw_test` draws them.

    Args:
        judge: the embedded one.
        pictures: of the adapted model.
        base: of the base model, from the same noise.
        name: of the subject.
        taught: the training pictures `(N, 3, 64, 64)`, the subject large on each.
        prompts: some that name the subject and some that do not; figures by kind are those of the kinds among them.
    """
    requests = [Request.read(prompt) for prompt in prompts for _ in range(len(pictures) // len(prompts))]
    concepts = judge.vocabulary.concepts
    own = concepts.index(name)
    looked = windows(pictures, requests)
    named = judge.read_windows(looked)["concept"].argmax(1)
    likeness = judge.features(looked) @ F.normalize(judge.features(taught).mean(0), dim=0)
    rows = {
        kind: [index for index, request in enumerate(requests) if request.kind == kind]
        for kind in ("ground", "small", "beside", "other")
    }
    other = rows.pop("other")
    things = torch.tensor([concepts.index(requests[index].companion) for index in other])
    return Judgement(
        similarity={kind: likeness[index].mean().item() for kind, index in rows.items() if index},
        recognised={kind: (named[index] == own).float().mean().item() for kind, index in rows.items() if index},
        fidelity=fidelity(judge, pictures, requests),
        bleeding=(named[other] == own).float().mean().item(),
        kept=(named[other] == things).float().mean().item(),
        drift=((pictures[other] - base[other]) / 2).square().mean().sqrt().item(),
    )


def fidelity(judge: Judge, pictures: Tensor, requests: Sequence[Request]) -> float:
    """Share of the grounds' colours, the patterns and the companions that are as the prompts of the subject say."""
    vocabulary = judge.vocabulary
    companions = judge.read_windows(windows(pictures, requests, companions=True))["concept"].argmax(1).tolist()
    whole = {key: logits.argmax(1).tolist() for key, logits in judge.read_whole(pictures).items()}
    right = []
    for index, request in enumerate(requests):
        if request.kind == "other":
            continue
        colors = [vocabulary.colors.index(color) for color in request.colors]
        right.append(whole["ground"][index] == colors[0])
        right.append(whole["second_ground"][index] == (colors[1] if len(colors) > 1 else len(vocabulary.colors)))
        right.append(whole["pattern"][index] == vocabulary.patterns.index(request.pattern))
        if request.companion is not None:
            right.append(companions[index] == vocabulary.concepts.index(request.companion))
    return sum(right) / len(right)
