"""Reports the progress of a run: progress bar, loss log, trackers."""

import math
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .loss_log import LossLog


class Progress:
    """Losses stay on the device until they are due: reading each at once would make a GPU wait for Python.

    Args:
        accelerator: the run's `accelerate.Accelerator`.
        log: where rows go (main process only).
        first_step: steps already done.
        last_step: steps in all.
    """

    def __init__(self, accelerator: Any, log: LossLog | None, first_step: int, last_step: int) -> None:
        self.accelerator = accelerator
        self.log = log
        self.every = 1 if accelerator.device.type == "cpu" else 10
        self.pending: list[tuple[int, Tensor, dict[str, float]]] = []
        self.bar = tqdm(
            total=last_step, initial=first_step, desc="Steps", disable=not accelerator.is_local_main_process
        )

    def add(self, step: int, losses: list[Tensor], rates: dict[str, float]) -> None:
        """Notes the losses of a step's batches, and its learning rates."""
        self.pending.append((step, torch.stack(losses).mean(), rates))
        self.bar.update(1)

    def flush(self, signal_number: int | None) -> int:
        """Writes what is pending, averaged over all processes, which must call this at the same step.

        Returns:
            The highest signal number that any process was interrupted by, or 0: all stop at the same step.

        Raises:
            FloatingPointError: for a loss that is not finite.
        """
        device = self.accelerator.device
        signal = torch.tensor([float(signal_number or 0)], device=device)
        values = torch.cat([*(loss[None].float() for _, loss, _ in self.pending), signal])
        gathered = self.accelerator.gather(values).view(-1, len(values))  # (processes, pending + 1)
        losses = gathered[:, :-1].mean(0).tolist()
        rows = [
            {"step": step, "loss": loss, **rates} for (step, _, rates), loss in zip(self.pending, losses, strict=True)
        ]
        self.pending = []
        if self.log is not None:
            self.log.append(rows)
        for row in rows:
            self.accelerator.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(
                    f"The loss became {row['loss']} at step {row['step']}. Lower --learning_rate, or use "
                    "--mixed_precision bf16 or no, and begin anew or resume from a checkpoint some steps before."
                )
        if rows:
            self.bar.set_postfix(loss=f"{rows[-1]['loss']:.4f}", lr=f"{rows[-1]['lr']:.2e}")
        return int(gathered[:, -1].max().item())

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()
