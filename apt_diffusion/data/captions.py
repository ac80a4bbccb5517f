"""What becomes of a caption before it is trained on: words around it, choices in it, and its tags in a random order.

The names and rules follow kohya's scripts. What is random is drawn anew for every sample, from numbers of its place in
training.
"""

import re
from collections.abc import Callable
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
        wildcards: whether `{red|green}` is one of them, and of several lines one; `{{` and `}}` are braces.
        keep_separator: tags before it, and behind a second one, stay where they are; in place of `keep_tokens`.
        inner_separator: between tags that belong together: they are moved and dropped as one.
    """

    shuffle: bool = False
    keep_tokens: int = 0
    separator: str = ","
    tag_dropout: float = 0.0
    prefix: str = ""
    suffix: str = ""
    trigger: str = ""
    dropout: float | None = None
    wildcards: bool = False
    keep_separator: str = ""
    inner_separator: str = ""

    @property
    def varies(self) -> bool:
        """Whether samples of one picture may have different captions."""
        return self.shuffle or self.tag_dropout > 0 or self.wildcards

    def whole(self, caption: str) -> str:
        """A caption between prefix and suffix without what is random: of choices the first, tags in their order."""
        return self._finished(self._chosen(caption, None), None)

    def drawn(self, caption: str, draws: np.random.Generator) -> str:
        """A caption as one sample has it, between prefix and suffix."""
        return self._finished(self._chosen(caption, draws), draws)

    def longest(self, caption: str) -> list[str]:
        """Texts that samples may have, between prefix and suffix: of each line the one with the longest choices."""
        if not self.wildcards:
            return [self.whole(caption)]
        chosen = [_resolved(line, lambda choices: max(choices, key=len)) for line in _lines(caption)]
        return [self._finished(line, None) for line in chosen] or [self.whole(caption)]

    def check(self, caption: str, source: str, of_class: bool = False) -> None:
        """`ValueError` where a caption has a place for a trigger word, and there is none.

        Args:
            caption: as it is written.
            source: where.
            of_class: whether its picture shows the class, which has no trigger word.
        """
        if TRIGGER in caption and not self.trigger:
            remedy = "say with --trigger_word what that stands for"
            if of_class:
                remedy = "it is of the class, which the trigger word does not stand for, so take that out"
            raise ValueError(f"The caption in {source} has {TRIGGER}: {remedy}.")

    def _chosen(self, caption: str, draws: np.random.Generator | None) -> str:
        """The caption with one of the alternatives at each place."""
        if not self.wildcards:
            return caption

        def one_of(values: list[str]) -> str:
            return values[0 if draws is None or len(values) == 1 else int(draws.integers(len(values)))]

        lines = _lines(caption)
        return _resolved(one_of(lines), one_of) if lines else ""

    def _finished(self, caption: str, draws: np.random.Generator | None) -> str:
        is_changed = draws is not None and (self.shuffle or self.tag_dropout > 0)
        if is_changed or (self.keep_separator and self.keep_separator in caption):
            first, others, last = self._parts(caption)
            if draws is not None and self.shuffle:
                others = [others[index] for index in draws.permutation(len(others))]
            if draws is not None and self.tag_dropout:
                others = [tag for tag in others if draws.random() >= self.tag_dropout]
            caption = self._joined([*first, *others, *last])
        if self.inner_separator:
            caption = self._joined([part.strip() for part in caption.split(self.inner_separator)])
        text = " ".join(part for part in (self.prefix, caption, self.suffix) if part)
        return text.replace(TRIGGER, self.trigger) if self.trigger else text

    def _parts(self, caption: str) -> tuple[list[str], list[str], list[str]]:
        """Tags that stay in front, those that move, and those that stay behind."""
        if self.keep_separator and self.keep_separator in caption:
            first, others, *last = caption.split(self.keep_separator, 2)
            return self._tags(first), self._tags(others), self._tags(last[0] if last else "")
        tags = self._tags(caption)
        return tags[: self.keep_tokens], tags[self.keep_tokens :], []

    def _tags(self, text: str) -> list[str]:
        return [tag.strip() for tag in text.split(self.separator) if tag.strip()]

    def _joined(self, tags: list[str]) -> str:
        space = "" if self.separator[-1:].isspace() else " "
        return (self.separator + space).join(tags)


def _lines(caption: str) -> list[str]:
    return [line for line in caption.split("\n") if line.strip()]


def _resolved(line: str, choose: Callable[[list[str]], str]) -> str:
    """A line with one choice for each `{red|green}`."""

    def replaced(match: re.Match[str]) -> str:
        return choose(match[1].split("|")) if match[1] is not None else match[0][0]

    return re.sub(r"\{\{|\}\}|\{([^{}]*)\}", replaced, line)


UNCHANGED = CaptionOptions()
