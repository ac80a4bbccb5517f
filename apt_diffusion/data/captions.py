"""What becomes of a caption before it is trained on: words around it, and its tags in a random order.

The names follow kohya's scripts. What is random is drawn anew for every sample, from numbers of its place in training.
"""

from dataclasses import dataclass

import numpy as np

TRIGGER = "[trigger]"


@dataclass(frozen=True)
class CaptionOptions:
    """What becomes of the captions of one folder.

    Args:
        shuffle: whether the tags between separators stand in a random order.
        keep_tokens: how many of the first tags stay where they are, and are never dropped.
        separator: what stands between tags.
        tag_dropout: how often a tag is left out, from 0 to 1.
        prefix, suffix: words before and behind every caption, which always stay there.
        trigger: what `[trigger]` in captions stands for, as in ai-toolkit.
        dropout: how often a sample has no caption at all; as often as in the rest of the run if `None`.
    """

    shuffle: bool = False
    keep_tokens: int = 0
    separator: str = ","
    tag_dropout: float = 0.0
    prefix: str = ""
    suffix: str = ""
    trigger: str = ""
    dropout: float | None = None

    @property
    def varies(self) -> bool:
        """Whether samples of one picture have different captions."""
        return self.shuffle or self.tag_dropout > 0

    def whole(self, caption: str) -> str:
        """A caption between prefix and suffix."""
        text = " ".join(part for part in (self.prefix, caption, self.suffix) if part)
        return text.replace(TRIGGER, self.trigger) if self.trigger else text

    def check(self, caption: str, source: str) -> None:
        """`ValueError` where a caption has a place for a trigger word, and there is none."""
        if TRIGGER in caption and not self.trigger:
            raise ValueError(f"The caption in {source} has {TRIGGER}: say with --trigger_word what that stands for.")

    def drawn(self, caption: str, draws: np.random.Generator) -> str:
        """A caption as one sample has it, between prefix and suffix."""
        tags = [tag.strip() for tag in caption.split(self.separator)]
        tags = [tag for tag in tags if tag]
        kept, others = tags[: self.keep_tokens], tags[self.keep_tokens :]
        if self.shuffle:
            others = [others[index] for index in draws.permutation(len(others))]
        if self.tag_dropout:
            others = [tag for tag in others if draws.random() >= self.tag_dropout]
        space = "" if self.separator[-1:].isspace() else " "
        return self.whole((self.separator + space).join(kept + others))


UNCHANGED = CaptionOptions()
