"""Examples of a text about one or more pictures, in the order of training, as batches of model inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augmentation import rand_augment
from .order import Purpose, entry_at, random_at
from .sources import PictureSource, name_of, read_source

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Example:
    """A text, its pictures, and the target that a task has for them."""

    text: str
    pictures: tuple[PictureSource, ...]
    target: Any


class TrainingStream(Dataset):
    """Examples by position in the endless stream of training, each with its own random numbers.

    Args:
        examples: those of one epoch.
        seed: the run's.
        augment: whether pictures are changed at random.
    """

    def __init__(self, examples: Sequence[Example], seed: int, augment: bool) -> None:
        self.examples = examples
        self.seed = seed
        self.augment = augment

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> tuple[Example, np.random.Generator | None]:
        return self._at(position), random_at(self.seed, position, Purpose.SAMPLE) if self.augment else None

    def describe(self, position: int) -> str:
        """The text and the pictures of an example, for errors."""
        example = self._at(position)
        return f"{example.text!r} ({', '.join(map(name_of, example.pictures))})"

    def _at(self, position: int) -> Example:
        return self.examples[entry_at(self.seed, position, len(self.examples))]


def unchanged(examples: Sequence[Example]) -> list[tuple[Example, None]]:
    """Examples as `ModelInputs` takes them, their pictures as they are."""
    return [(example, None) for example in examples]


class ModelInputs:
    """Collates examples to what ViLT and METER take; a bound of the text's length is all that it decides.

    Args:
        processor: of `load_processor`.
        max_text_length: tokens; longer texts are cut.
        labels: targets of a batch to the model's `labels`.
        cache: METER's `EncoderCache`: pictures are then not even opened.
    """

    def __init__(
        self, processor: Any, max_text_length: int, labels: Callable[[list[Any]], Tensor], cache: Any = None
    ) -> None:
        self.processor = processor
        self.max_text_length = max_text_length
        self.labels = labels
        self.cache = cache
        self.names = set(processor.tokenizer.model_input_names) | {"pixel_values"}
        if type(processor).__name__ == "ViltProcessor":
            self.names.add("pixel_mask")
        else:
            self.names.discard("token_type_ids")

    def __call__(self, samples: Sequence[tuple[Example, np.random.Generator | None]]) -> Batch:
        """`input_ids`, `attention_mask` (B, T), `pixel_values` (B, 3, H, W), or with K pictures each (B, K, 3, H, W).

        With a cache `text_embeds` (B, T, d) and `image_embeds` (B, I, d), or (B, K, I, d), are in their place.
        """
        examples = [example for example, _ in samples]
        pictures = [(source, draws) for example, draws in samples for source in example.pictures]
        inputs = self.texts([example.text for example in examples]) | self.pictures(pictures)
        count = len(examples[0].pictures)
        for name in ("pixel_values", "pixel_mask", "image_embeds"):
            if count > 1 and name in inputs:
                inputs[name] = inputs[name].unflatten(0, (-1, count))
        return inputs | {"labels": self.labels([example.target for example in examples])}

    def texts(self, texts: Sequence[str]) -> Batch:
        """The inputs that texts give, padded to the longest of them."""
        words = self.words(texts)
        inputs = {name: words[name] for name in words if name in self.names}
        if self.cache is not None:
            inputs["text_embeds"] = self.cache.text_embeds(inputs.pop("input_ids"), inputs["attention_mask"])
        return inputs

    def pictures(self, pictures: Sequence[tuple[PictureSource, np.random.Generator | None]]) -> Batch:
        """The inputs that pictures give, each augmented with its own random numbers.

        Raises:
            ValueError: for a picture that cannot be read, or that the model's processor cannot bring to its size.
        """
        if self.cache is not None:
            return {"image_embeds": self.cache.image_embeds([source for source, _ in pictures])}
        images = [self._read(source, draws) for source, draws in pictures]
        try:
            pixels = self.processor.image_processor(images, return_tensors="pt")
        except Exception as error:  # numpy, PIL and transformers fail with classes of their own
            self._name_culprit([source for source, _ in pictures], images)
            raise ValueError(f"{', '.join(name_of(source) for source, _ in pictures)}: {error}") from error
        return {name: pixels[name] for name in pixels if name in self.names}

    def _name_culprit(self, sources: Sequence[PictureSource], images: Sequence[Any]) -> None:
        """`ValueError` with the name of the first picture that the processor refuses alone."""
        for source, image in zip(sources, images, strict=True):
            try:
                self.processor.image_processor([image], return_tensors="pt")
            except Exception as error:
                width, height = image.size
                raise ValueError(
                    f"{name_of(source)} of {width} x {height} pixels cannot be brought to the model's size ({error}): "
                    "cut it to a less extreme shape, or take it out."
                ) from error

    def words(self, texts: Sequence[str]) -> Batch:
        """Token ids and masks, padded to the longest of these texts."""
        return dict(
            self.processor.tokenizer(
                list(texts), padding=True, truncation=True, max_length=self.max_text_length, return_tensors="pt"
            )
        )

    def _read(self, source: PictureSource, draws: np.random.Generator | None) -> Any:
        image = read_source(source)
        return image if draws is None else rand_augment(image, draws)


def class_labels(targets: list[int]) -> Tensor:
    """Classes `(B,)` of a batch."""
    return torch.tensor(targets)
