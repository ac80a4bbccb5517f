"""Vision-language models of the page Understand: question answering (ViLT, METER) and classification (CLIP)."""

import contextlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
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
from ..training.run_config import local_path
from .gates import Record, mean_map, overlay, recorded_gates, stretched
from .library import Adapter
from .turns import Turns, Who

logger = logging.getLogger(__name__)

TOP = 5
MAX_ANSWERS = 20_000
MAX_MODELS = 4  # in memory
MAX_LABELS = 50
MAX_SHOTS = 50
TEXT_LIMIT = 300  # characters
EMBEDDED_CLIP = "miniature-clip"
EMBEDDED = (EMBEDDED_CLIP, "miniature-vilt", "miniature-meter")
COST = 10.0  # of a question, in denoising steps
NOBODY = Who("")

Probabilities = dict[str, float]


@dataclass(frozen=True)
class Reading:
    """What a model says of a picture, and where the adapter acted on it."""

    without: Probabilities
    with_adapter: Probabilities | None = None
    gates: Image.Image | None = None


class Reader:
    """Loads a model when it is first needed; serves one question at a time.

    Args:
        turns: the queue for all models.
    """

    def __init__(self, turns: Turns | None = None) -> None:
        self.turns = Turns() if turns is None else turns  # an empty queue is false
        self._models: OrderedDict[tuple, tuple[nn.Module, Any]] = OrderedDict()  # the least recently used first

    def ask(self, picture: Image.Image, question: str, adapter: Adapter, who: Who = NOBODY) -> Reading:
        """Answers with their probabilities, the most probable ones. The answers are the adapter's, and so is the head
        that chooses among them; "without" is that head on the model with APT switched off.

        Raises:
            ValueError: for no question, or an adapter that does not answer questions.
        """
        question = question.strip()
        if not 1 <= len(question) <= TEXT_LIMIT:
            raise ValueError(f"Ask something about the picture, in at most {TEXT_LIMIT} characters.")
        answers = _answers(adapter)
        with self.turns.turn(who, COST), torch.no_grad():
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
        who: Who = NOBODY,
    ) -> Reading:
        """Probabilities of the labels: by their names (zero-shot), or by the mean of example pictures of each.

        Raises:
            ValueError: for fewer than two labels, an example of another label, or a label without example.
        """
        check_labels(labels, [label for _, label in shots])
        if adapter is not None and adapter.kind != "clip":
            raise ValueError(f"{adapter.name} is not for CLIP.")
        with self.turns.turn(who, COST), torch.no_grad():
            base = EMBEDDED_CLIP if adapter is None else _base_of(adapter, EMBEDDED_CLIP)
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

    def try_adapter(self, adapter: Adapter, who: Who = NOBODY) -> None:
        """Attaches an adapter and takes it off again; `ValueError` where it does not fit its model."""
        with self.turns.turn(who, COST):
            if adapter.kind == "clip":
                model, _ = self._clip(_base_of(adapter, EMBEDDED_CLIP))
            else:
                model, _ = self._question_answerer(adapter, len(_answers(adapter)))
            try:
                load_apt_weights(model, adapter.load())
            finally:
                remove_apt(model)

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
        base = resolve_model(_base_of(adapter, f"miniature-{adapter.kind}"))

        def load() -> nn.Module:
            from transformers import ViltForQuestionAnswering

            from ..models.meter import MeterForQuestionAnswering

            model_class = {"vilt": ViltForQuestionAnswering, "meter": MeterForQuestionAnswering}[adapter.kind]
            settings = {"max_image_length": -1} if adapter.kind == "vilt" else {}
            return model_class.from_pretrained(
                base, num_labels=num_answers, ignore_mismatched_sizes=True, dtype=torch.float32, **settings
            )

        return self._kept(adapter.kind, base, num_answers, load)

    def _clip(self, base: str) -> tuple[nn.Module, Any]:
        base = resolve_model(base)

        def load() -> nn.Module:
            from transformers import CLIPModel

            return CLIPModel.from_pretrained(base, dtype=torch.float32)

        return self._kept("clip", base, 0, load)

    def _kept(self, kind: str, base: str, num_answers: int, load: Callable[[], nn.Module]) -> tuple[nn.Module, Any]:
        """A model and its processor: from memory, where the latest ones stay."""
        from ..data.processors import load_processor

        key = (kind, base, num_answers)
        if key not in self._models:
            with _said_of(base):
                self._models[key] = (load().eval(), load_processor(kind, base))
        self._models.move_to_end(key)
        while len(self._models) > MAX_MODELS:
            self._models.popitem(last=False)
        return self._models[key]


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


def _base_of(adapter: Adapter, default: str) -> str:
    """The base model that the file names; its folder where the adapter was trained on this machine."""
    return local_path(adapter.file.parent, adapter.metadata.get("base_model", default))


def _answers(adapter: Adapter) -> list[str]:
    try:
        answers = json.loads(adapter.metadata.get("answers", "[]"))
    except ValueError:
        answers = []
    is_list = isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
    if adapter.kind not in ("vilt", "meter") or not is_list or not 1 <= len(answers) <= MAX_ANSWERS:
        raise ValueError(f"{adapter.name} was not trained to answer questions.")
    return answers


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
    """Context manager: records which patches a ViLT reads, in its order: rows and columns, `(B, patches, 2)` per call.

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
