"""Image-text retrieval by a model that reads picture and text together: objective, scoring, recall.

A score needs a whole pass per pair. The parts that depend on one side only are computed once: METER's encoders, and
ViLT's embedding of patches. Axes: I pictures, C captions, B pairs.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..io.files import resolve_adapter_file

MATCHING_HEAD_NAME = "matching_head.safetensors"  # written by the conversion of official checkpoints
Batch = dict[str, Tensor]
RANKS = (1, 5, 10)


def encode_images(model: nn.Module, batch: Batch) -> Batch:
    """The part of a score that depends on the pictures alone; the first dimension is the picture.

    Exact: METER's encoders see one side only, whatever is attached to the model. ViLT's patches come in random order
    (each with its position, so that it does not matter), and none is left out as long as `config.max_image_length`
    is -1, as in the official fine-tuning code.

    Args:
        model: `MeterForImageAndTextRetrieval` or `ViltForImageAndTextRetrieval`.
        batch: `pixel_values` (I, 3, H, W), and for ViLT `pixel_mask` (I, H, W).
    """
    if "image_embeds" in batch:
        return batch  # kept from before
    if hasattr(model, "meter"):
        return {"image_embeds": model.meter.get_image_features(batch["pixel_values"])}
    embeddings = model.vilt.embeddings
    limit = model.config.max_image_length
    patches, mask, _ = embeddings.visual_embed(batch["pixel_values"], batch["pixel_mask"], max_image_length=limit)
    return {"image_embeds": patches, "pixel_mask": mask}


def encode_texts(model: nn.Module, batch: Batch) -> Batch:
    """The part of a score that depends on the texts alone: METER's text encoder. ViLT has none."""
    if "text_embeds" in batch or not hasattr(model, "meter"):
        return batch
    mask = batch["attention_mask"]
    return {"text_embeds": model.meter.get_text_features(batch["input_ids"], mask), "attention_mask": mask}


def scores(model: nn.Module, images: Batch, texts: Batch) -> Tensor:
    """Scores of B encoded pictures with B encoded texts, `(B,)`."""
    return model(**images, **texts).logits[:, 0]


class RankingObjective(nn.Module):
    """The training loss of ViLT and METER as a module, so that wrappers for several processes see its whole pass.

    Args:
        model: see `encode_images`.
        matching_head: the pre-trained map from pooled features to two logits, the second for "they belong together".
            It stays frozen, and adds `matching_weight` times its own loss.
        matching_weight: 0.5 in both official configs (of which ViLT's code ignores it, and METER's adds it whole).
    """

    def __init__(self, model: nn.Module, matching_head: nn.Linear | None = None, matching_weight: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.matching_head = matching_head.requires_grad_(False) if matching_head is not None else None
        self.matching_weight = matching_weight

    def forward(
        self, images: Batch, texts: Batch, matched: Batch | None = None, is_match: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch.

        Args:
            images: pixels, or METER's `image_embeds`, of B pictures.
            texts: B (1 + k) tokenised texts, or METER's `text_embeds`: those of one picture together, its own first.
            matched: for the matching loss, as `images`: each the true caption's own picture, or another.
            is_match: `(B,)`, which.
        """
        encoded, encoded_texts = encode_images(self.model, images), encode_texts(self.model, texts)
        loss = ranking_loss(self.model, encoded, encoded_texts)
        if self.matching_head is None:
            return loss
        if matched is None or is_match is None:
            raise ValueError("With a matching head a batch needs `matched` and `is_match`.")
        true = {name: tensor[:: len(tensor) // len(is_match)] for name, tensor in encoded_texts.items()}
        matched = encode_images(self.model, matched)
        return loss + self.matching_weight * matching_loss(self.model, self.matching_head, matched, true, is_match)


def ranking_loss(model: nn.Module, images: Batch, texts: Batch) -> Tensor:
    """Cross-entropy of the true text among 1 + k, `(B, ...)` encoded pictures and `(B (1 + k), ...)` encoded texts."""
    count = len(texts["attention_mask"]) // len(images["image_embeds"])
    repeated = {name: tensor.repeat_interleave(count, 0) for name, tensor in images.items()}
    logits = scores(model, repeated, texts).view(-1, count)  # (B, 1 + k)
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def matching_loss(model: nn.Module, head: nn.Linear, images: Batch, texts: Batch, is_match: Tensor) -> Tensor:
    """Cross-entropy of the matching head's "yes" and "no" on B encoded pairs."""
    body = model.meter if hasattr(model, "meter") else model.vilt
    return F.cross_entropy(head(body(**images, **texts).pooler_output), is_match.long())


def load_matching_head(place: str | Path, **hub: Any) -> nn.Linear | None:
    """The pre-trained matching head next to a model, `MATCHING_HEAD_NAME` in its folder or repository; or nothing.

    Raises:
        ValueError: where the file holds something else.
    """
    from safetensors.torch import load_file

    try:
        file = resolve_adapter_file(place, MATCHING_HEAD_NAME, **hub)
    except FileNotFoundError:
        return None
    tensors = load_file(file)
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or bias is None or weight.shape[0] != 2 or bias.shape != (2,):
        raise ValueError(f"{file} is no matching head: it should hold `weight` (2, d) and `bias` (2,).")
    head = nn.Linear(weight.shape[1], 2, dtype=weight.dtype)
    head.load_state_dict({"weight": weight, "bias": bias})
    return head.float()


def start_from_matching_head(model: nn.Module, head: nn.Linear) -> None:
    """`rank_output` begins as the "yes" row of the pre-trained matching head.

    A copy: in the official code both share memory, and training one moves the other.
    """
    with torch.no_grad():
        model.rank_output.weight.copy_(head.weight[1:])
        model.rank_output.bias.copy_(head.bias[1:])


@torch.inference_mode()
def score_all_pairs(
    model: nn.Module,
    image_batches: Iterable[Batch],
    text_batches: Sequence[Batch],
    progress: Callable[[int], Any] | None = None,
) -> Tensor:
    """Scores `(I, C)` of every picture with every caption, float32 on the CPU.

    Each picture and each text is encoded once. All encoded texts are held (for METER 0.6 GB for the 5,000 captions of
    Flickr30K's test split in float32), pictures a batch at a time.

    Args:
        model: see `encode_images`.
        image_batches: of pixels, in the order of the rows; an iterator is read as it is needed.
        text_batches: tokenised, in the order of the columns; a pass takes one picture with one of these.
        progress: called after each picture with the number of pairs that it added.
    """
    texts = [encode_texts(model, batch) for batch in text_batches]
    rows = []
    for batch in image_batches:
        encoded = encode_images(model, batch)
        for image in range(len(encoded["image_embeds"])):
            one = {name: tensor[image : image + 1] for name, tensor in encoded.items()}
            row = torch.cat([scores(model, _expanded(one, len(text["attention_mask"])), text) for text in texts])
            rows.append(row.float().cpu())
            if progress is not None:
                progress(len(row))
    return torch.stack(rows)


def _expanded(batch: Batch, count: int) -> Batch:
    return {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in batch.items()}


def recall(scores: Tensor, image_of: Sequence[int], ranks: Sequence[int] = RANKS) -> dict[str, float]:
    """Recall at K both ways, from 0 to 1.

    `text_recall@K`: pictures with a caption of theirs among the K best of their row. `image_recall@K`: captions whose
    picture is among the K best of their column. Ties count against the model: equal scores for all are no success.

    Args:
        scores: `(I, C)`.
        image_of: of every caption, its picture's row.
        ranks: the K.

    Raises:
        ValueError: for scores that are not finite, or of another shape.
    """
    owner = torch.as_tensor(image_of, device=scores.device)
    if scores.ndim != 2 or scores.shape[1] != len(owner) or (len(owner) and int(owner.max()) >= scores.shape[0]):
        raise ValueError(f"Scores of shape {tuple(scores.shape)} do not fit {len(owner)} captions.")
    if not scores.isfinite().all():
        raise ValueError("There are scores that are not finite: try --mixed_precision no.")
    own_scores = scores[owner, torch.arange(len(owner), device=scores.device)]  # (C,)
    image_ranks = torch.zeros_like(owner)  # how many pictures are not worse than a caption's own
    text_ranks = []  # how many foreign captions are not worse than a picture's best
    for image, row in enumerate(scores):  # row by row: COCO's table has 125 million entries
        own = owner == image
        image_ranks += (row >= own_scores) & ~own
        text_ranks.append(((row >= row[own].max()) & ~own).sum() if own.any() else torch.tensor(len(row)))
    text_ranks = torch.stack(text_ranks).cpu()
    found = {f"text_recall@{k}": (text_ranks < k).double().mean().item() for k in ranks}
    return found | {f"image_recall@{k}": (image_ranks < k).double().mean().item() for k in ranks}
