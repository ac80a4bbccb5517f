"""Evaluation: the model without dropout and gradients, and its outputs for many examples, shared by the processes."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...data.image_text import Batch
from ..loading import make_loader
from ..session import Session
from .method import set_training_mode


@contextlib.contextmanager
def evaluating(session: Session, network: nn.Module, model: nn.Module) -> Iterator[nn.Module]:
    """Context manager for evaluation: no dropout, no gradients, and training's random state is restored.

    Args:
        session: of the run.
        network: as accelerate wrapped it.
        model: the one that is trained, `network` itself or within it.

    Yields:
        The network without DDP's wrapper, which would make processes wait for each other, but with autocast.
    """
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield session.accelerator.unwrap_model(network)
    set_training_mode(model)


def predict(
    session: Session,
    model: nn.Module,
    examples: Dataset | list[Any],
    collate: Callable[[list[Any]], Batch],
    read: Callable[[Any], Tensor],
) -> Tensor:
    """`read` of the model's output for every example, in their order: `(N, ...)`, on all processes.

    Args:
        session: whose processes share the work.
        model: of `evaluating`.
        examples: by index.
        collate: items of `examples` to a batch; its `labels` are left out.
        read: from the output for a batch to `(B, ...)`.
    """
    args, accelerator = session.args, session.accelerator
    own = range(accelerator.process_index, len(examples), accelerator.num_processes)
    batches = [own[start : start + args.eval_batch_size] for start in range(0, len(own), args.eval_batch_size)]
    found = []
    for indices, batch in zip(
        batches, make_loader(examples, batches, collate, args.dataloader_num_workers), strict=True
    ):
        torch.manual_seed(indices[0])  # ViLT shuffles its patches
        batch.pop("labels", None)
        found.append(read(model(**send_to_device(batch, accelerator.device, non_blocking=True))))
    return gather_by_index(accelerator, own, torch.cat(found) if found else None, len(examples))


def gather_by_index(accelerator: Accelerator, indices: Iterable[int], values: Tensor | None, count: int) -> Tensor:
    """Puts the processes' shares `(n, ...)` together, `(count, ...)` on the CPU, on every process."""
    own = (list(indices), None if values is None else values.cpu())
    shares = [(places, share) for places, share in gather_object([own]) if share is not None]
    whole = torch.empty(count, *shares[0][1].shape[1:], dtype=shares[0][1].dtype)
    for places, share in shares:
        whole[places] = share
    return whole
