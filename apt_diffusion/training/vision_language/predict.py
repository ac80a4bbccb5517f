"""What a model says of many examples, shared out to the processes."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...data.image_text import Batch
from ..loading import make_loader

if TYPE_CHECKING:
    from .trainer import Run


def predict(
    run: "Run",
    model: nn.Module,
    examples: Dataset | list[Any],
    collate: Callable[[list[Any]], Batch],
    read: Callable[[Any], Tensor],
) -> Tensor:
    """What `read` takes from the model's output, for every example in their order: `(N, ...)`, on all processes.

    Args:
        run: whose processes share the work.
        model: as `Task.evaluate` gets it.
        examples: by index.
        collate: items of `examples` to a batch; its `labels` are left out.
        read: of the output for a batch, `(B, ...)`.
    """
    args, accelerator = run.args, run.accelerator
    own = range(accelerator.process_index, len(examples), accelerator.num_processes)
    batches = [own[start : start + args.eval_batch_size] for start in range(0, len(own), args.eval_batch_size)]
    loader = make_loader(examples, batches, collate, args.dataloader_num_workers)
    found = []
    for indices, batch in zip(batches, loader, strict=True):
        torch.manual_seed(indices[0])  # ViLT shuffles its patches
        batch.pop("labels", None)
        found.append(read(model(**to_device(batch, accelerator.device))))
    return gather_by_index(accelerator, own, torch.cat(found) if found else None, len(examples))


def gather_by_index(accelerator: Accelerator, indices: Iterable[int], values: Tensor | None, count: int) -> Tensor:
    """Puts the processes' shares `(n, ...)` together, `(count, ...)` on the CPU, on every process."""
    own = (list(indices), None if values is None else values.cpu())
    shares = [(places, share) for places, share in gather_object([own]) if share is not None]
    whole = torch.empty(count, *shares[0][1].shape[1:], dtype=shares[0][1].dtype)
    for places, share in shares:
        whole[places] = share
    return whole


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
