"""Data loaders whose workers outlive Ctrl-C and SIGTERM, and never their parent."""

import multiprocessing
import multiprocessing.util
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from .interrupt import SIGNALS


def make_loader(
    dataset: Dataset | Sequence[Any],
    batches: Sequence[Sequence[int]],
    collate: Callable[[list[Any]], Any],
    num_workers: int,
    pin_memory: bool = False,
) -> DataLoader:
    """A loader of `batches`, each the indices of its items.

    Signals to the process group (Ctrl-C, a cluster's SIGTERM) are the main process's to answer: it finishes its step
    with what the workers bring, saves, and leaves.
    """
    if num_workers:
        _register_end_of_workers()
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=_leave_signals_to_parent,
        pin_memory=pin_memory,
    )


def _leave_signals_to_parent(worker: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


_registered: list[multiprocessing.util.Finalize] = []


def _register_end_of_workers() -> None:
    """Has workers killed before multiprocessing ends this process: it would send SIGTERM, and wait for ever."""
    if not any(finalizer.still_active() for finalizer in _registered):
        _registered.append(multiprocessing.util.Finalize(None, _kill_workers, exitpriority=100))


def _kill_workers() -> None:
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        # PyTorch's handler raises when a worker dies: in the middle of this loop, the other workers would live on.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:  # the rest is waited for, as ever
            child.kill()
