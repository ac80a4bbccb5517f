"""What a denoiser is trained to predict: noisy inputs, targets, and the weighted loss.

`make_objective` chooses by the scheduler that the base model names. An objective has the methods of `Objective`; a
timestep is an index into the base's own noise schedule, and larger ones are noisier.

axes: B batch, c channels, h height, w width
"""

import copy
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from .flow import FlowObjective, Weighting
from .losses import Distance, mean_errors, squared

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
T = TypeVar("T")


class Objective(Protocol):
    """A noise schedule's part of a training step: noisy inputs, targets and loss weights."""

    num_timesteps: int

    def to(self, device: torch.device) -> "Objective":
        """A copy whose schedule is where the latents are."""
        ...

    def draw_timestep(self, draws: np.random.Generator) -> int:
        """The timestep of one sample."""
        ...

    def model_inputs(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents as the model takes them `(B, c, h, w)`, and the times that it is given `(B,)`."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict, `(B, c, h, w)`."""
        ...

    def errors(self, prediction: Tensor, target: Tensor, timesteps: Tensor, distance: Distance = squared) -> Tensor:
        """What each sample's prediction counts, weighted by its timestep, `(B,)`."""
        ...


def make_objective(scheduler: Any, snr_gamma: float | None = None, weighting: Weighting | None = None) -> Objective:
    """The objective of models that `scheduler` samples from.

    Args:
        scheduler: diffusers' scheduler object of the base model: its class knows its own defaults.
        snr_gamma: γ of min-SNR weighting (arXiv 2303.09556); `None` weights all timesteps alike.
        weighting: of the noise levels of flow matching; its default if `None`.

    Raises:
        ValueError: for a kind of model that cannot be trained here, or a weighting that it does not have.
    """
    name, config = type(scheduler).__name__, scheduler.config
    _check_is_trainable(name, config)
    if hasattr(scheduler, "alphas_cumprod") and not config.get("use_flow_sigmas"):
        return DiffusionObjective(scheduler.alphas_cumprod, config.get("prediction_type", "epsilon"), snr_gamma)
    if name.startswith("EDM"):
        if snr_gamma is not None:
            raise ValueError(f"--snr_gamma: {name} has its own weighting of noise levels. Leave --snr_gamma out.")
        return EDMObjective(scheduler)
    if name == "FlowMatchEulerDiscreteScheduler":
        if snr_gamma is not None:
            raise ValueError("--snr_gamma: flow matching has weightings of its own: --weighting_scheme.")
        return FlowObjective(scheduler, weighting or Weighting())
    raise ValueError(
        f"The base model's scheduler is {name}: models of this kind cannot be trained here, only those with the noise "
        "schedule of DDPM (arXiv 2006.11239) or EDM (arXiv 2206.00364), and those of flow matching with Euler's steps."
    )


def _check_is_trainable(name: str, config: Mapping[str, Any]) -> None:
    """`ValueError` for settings under which these objectives would train another model than the base is."""
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon":
        raise ValueError(
            "The base model's scheduler has rescale_betas_zero_snr with prediction type epsilon, but the last "
            "timestep is noise only, where predicting it teaches nothing: set rescale_betas_zero_snr to false in its "
            "scheduler_config.json, or prediction_type to v_prediction if the model was trained so."
        )
    if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        raise ValueError(
            f"The base model's scheduler is a {name} with timestep_type 'continuous', whose models take logarithms of "
            "noise levels as times: they cannot be trained here; an EDM scheduler in its place says the same."
        )
    if config.get("invert_sigmas"):
        raise ValueError(
            f"The base model's scheduler is a {name} and has invert_sigmas: models whose noise levels run backwards "
            "cannot be trained here."
        )


class DiffusionObjective:
    """DDPM's: x_t = a_t x + s_t n with a_t² = ᾱ_t and s_t² = 1 - ᾱ_t.

    Args:
        alphas_cumprod: ᾱ of the model's noise schedule, `(T,)`.
        prediction_type: what the model predicts: the noise, the velocity a_t n - s_t x (arXiv 2202.00512), or x.
        snr_gamma: as for `make_objective`.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str, snr_gamma: float | None = None) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"The base model's scheduler has prediction type {prediction_type!r}, which cannot be trained here, "
                f"only {', '.join(PREDICTION_TYPES)}."
            )
        alphas_cumprod = alphas_cumprod.double()  # a zero terminal SNR leaves no room for rounding
        self.prediction_type = prediction_type
        self.num_timesteps = len(alphas_cumprod)
        self.signal = alphas_cumprod.sqrt().float()  # a
        self.noise_level = (1 - alphas_cumprod).sqrt().float()  # s
        self.weights = None if snr_gamma is None else _min_snr(alphas_cumprod, prediction_type, snr_gamma).float()

    def to(self, device: torch.device) -> "DiffusionObjective":
        """See `Objective`."""
        return _on(self, device)

    def draw_timestep(self, draws: np.random.Generator) -> int:
        """Uniform."""
        return int(draws.integers(self.num_timesteps))

    def model_inputs(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """x_t, and the timesteps themselves."""
        return _at(self.signal, timesteps) * latents + _at(self.noise_level, timesteps) * noise, timesteps

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `Objective`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        return _at(self.signal, timesteps) * noise - _at(self.noise_level, timesteps) * latents

    def errors(self, prediction: Tensor, target: Tensor, timesteps: Tensor, distance: Distance = squared) -> Tensor:
        """See `Objective`."""
        errors = mean_errors(prediction, target, distance)
        return errors if self.weights is None else errors * self.weights[timesteps]


class EDMObjective:
    """EDM's (arXiv 2206.00364, table 1): x + σ n, scaled for the model, whose output is scaled back.

    The loss is on the model's own output F, so every noise level has weight one, which is the paper's λ(σ) = 1 /
    c_out². Noise levels are those of the base's schedule, all equally likely, as in diffusers' trainer.

    Args:
        scheduler: one of diffusers' EDM schedulers.
    """

    def __init__(self, scheduler: Any) -> None:
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"The base model's scheduler has prediction type {scheduler.config.prediction_type!r}; EDM models "
                "that are trained here have epsilon or v_prediction."
            )
        sigmas = scheduler.sigmas[:-1].double().flip(0)  # rising; the last one is where sampling ends
        data = scheduler.config.sigma_data
        total = (sigmas**2 + data**2).sqrt()
        sign = 1 if scheduler.config.prediction_type == "epsilon" else -1
        self.num_timesteps = len(sigmas)
        self.sigmas = sigmas.float()
        self.input_scale = (1 / total).float()  # c_in
        self.times = (0.25 * sigmas.log()).float()  # c_noise
        self.skip = (data**2 / total**2).float()  # c_skip
        self.output_scale = (sign * sigmas * data / total).float()  # c_out

    def to(self, device: torch.device) -> "EDMObjective":
        """See `Objective`."""
        return _on(self, device)

    def draw_timestep(self, draws: np.random.Generator) -> int:
        """Uniform over the schedule's noise levels."""
        return int(draws.integers(self.num_timesteps))

    def model_inputs(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """c_in (x + σ n), and c_noise."""
        return _at(self.input_scale, timesteps) * self._noisy(latents, noise, timesteps), self.times[timesteps]

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(x - c_skip (x + σ n)) / c_out: where c_skip (x + σ n) + c_out F is x."""
        noisy = self._noisy(latents, noise, timesteps)
        return (latents - _at(self.skip, timesteps) * noisy) / _at(self.output_scale, timesteps)

    def errors(self, prediction: Tensor, target: Tensor, timesteps: Tensor, distance: Distance = squared) -> Tensor:
        """See `Objective`."""
        return mean_errors(prediction, target, distance)

    def _noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return latents + _at(self.sigmas, timesteps) * noise


def _on(objective: T, device: torch.device) -> T:
    moved = copy.copy(objective)  # data loaders keep the one on the CPU
    for name, value in vars(objective).items():
        if isinstance(value, Tensor):
            setattr(moved, name, value.to(device))
    return moved


def _at(values: Tensor, timesteps: Tensor) -> Tensor:
    return values[timesteps].view(-1, 1, 1, 1)


def _min_snr(alphas_cumprod: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """min(SNR, γ) in units of x, turned into the units of the prediction; finite at SNR 0."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    clamped = snr.clamp(max=gamma)
    return clamped if prediction_type == "sample" else clamped / (snr + 1)
