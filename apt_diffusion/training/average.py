"""Averages of what is trained, in place of the last step's weights: the moving average, and that of schedule-free
optimizers.

A checkpoint's adapter is the average, as that of a finished run is; the weights that training goes on with stand
beside it in a file of their own.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import Tensor, nn

from ..io.files import write_safetensors
from .checkpoints import TRAINED_NAME


class Average:
    """An average of parameters that can stand in their place.

    Args:
        parameters: by name, as they are now.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self._aside: list[Tensor] | None = None  # the trained weights, while the average stands in their place

    def step(self) -> None:
        """Takes in the parameters after a step of the optimizer."""

    def _put_in_place(self) -> None:
        raise NotImplementedError

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager: the parameters have the average's values inside, and their own again after it."""
        if self._aside is not None:
            yield
            return
        self._aside = [parameter.detach().clone() for parameter in self.parameters.values()]
        try:
            self._put_in_place()
            yield
        finally:
            self._write(self._aside)
            self._aside = None

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the trained weights into a checkpoint's folder; returns the rest of the state, for its JSON."""
        with torch.no_grad():
            tensors = {
                name: parameter.detach().to("cpu", copy=True).contiguous()
                for name, parameter in self.parameters.items()
            }
        write_safetensors(tensors, folder / TRAINED_NAME, {"format": "pt"})
        return {}

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's JSON; the average itself is what the parameters were when this was made."""

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters.values(), values, strict=True):
            parameter.copy_(value)


class MovingAverage(Average):
    """The exponential moving average a of parameters θ (EMA): a ← d a + (1 - d) θ after every step, from a = θ.

    Step n has d = min((1 + n) / (10 + n), `decay`), n counted from 0 after the first step, which copies θ: diffusers'
    `EMAModel` does the arithmetic. Its `copy_to` is not used: it writes past PyTorch's version counter, and keys that
    were kept from other prompts would not be seen to be old.

    Args:
        parameters: by name, as they are now.
        decay: the largest d.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        super().__init__(parameters)
        self._model = EMAModel(list(parameters.values()), decay=decay)

    def step(self) -> None:
        """Takes in the parameters after a step of the optimizer."""
        self._model.step(list(self.parameters.values()))

    def _put_in_place(self) -> None:
        self._write(self._model.shadow_params)

    def save(self, folder: Path) -> dict[str, Any]:
        """See `Average`."""
        return super().save(folder) | {"average_steps": self._model.optimization_step}

    def resume(self, state: dict[str, Any]) -> None:
        """See `Average`."""
        self._model.optimization_step = state.get("average_steps", 0)


class ScheduleFreeAverage(Average):
    """The average that a schedule-free optimizer (arXiv 2405.15682) keeps itself, and moves to by its `eval`.

    Its way back, `train`, computes the trained weights from the average, which rounds. They are put aside instead, so
    that samples and checkpoints do not disturb the training.

    Args:
        parameters: all that it optimizes, by name.
        optimizer: of `schedulefree`; it is set to train.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        super().__init__(parameters)
        self._optimizer: Any = optimizer
        self._optimizer.train()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """See `Average`."""
        with super().applied():
            yield
        if self._aside is None:
            for group in self._optimizer.param_groups:
                group["train_mode"] = True

    def _put_in_place(self) -> None:
        self._optimizer.eval()


@torch.no_grad()
def load_trained(folder: Path, parameters: dict[str, nn.Parameter]) -> None:
    """The weights that training goes on with, where the checkpoint's adapter is an average of them."""
    if (folder / TRAINED_NAME).is_file():
        tensors = load_file(folder / TRAINED_NAME)
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
