"""Classification by any `CLIPModel`: classes are texts, `logits = exp(logit_scale) · cos(picture, text)`.

With APT in both towers the texts of all classes are encoded in every training step, a part at a time; at inference
they do not depend on the picture, and are encoded once. Axes: B pictures, C classes, d width of the joint space.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..data.classification_sets import PLAIN_TEMPLATE, describe
from ..memo import ModuleCache


class ClipClassifier(nn.Module):
    """Pixels to logits over class names.

    Args:
        model: a transformers `CLIPModel`, with or without APT, LoRA or another method.
        tokenizer: its tokenizer.
        class_names: in the order of the labels; underscores are read as spaces.
        template: the text of a class, with `{}` for its name.
        text_batch_size: classes that are encoded together. While training, only their features are kept for the
            backward pass, which encodes them again: memory is that of one part, however many classes there are.
    """

    template: str

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        class_names: Sequence[str],
        template: str = PLAIN_TEMPLATE,
        text_batch_size: int = 64,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.text_batch_size = text_batch_size
        self.cache = ModuleCache()
        self.set_classes(class_names, template)

    def set_classes(self, class_names: Sequence[str], template: str | None = None) -> None:
        """Other classes, and perhaps another template, from now on.

        Raises:
            ValueError: for no class, one that is there twice, or a template without a place for the name.
        """
        template = self.template if template is None else template
        names = list(class_names)
        repeated = sorted({name for name in names if names.count(name) > 1})
        if not names or repeated:
            raise ValueError(f"Class names are needed, each once; got {f'{repeated} twice' if names else 'none'}.")
        if "{}" not in template:
            raise ValueError(f"The template {template!r} has no {{}} for the name of the class.")
        self.class_names, self.template = names, template
        self.texts = [describe(name, template) for name in names]

    def text_features(self) -> Tensor:
        """Of all classes, length 1, `(C, d)`; kept while nothing that they depend on changes, see `ModuleCache`."""
        towers = [self.model.text_model, self.model.text_projection]
        learning = torch.is_grad_enabled() and any(p.requires_grad for tower in towers for p in tower.parameters())
        if learning or self.model.text_model.training:
            return self._encode_texts()
        return self.cache.get(towers, tuple(self.texts), self._encode_texts_once)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """`(B, 3, H, W)` to `(B, d)`, length 1."""
        return F.normalize(self.model.get_image_features(pixel_values).pooler_output, dim=-1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits `(B, C)`."""
        return self.model.logit_scale.exp() * self.image_features(pixel_values) @ self.class_weights().T

    def class_weights(self) -> Tensor:
        """What pictures are compared with, `(C, d)`, length 1: the texts, or for the classes that it was made for the
        linear classifier."""
        head = getattr(self.model, "classifier", None)
        if head is not None and self.class_names == head.class_names:
            return F.normalize(head.weight, dim=-1)
        return self.text_features()

    def _encode_texts(self) -> Tensor:
        tokens = self.tokenizer(self.texts, padding=True, truncation=True, return_tensors="pt")
        ids = tokens["input_ids"].to(self.model.logit_scale.device)
        parts = ids.split(self.text_batch_size)
        if len(parts) == 1 or not torch.is_grad_enabled():
            return torch.cat([self._encode_part(part) for part in parts])
        return torch.cat([checkpoint(self._encode_part, part, use_reentrant=False) for part in parts])

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
