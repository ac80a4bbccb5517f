"""What the studio knows of the embedded Stable Diffusions: prompts to try, things to teach, how to draw."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..miniature import subjects as shapes
from ..miniature.emoji import subjects as emoji


@dataclass(frozen=True)
class Embedded:
    """See the module.

    Args:
        title: what pages call the model.
        prompts: to try; the first stands in the field.
        subjects: things it does not know, with the captions of their training pictures.
        save: writes the training pictures of a subject to a folder.
        instance_prompt: what stands for a subject.
        class_prompt: its kind.
        train_steps, learning_rate: that teach a subject well.
    """

    title: str
    prompts: tuple[str, ...]
    subjects: dict[str, tuple[str, ...]]
    save: Callable[[str, Path], None]
    instance_prompt: str
    class_prompt: str
    train_steps: int
    learning_rate: float
    steps: int = 15
    guidance_scale: float = 3.0
    num_images: int = 4


def save_shape(name: str, folder: Path) -> None:
    """Pictures of a subject of the drawn world."""
    shapes.save_subject(shapes.SUBJECTS[name], folder)


EMBEDDED = {
    "miniature": Embedded(
        title="the embedded miniature model",
        prompts=(
            "a sks glyph on a red background",
            "a large green star on a striped purple and white background",
            "a small cyan heart on a black background",
            "a red circle left of a yellow square on a blue background",
        ),
        subjects={
            name: tuple(shapes.prompt_on(ground) for ground in subject.grounds)
            for name, subject in shapes.SUBJECTS.items()
        },
        save=save_shape,
        instance_prompt=shapes.PROMPT,
        class_prompt="a glyph",
        train_steps=400,
        learning_rate=3e-3,
    ),
    "miniature-emoji": Embedded(
        title="the embedded model of emoji",
        prompts=(
            "a large sks toy on a pink background",
            "a large noto fox on a striped green background",
            "a fluent rocket left of a twemoji pizza on a blue background",
            "a small fluent cupcake on a checkered pink and white background",
        ),
        subjects={name: emoji.captions_of(name) for name in emoji.SUBJECTS},
        save=emoji.save_subject,
        instance_prompt=emoji.PROMPT,
        class_prompt="a thing",
        train_steps=150,  # with more, large pictures are sharper, small ones and those with two things worse
        learning_rate=1.5e-3,
    ),
}
EMBEDDED["miniature-sd3"] = replace(
    EMBEDDED["miniature"], title="the embedded miniature Stable Diffusion 3", prompts=EMBEDDED["miniature"].prompts[1:]
)
