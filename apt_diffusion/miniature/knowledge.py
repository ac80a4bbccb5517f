"""Evaluates what the miniature CLIP, ViLT and METER know, on fixed test items that their own processors encode.

`python tools/pretrain_miniature_vl.py --model MODEL --grade` prints them; docs/miniature.md has those of the shipped
weights. Nothing here trains a network: the probes are ridge regressions on frozen features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .pictures import to_images
from .tasks.captions import describe
from .tasks.classes import CLASSES, NUM_BASE, class_name, draw_classes
from .tasks.draw import drawn_chunks, split_seed
from .tasks.picture import read_picture
from .tasks.questions import KINDS, questions_of
from .tasks.similar import GROUP, similar_scenes
from .world import COLORS, HELD_OUT_COLOR, SHAPES, Scenes, render

TEMPLATE = "a photo of a {}."


def load(model_type: str, folder: str | Path) -> tuple[nn.Module, Any]:
    """Model (in fp32; with an ITM head for ViLT and METER) and processor."""
    from transformers import CLIPModel, ViltForImageAndTextRetrieval

    from ..data.processors import load_processor
    from ..models.meter import MeterForImageAndTextRetrieval

    classes = {"clip": CLIPModel, "vilt": ViltForImageAndTextRetrieval, "meter": MeterForImageAndTextRetrieval}
    model = classes[model_type].from_pretrained(folder, dtype=torch.float32)
    return model.eval(), load_processor(model_type, folder)


# CLIP


@torch.no_grad()
def image_features(model: nn.Module, processor: Any, images: Sequence[Image.Image]) -> Tensor:
    """`(N, d)`, unit length."""
    pixels = processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
    return nn.functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


@torch.no_grad()
def class_features(model: nn.Module, processor: Any, names: Sequence[str]) -> Tensor:
    """`(C, d)`, unit length."""
    tokens = processor.tokenizer([TEMPLATE.format(name) for name in names], padding=True, return_tensors="pt")
    return nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)


def classification_items(split: str, count: int) -> tuple[list[Image.Image], Tensor]:
    """The first `count` of the classification task's split, before any compression."""
    generator = torch.Generator().manual_seed(split_seed("classification", split, 0))
    labels = torch.arange(count) % len(CLASSES)
    return to_images(draw_classes(labels, generator)), labels


def pair_scenes(count: int, held_out: bool, seed: int = 0) -> tuple[list[Image.Image], Tensor]:
    """Single large things on plain backgrounds, `(images, shape * 10 + colour)`, shown in pre-training or held out."""
    generator = torch.Generator().manual_seed(seed)
    every = torch.arange(len(SHAPES) * len(COLORS))
    shown = HELD_OUT_COLOR[every // len(COLORS)] != every % len(COLORS)
    pairs = every[~shown if held_out else shown]
    label = pairs[torch.arange(count) % len(pairs)]
    shape, color = label // len(COLORS), label % len(COLORS)
    ground = (color + 1 + torch.randint(len(COLORS) - 1, (count,), generator=generator)) % len(COLORS)
    scenes = Scenes(torch.ones_like(label), shape[:, None].repeat(1, 2), color[:, None].repeat(1, 2), label * 0,
                    ground[:, None].repeat(1, 2))  # fmt: skip
    return to_images(render(scenes, generator)), label


def clip_grades(model: nn.Module, processor: Any, count: int = 480) -> dict[str, float]:
    """Zero-shot accuracies, and 16-shot ridge regression on image features for the textured classes."""
    images, labels = classification_items("test", count)
    features = image_features(model, processor, images)
    texts = class_features(model, processor, [class_name(label) for label in range(len(CLASSES))])
    grades = {}
    for name, first, last in (("base", 0, NUM_BASE), ("new", NUM_BASE, len(CLASSES)), ("all", 0, len(CLASSES))):
        chosen = (labels >= first) & (labels < last)
        guesses = (features[chosen] @ texts[first:last].T).argmax(1) + first
        grades[f"zero-shot, {name} classes"] = (guesses == labels[chosen]).float().mean().item()
    shots, shot_labels = classification_items("train", 16 * len(CLASSES))
    probed = ridge(image_features(model, processor, shots), shot_labels, features, len(CLASSES))
    grades["16-shot ridge regression, all classes"] = (probed == labels).float().mean().item()
    names = [f"{COLORS[pair % len(COLORS)]} {SHAPES[pair // len(COLORS)]}" for pair in range(90)]
    texts = class_features(model, processor, names)
    for held_out in (False, True):
        images, labels = pair_scenes(count, held_out)
        guesses = (image_features(model, processor, images) @ texts.T).argmax(1)
        kind = "held out" if held_out else "shown"
        grades[f"zero-shot, 90 colour-shape pairs, those {kind}"] = (guesses == labels).float().mean().item()
    return grades


def ridge(features: Tensor, labels: Tensor, tested: Tensor, classes: int, penalty: float = 1e-2) -> Tensor:
    """Labels of `tested` by least squares to one-hot labels on centred features; `penalty` is relative."""
    mean = features.mean(0)
    x = (features - mean).double()
    gram = x.T @ x
    gram += penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    targets = nn.functional.one_hot(labels, classes).double()
    weights = torch.linalg.solve(gram, x.T @ (targets - targets.mean(0)))
    return ((tested - mean).double() @ weights + targets.mean(0)).argmax(1)


# ViLT and METER


@dataclass
class MatchingItems:
    """Texts about pictures: the first half fit, the second half do not; they differ from one that fits in one part."""

    images: list[Image.Image]
    texts: list[str]
    fits: Tensor  # (N,)


def matching_items(count: int, seed: int = 1) -> MatchingItems:
    """`count` texts with a picture that they fit, and the same with a similar one that they do not."""
    generator = torch.Generator().manual_seed(seed)
    rng = Random(seed)
    scenes = similar_scenes(GROUP * count * 2, generator)
    drawn = to_images(render(scenes, generator))
    pictures = [read_picture(scenes, index) for index in range(len(scenes))]
    right: list[Image.Image] = []
    wrong: list[Image.Image] = []
    texts: list[str] = []
    for start in range(0, len(pictures), GROUP):
        text, claim = describe(pictures[start], rng)
        misfits = [start + member for member in range(1, GROUP) if not claim.holds(pictures[start + member])]
        if misfits and len(texts) < count:
            right.append(drawn[start])
            wrong.append(drawn[misfits[0]])
            texts.append(text)
    fits = torch.arange(2 * len(texts)) < len(texts)
    return MatchingItems(right + wrong, texts * 2, fits)


@torch.no_grad()
def outputs_of(model: nn.Module, processor: Any, images: Sequence, texts: Sequence[str], batch_size: int = 64) -> Any:
    """`(pooled (N, d'), text states (N, T, d), token ids (N, T))` of the model below the heads."""
    from transformers import BatchFeature

    batch: BatchFeature = processor(images=list(images), text=list(texts), padding=True, return_tensors="pt")
    pooled, states = [], []
    for start in range(0, len(batch["input_ids"]), batch_size):
        outputs = model.base_model(**{name: values[start : start + batch_size] for name, values in batch.items()})
        pooled.append(outputs.pooler_output)
        states.append(outputs.last_hidden_state[:, : batch["input_ids"].shape[1]])
    return torch.cat(pooled), torch.cat(states), batch["input_ids"]


def matching_accuracy(model: nn.Module, processor: Any, items: MatchingItems) -> float:
    """Share of pairs on the right side of 0."""
    pooled, _, _ = outputs_of(model, processor, items.images, items.texts)
    return ((model.rank_output(pooled)[:, 0] > 0) == items.fits).float().mean().item()


def masked_word_accuracy(model: nn.Module, word_head: nn.Module, processor: Any, items: MatchingItems) -> float:
    """Share of colours and shapes that are guessed right where one word of a fitting text is masked."""
    tokenizer = processor.tokenizer
    rng = Random(0)
    images, texts, hidden = [], [], []
    for image, text, fits in zip(items.images, items.texts, items.fits.tolist(), strict=True):
        words = text.split()
        places = [index for index, word in enumerate(words) if word in COLORS or word in SHAPES]
        if fits and places:
            place = rng.choice(places)
            hidden.append(words[place])
            texts.append(" ".join([*words[:place], tokenizer.mask_token, *words[place + 1 :]]))
            images.append(image)
    _, states, ids = outputs_of(model, processor, images, texts)
    with torch.no_grad():
        guesses = word_head(states[ids == tokenizer.mask_token_id], model.base_model.get_input_embeddings()).argmax(-1)
    wanted = torch.tensor([tokenizer(f"a {word}").input_ids[2] for word in hidden])
    return (guesses == wanted).float().mean().item()


def matching_grades(model: nn.Module, word_head: nn.Module, processor: Any, count: int = 300) -> dict[str, float]:
    """Matching, masked words, and linear probes of frozen features on questions that pre-training never used."""
    items = matching_items(count)
    return {
        "matching": matching_accuracy(model, processor, items),
        "masked colours and shapes": masked_word_accuracy(model, word_head, processor, items),
        **question_probe(model, processor),
    }


def question_probe(model: nn.Module, processor: Any, train: int = 400, test: int = 200) -> dict[str, float]:
    """Accuracy per kind of question of a ridge regression on the pooled state; `train` and `test` count pictures."""
    sets = []
    for split, count in (("train", train), ("val", test)):
        images, asked = [], []
        for pictures, drawn, rng in drawn_chunks("vqa", split, count, 0):
            for picture, image in zip(pictures, drawn, strict=True):
                for question in questions_of(picture, rng):
                    images.append(image)
                    asked.append(question)
        sets.append((outputs_of(model, processor, images, [question.text for question in asked])[0], asked))
    (known, train_questions), (tested, test_questions) = sets
    answers = sorted({question.answer for question in train_questions})
    labels = torch.tensor([answers.index(question.answer) for question in train_questions])
    guesses = [answers[index] for index in ridge(known, labels, tested, len(answers)).tolist()]
    right = [guess == question.answer for guess, question in zip(guesses, test_questions, strict=True)]
    kinds = {kind: [r for r, q in zip(right, test_questions, strict=True) if q.kind == kind] for kind in KINDS}
    grades = {f"questions by ridge regression, {kind}": sum(values) / len(values) for kind, values in kinds.items()}
    return {"questions by ridge regression, all": sum(right) / len(right), **grades}
