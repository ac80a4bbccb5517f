"""Models that look: visual question answering (ViLT, METER) and classification (CLIP), with and without an adapter."""

import contextlib
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..api import remove_apt, set_apt_scale
from ..data.text_length import kept_and_lost
from ..io.load import load_apt_weights
from ..miniature import resolve_model
from .gates import Record, mean_map, overlay, recorded_gates, stretched
from .library import Adapter

logger = logging.getLogger(__name__)

TOP = 5
MAX_LABELS = 50
MAX_SHOTS = 50
TEXT_LIMIT = 300  # characters
EMBEDDED_CLIP = "miniature-clip"

Probabilities = dict[str, float]


@dataclass(frozen=True)
class Reading:
    """What a model says of a picture, and where the adapter acted on it."""

    without: Probabilities
    with_adapter: Probabilities | None = None
    gates: Image.Image | None = None


class Reader:
    """Loads a model when it is first asked for; serves one question at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._models: dict[tuple, tuple[nn.Module, Any]] = {}

    def ask(self, picture: Image.Image, question: str, adapter: Adapter) -> Reading:
        """Answers with their probabilities, the most probable ones. The answers are the adapter's, and so is the head
        that chooses among them; "without" is that head on the model with APT switched off.

        Raises:
            ValueError: for no question, or an adapter that does not answer questions.
        """
        question = question.strip()
        if not 1 <= len(question) <= TEXT_LIMIT:
            raise ValueError(f"Ask something about the picture, in at most {TEXT_LIMIT} characters.")
        answers = json.loads(adapter.metadata.get("answers", "[]"))
        if adapter.kind not in ("vilt", "meter") or not answers:
            raise ValueError(f"{adapter.name} was not trained to answer questions.")
        with self.lock, torch.no_grad():
            model, processor = self._question_answerer(adapter, len(answers))
            limit = processor.tokenizer.model_max_length
            for _, lost in kept_and_lost([question], processor.tokenizer, limit).values():
                raise ValueError(f"This model reads {limit} tokens; it would not see {lost!r}. Ask something shorter.")
            inputs = processor(picture, question, return_tensors="pt")
            try:
                load_apt_weights(model, adapter.load())
                with recorded_gates(model) as record, noted_patches(model) as order:
                    asked = model(**inputs).logits[0].sigmoid()
                set_apt_scale(model, 0.0)
                unadapted = model(**inputs).logits[0].sigmoid()
            finally:
                remove_apt(model)
        grid = _grid(inputs["pixel_values"], model.config)
        gates = image_map(record, adapter.kind, grid, order[0] if order else None)
        seen = overlay(_as_seen(picture, adapter.kind, inputs), stretched(gates).numpy())
        return Reading(_top(answers, unadapted), _top(answers, asked), seen)

    def classify(
        self,
        picture: Image.Image,
        labels: Sequence[str],
        shots: Sequence[tuple[Image.Image, str]] = (),
        adapter: Adapter | None = None,
    ) -> Reading:
        """Probabilities of the labels: by their names (zero-shot), or by the mean of example pictures of each.

        Raises:
            ValueError: for fewer than two labels, an example of another label, or a label without example.
        """
        check_labels(labels, [label for _, label in shots])
        if adapter is not None and adapter.kind != "clip":
            raise ValueError(f"{adapter.name} is not for CLIP.")
        with self.lock, torch.no_grad():
            base = EMBEDDED_CLIP if adapter is None else adapter.metadata.get("base_model", EMBEDDED_CLIP)
            model, processor = self._clip(base)
            without = self._class_probabilities(model, processor, picture, labels, shots)
            if adapter is None:
                return Reading(without)
            try:
                load_apt_weights(model, adapter.load())
                adapted = self._class_probabilities(model, processor, picture, labels, shots)
                pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
                with recorded_gates(model.vision_model) as record:
                    model.get_image_features(pixels)
            finally:
                remove_apt(model)
        grid = _grid(pixels, model.config.vision_config)
        seen = _as_seen(picture, "clip", {"pixel_values": pixels})
        gates = stretched(image_map(record, "clip", grid)).numpy()
        return Reading(without, adapted, overlay(seen, gates))

    @staticmethod
    def _class_probabilities(
        model: nn.Module,
        processor: Any,
        picture: Image.Image,
        labels: Sequence[str],
        shots: Sequence[tuple[Image.Image, str]],
    ) -> Probabilities:
        from ..models.clip_classifier import ClipClassifier

        classifier = ClipClassifier(model, processor.tokenizer, labels).eval()

        def features(pictures: Sequence[Image.Image]) -> Tensor:
            return classifier.image_features(processor.image_processor(pictures, return_tensors="pt")["pixel_values"])

        if shots:
            examples = features([image for image, _ in shots])
            of_label = [torch.tensor([given == label for _, given in shots]) for label in labels]
            weights = F.normalize(torch.stack([examples[chosen].mean(0) for chosen in of_label]), dim=-1)
        else:
            weights = classifier.class_weights()
        logits = model.logit_scale.exp() * features([picture]) @ weights.T
        return dict(zip(labels, logits[0].softmax(-1).tolist(), strict=True))

    def _question_answerer(self, adapter: Adapter, num_answers: int) -> tuple[nn.Module, Any]:
        base = resolve_model(adapter.metadata.get("base_model", f"miniature-{adapter.kind}"))
        key = (adapter.kind, base, num_answers)
        if key not in self._models:
            from transformers import ViltForQuestionAnswering

            from ..data.processors import load_processor
            from ..models.meter import MeterForQuestionAnswering

            model_class = {"vilt": ViltForQuestionAnswering, "meter": MeterForQuestionAnswering}[adapter.kind]
            settings = {"max_image_length": -1} if adapter.kind == "vilt" else {}
            with _said_of(base):
                model = model_class.from_pretrained(
                    base, num_labels=num_answers, ignore_mismatched_sizes=True, dtype=torch.float32, **settings
                )
                self._models[key] = (model.eval(), load_processor(adapter.kind, base))
        return self._models[key]

    def _clip(self, base: str) -> tuple[nn.Module, Any]:
        base = resolve_model(base)
        if ("clip", base) not in self._models:
            from transformers import CLIPModel

            from ..data.processors import load_processor

            with _said_of(base):
                model = CLIPModel.from_pretrained(base, dtype=torch.float32).eval()
                self._models["clip", base] = (model, load_processor("clip", base))
        return self._models["clip", base]


@contextlib.contextmanager
def _said_of(base: str) -> Iterator[None]:
    """What transformers says of a model that it cannot load, in a sentence for the page."""
    try:
        yield
    except (OSError, ValueError) as error:
        logger.error("%s cannot be loaded: %s", base, error)
        name = Path(base).name if Path(base).is_absolute() else base
        raise ValueError(
            f"The base model of this adapter, “{name}”, cannot be loaded: it is not on the server, or the hub cannot "
            "be reached. Choose another adapter, or ask whoever runs this studio."
        ) from error


def check_labels(labels: Sequence[str], given: Sequence[str]) -> None:
    """`ValueError` with a sentence where labels and examples make no sense."""
    if not 2 <= len(labels) <= MAX_LABELS or any(not 1 <= len(label) <= TEXT_LIMIT for label in labels):
        raise ValueError(f"Give from 2 to {MAX_LABELS} labels, one per line.")
    if len(set(labels)) < len(labels):
        raise ValueError("Two labels are the same: give each once.")
    if len(given) > MAX_SHOTS:
        raise ValueError(f"At most {MAX_SHOTS} example pictures can be used.")
    unknown = sorted(set(given) - set(labels))
    if unknown:
        raise ValueError(f"An example is called “{unknown[0]}”, which is none of the labels.")
    missing = [label for label in labels if given and label not in given]
    if missing:
        raise ValueError(f"There is no example of “{missing[0]}”: give at least one of each label, or none at all.")


@contextlib.contextmanager
def noted_patches(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within it a ViLT notes which patches it reads, in its order: rows and columns, `(B, patches, 2)` per call.

    ViLT shuffles the patches of every picture (`torch.multinomial`), also where it reads all of them.
    """
    order: list[Tensor] = []
    embeddings = getattr(getattr(model, "vilt", None), "embeddings", None)
    if embeddings is None:
        yield order
        return
    visual_embed = embeddings.visual_embed

    def noting(*args: Any, **kwargs: Any) -> Any:
        result = visual_embed(*args, **kwargs)
        order.append(result[2][0])
        return result

    embeddings.visual_embed = noting
    try:
        yield order
    finally:
        del embeddings.visual_embed  # the method of its class again


def image_map(record: Record, kind: str, grid: tuple[int, int], order: Tensor | None = None) -> Tensor:
    """The mean gate of the image's patches over all layers, `(h, w)` in [0, 1].

    Args:
        record: of one call with one picture.
        kind: of model.
        grid: rows and columns of patches.
        order: of the patches, where it is not row by row; see `noted_patches`.
    """
    patches = grid[0] * grid[1]
    maps = []
    for name, calls in record.items():
        if kind != "meter" or "cross_modal_image_layers" in name:
            gates = calls[0][0, -patches:]  # words and [CLS] stand before the patches
            if order is not None:
                gates = gates[(order[0, :, 0] * grid[1] + order[0, :, 1]).argsort()]
            maps.append(gates.reshape(grid))
    return mean_map(maps, grid)


def _top(answers: list[str], scores: Tensor) -> Probabilities:
    best = scores.topk(min(TOP, len(answers)))
    return {answers[place]: value for value, place in zip(*(part.tolist() for part in best), strict=True)}


def _grid(pixel_values: Tensor, config: Any) -> tuple[int, int]:
    config = getattr(config, "vision_config", config)
    return pixel_values.shape[-2] // config.patch_size, pixel_values.shape[-1] // config.patch_size


def _as_seen(picture: Image.Image, kind: str, inputs: Any) -> Image.Image:
    """The part of the picture that the patches cover: ViLT sees all of it, METER and CLIP the square in the middle."""
    height, width = inputs["pixel_values"].shape[-2:]
    if kind == "vilt":
        return picture.resize((width, height))
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((width, height))
