"""What the page Train shows of pictures and of a training, as HTML."""

import re

from PIL import Image

from ..charts import escape, problem, progress
from ..figures import Figure, data_address, of_image
from ..framing import Seen
from ..training import Status
from ..words import duration

SAMPLE_TITLE = "Samples during the training, the newest first"
SAMPLE_SIDE = 1024  # pixels of the long side
FRAME_HELP = (
    '<p class="apt-note">The trainer sees what is inside the frames. Move one to choose for yourself; else long '
    "pictures are cut elsewhere in later steps.</p>"
)


def words_help(prompt: str) -> str:
    """What the two words of a subject's prompt mean, for who has never seen such a prompt."""
    words = prompt.removeprefix("a ")
    kind = words.split()[-1]
    return (
        f'<details class="apt-note"><summary>What does “{escape(words)}” mean?</summary><p>“sks” is a made-up word. '
        "The model knows nothing of it, so the training can give it a meaning: your subject. "
        f"“{escape(kind)}” says what kind of thing it is, in a word that the model knows. For photos of your dog, "
        "write “a sks dog”; afterwards “a sks dog on a beach” draws your dog on a beach.</p></details>"
    )


def frames_html(seen: list[Seen], size: int) -> str:
    """Whole pictures, each with the frame that is trained on; frames of long pictures can be moved."""
    items = []
    for number, one in enumerate(seen, start=1):
        width, height = one.whole.size
        side, style = min(width, height), ""
        if one.place is not None:
            along = "left" if width > height else "top"
            share = (1 - side / max(width, height)) * 100
            style = f"{along}:calc({share:.3f}% * var(--place))"
        box = f"width:{100 * side / width:.3f}%;height:{100 * side / height:.3f}%;{style}"
        frame = f'<span class="apt-frame" style="{box}"></span>'
        mover = ""
        if one.place is not None:
            mover = (
                f'<input type="range" min="0" max="1" step="0.01" value="{one.place:.4f}" data-frame="{number - 1}" '
                f'aria-label="Frame of picture {number}">'
            )
        picture = f'<img src="{escape(data_address(one.whole))}" alt="Picture {number}">'
        square = escape(data_address(one.square, lossless=size <= 64))
        items.append(
            f'<figure style="--place:{one.place or 0}"><span class="apt-whole">{picture}{frame}</span>{mover}'
            f'<figcaption><img class="apt-square apt-pixels" src="{square}" alt="Picture {number} as the trainer sees '
            f'it at first"> picture {number}</figcaption></figure>'
        )
    return (
        f'<section class="apt-figures apt-frames" data-count="{len(seen)}"><h3>Your pictures, and what the trainer '
        f"sees of them</h3><div>{''.join(items)}</div></section>"
    )


def sample_figures(status: Status) -> list[Figure]:
    """What the model has drawn in the course of a training."""
    figures = []
    for path in reversed(status.samples):
        step = int(re.sub(r"\D", "", path.stem) or 0)
        with Image.open(path) as picture:
            picture.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
            figures.append(of_image(picture, f"samples after step {step}", f"after step {step}", lossless=True))
    return figures


def status_html(status: Status) -> str:
    """How a training is, in a sentence with a bar."""
    lesson = status.lesson
    share = status.step / lesson.steps
    match status.state:
        case "starting":
            return progress(status.stage, share if status.share is None else status.share)
        case "running" if status.step >= lesson.steps:
            return progress("Saving, and drawing the last samples …", share)
        case "running":
            left = "" if status.seconds_left is None else f", {duration(status.seconds_left)} left"
            return progress(f"Step {status.step} of {lesson.steps}{left}", share)
        case "stopping":
            return progress("Stopping after this step …", share)
        case "stopped":
            kept = f"The adapter of step {status.step} is kept" if status.step else "Nothing was learnt yet"
            return progress(f"Stopped. {kept}; “Continue” goes on from there.", share)
        case "finished":
            return progress(f"Finished: {status.name} can be used on the page Generate.", 1)
    return problem(f"The training failed: {status.problem}")
