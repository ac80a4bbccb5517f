"""Classification by any `CLIPModel`: classes are texts, `logits = exp(logit_scale) · cos(picture, text)`.

With APT in both towers the texts of all classes are encoded in every training step, in chunks; at inference they are
encoded once, because they do not depend on the picture. Axes: B pictures, C classes, T templates, d width of the joint
space.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..data.classification_sets import PLAIN_TEMPLATE, describe
from ..data.text_length import kept_and_lost, warn_of_cut_texts
from ..memo import ModuleCache

logger = logging.getLogger(__name__)


class ClipClassifier(nn.Module):
    """Pixels to logits over class names.

    Args:
        model: a transformers `CLIPModel`, with or without APT, LoRA or another method.
        tokenizer: its tokenizer.
        class_names: in the order of the labels; underscores are read as spaces.
        template: the text of a class, with `{}` for its name; or several, whose features are averaged (CLIP's prompt
            ensembles).
        text_batch_size: texts that are encoded together. While training, only their features are kept for the
            backward pass, which encodes them again: memory is that of one part, however many classes there are.
    """

    template: str | Sequence[str]

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        class_names: Sequence[str],
        template: str | Sequence[str] = PLAIN_TEMPLATE,
        text_batch_size: int = 64,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.text_batch_size = text_batch_size
        self.cache = ModuleCache()
        self._checked: set[int] = set()  # texts whose lengths are known, so that each warning comes once
        self.set_classes(class_names, template)

    def set_classes(self, class_names: Sequence[str], template: str | Sequence[str] | None = None) -> None:
        """Other classes, and perhaps another template, from now on.

        Two classes may have the same name (CoOp's ImageNet has two such pairs): their texts cannot tell them apart.

        Raises:
            ValueError: for no class, a template without a place for the name, or two names that read the same because
                the model does not read their ends.
        """
        given = self.template if template is None else template
        names = list(class_names)
        templates = [given] if isinstance(given, str) else list(given)
        if not names or not templates:
            raise ValueError(f"At least one {'template is needed' if names else 'class name is needed, got none'}.")
        texts = [describe(name, one) for name in names for one in templates]
        if hash(tuple(texts)) not in self._checked:
            self._check(names, texts)
            self._checked.add(hash(tuple(texts)))
        self.class_names, self.texts = names, texts
        self.template = given

    def _check(self, names: list[str], texts: list[str]) -> None:
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            logger.warning("Classes with the same name cannot be told apart by their texts: %s.", repeated)
        if not kept_and_lost(texts, self.tokenizer, self.max_text_length):
            return
        names_of: dict[tuple[int, ...], set[str]] = defaultdict(set)  # by the token ids that the model reads
        read = self.tokenizer(texts, truncation=True, max_length=self.max_text_length)["input_ids"]
        for place, ids in enumerate(read):
            names_of[tuple(ids)].add(names[place * len(names) // len(texts)])
        same = next((sorted(found) for found in names_of.values() if len(found) > 1), None)
        if same is not None:
            raise ValueError(
                f"The classes {same} become the same class: only {self.max_text_length} tokens of a text are read, "
                "and theirs differ behind that. Shorten the names."
            )
        warn_of_cut_texts([(repr(text), text) for text in texts], self.tokenizer, self.max_text_length)

    @property
    def max_text_length(self) -> int:
        """Tokens of a text that are read, with start and end."""
        return min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)

    def text_features(self) -> Tensor:
        """Text features of all classes, of length 1, `(C, d)`; cached until a value that they depend on changes."""
        towers = [self.model.text_model, self.model.text_projection]
        learning = torch.is_grad_enabled() and any(p.requires_grad for tower in towers for p in tower.parameters())
        if learning or self.model.text_model.training:
            return self._encode_texts()
        return self.cache.get(towers, tuple(self.texts), self._encode_texts_once)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """`(B, 3, H, W)` to `(B, d)`, length 1; for another size than the model's own, positions are interpolated."""
        other_size = tuple(pixel_values.shape[-2:]) != (self.model.config.vision_config.image_size,) * 2
        output = self.model.get_image_features(pixel_values, interpolate_pos_encoding=other_size)
        return F.normalize(output.pooler_output, dim=-1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits `(B, C)`."""
        return self.model.logit_scale.exp() * self.image_features(pixel_values) @ self.class_weights().T

    def class_weights(self) -> Tensor:
        """Vectors that pictures are compared with, `(C, d)`, length 1.

        They are the text features; for the classes that a linear classifier was made for, its weights.
        """
        head = getattr(self.model, "classifier", None)
        if head is not None and self.class_names == head.class_names:
            return F.normalize(head.weight, dim=-1)
        return self.text_features()

    def _encode_texts(self) -> Tensor:
        different = list(dict.fromkeys(self.texts))
        tokens = self.tokenizer(
            different, padding=True, truncation=True, max_length=self.max_text_length, return_tensors="pt"
        )
        ids = tokens["input_ids"].to(self.model.logit_scale.device)
        parts = ids.split(self.text_batch_size)
        if len(parts) == 1 or not torch.is_grad_enabled():
            features = torch.cat([self._encode_part(part) for part in parts])
        else:
            features = torch.cat([checkpoint(self._encode_part, part, use_reentrant=False) for part in parts])
        if len(different) < len(self.texts):  # classes with the same name get the same features, to the last bit
            row = {text: number for number, text in enumerate(different)}
            features = features[[row[text] for text in self.texts]]
        if len(self.texts) == len(self.class_names):
            return features
        return F.normalize(features.unflatten(0, (len(self.class_names), -1)).mean(1), dim=-1)  # (C, T, d) -> (C, d)

    def _encode_part(self, ids: Tensor) -> Tensor:
        # No mask: attention is causal, and the feature is that of the first end-of-text token, so padding behind it
        # is never read.
        return F.normalize(self.model.get_text_features(ids).pooler_output, dim=-1)

    def _encode_texts_once(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # usable in any mode later
            return self._encode_texts()


class LinearClassifier(nn.Module):
    """One weight vector per class, compared with pictures as texts are. The baseline "classifier only" of CLIP."""

    def __init__(self, class_names: Sequence[str], features: Tensor) -> None:
        super().__init__()
        self.class_names = list(class_names)
        self.weight = nn.Parameter(features.detach().clone())


def add_linear_classifier(classifier: ClipClassifier) -> LinearClassifier:
    """Makes `model.classifier` for the present classes; it begins as their text features: as zero-shot."""
    with torch.no_grad():
        features = classifier.text_features()
    classifier.model.classifier = LinearClassifier(classifier.class_names, features)
    return classifier.model.classifier
