"""Flow matching (arXiv 2403.03206): the objective of Stable Diffusion 3 and its kin.

axes: B batch, c channels, h height, w width
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .losses import Distance, mean_errors, squared

WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")


@dataclass(frozen=True)
class Weighting:
    """Which noise levels are trained, and how much each counts; names and defaults are those of diffusers' trainers.

    Args:
        scheme: `logit_normal` and `mode` draw some noise levels more often; `sigma_sqrt` and `cosmap` weigh the loss.
        logit_mean, logit_std: of `logit_normal`.
        mode_scale: of `mode`.
    """

    scheme: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29


class FlowObjective:
    """x_σ = (1 - σ) x + σ n; the model predicts the velocity n - x.

    Noise levels are those of the base's own table, which has SD3's static shift in it. A scheduler with dynamic
    shifting has an unshifted table, on which diffusers' trainers train, too.

    Args:
        scheduler: a `FlowMatchEulerDiscreteScheduler`.
        weighting: of noise levels.
    """

    def __init__(self, scheduler: Any, weighting: Weighting) -> None:
        sigmas = scheduler.sigmas[: scheduler.config.num_train_timesteps].double().flip(0)  # rising
        self.weighting = weighting
        self.num_timesteps = len(sigmas)
        self.sigmas = sigmas.float()
        self.times = (sigmas * scheduler.config.num_train_timesteps).float()
        self.weights = _weights(sigmas, weighting.scheme).float()

    def to(self, device: torch.device) -> "FlowObjective":
        """See `Objective`."""
        moved = object.__new__(FlowObjective)
        for name, value in vars(self).items():
            setattr(moved, name, value.to(device) if isinstance(value, Tensor) else value)
        return moved

    def draw_timestep(self, draws: np.random.Generator) -> int:
        """By the weighting's density over u, where u = 0 is the noisiest."""
        weighting = self.weighting
        if weighting.scheme == "logit_normal":
            place = 1 / (1 + math.exp(-draws.normal(weighting.logit_mean, weighting.logit_std)))
        else:
            place = draws.random()
            if weighting.scheme == "mode":
                place = 1 - place - weighting.mode_scale * (math.cos(math.pi * place / 2) ** 2 - 1 + place)
        index = int(place * self.num_timesteps)
        return self.num_timesteps - 1 - min(max(index, 0), self.num_timesteps - 1)

    def model_inputs(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """x_σ, and σ in units of the model's times."""
        sigmas = self.sigmas[timesteps].view(-1, 1, 1, 1)
        return (1 - sigmas) * latents + sigmas * noise, self.times[timesteps]

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """n - x."""
        return noise - latents

    def errors(self, prediction: Tensor, target: Tensor, timesteps: Tensor, distance: Distance = squared) -> Tensor:
        """See `Objective`."""
        return mean_errors(prediction, target, distance) * self.weights[timesteps]


def _weights(sigmas: Tensor, scheme: str) -> Tensor:
    if scheme == "sigma_sqrt":
        return sigmas**-2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    return torch.ones_like(sigmas)
