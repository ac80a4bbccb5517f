"""The objective of a diffusion model: noisy inputs, targets, and the weighted loss, for any prediction type.

x_t = a_t x + s_t n,  a_t² = ᾱ_t,  s_t² = 1 - ᾱ_t        axes: B batch, c channels, h height, w width
"""

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Objective:
    """What to show a denoiser, and what to ask of it.

    Args:
        alphas_cumprod: ᾱ of the model's noise schedule, `(T,)`.
        prediction_type: what the model predicts: the noise, the velocity a_t n - s_t x (arXiv 2202.00512), or x.
        snr_gamma: γ of min-SNR weighting (arXiv 2303.09556); `None` weights all timesteps alike.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str, snr_gamma: float | None = None) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"Unknown prediction type {prediction_type!r}, expected one of {PREDICTION_TYPES}.")
        alphas_cumprod = alphas_cumprod.double()  # a zero terminal SNR leaves no room for rounding
        self.prediction_type = prediction_type
        self.signal = alphas_cumprod.sqrt().float()  # a
        self.noise_level = (1 - alphas_cumprod).sqrt().float()  # s
        self.weights = None if snr_gamma is None else _min_snr(alphas_cumprod, prediction_type, snr_gamma).float()

    def to(self, device: torch.device) -> "Objective":
        self.signal, self.noise_level = self.signal.to(device), self.noise_level.to(device)
        self.weights = None if self.weights is None else self.weights.to(device)
        return self

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t, `(B, c, h, w)`."""
        return self._at(self.signal, timesteps) * latents + self._at(self.noise_level, timesteps) * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should answer, `(B, c, h, w)`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        return self._at(self.signal, timesteps) * noise - self._at(self.noise_level, timesteps) * latents

    def loss(self, prediction: Tensor, target: Tensor, timesteps: Tensor, prior_weight: float | None = None) -> Tensor:
        """Mean squared error; with `prior_weight` the second half of the batch is the class and weighs that much."""
        errors = (prediction.float() - target.float()).square().flatten(1).mean(1)  # (B,)
        if self.weights is not None:
            errors = errors * self.weights[timesteps]
        if prior_weight is None:
            return errors.mean()
        instance, prior = errors.chunk(2)
        return instance.mean() + prior_weight * prior.mean()

    @staticmethod
    def _at(values: Tensor, timesteps: Tensor) -> Tensor:
        return values[timesteps].view(-1, 1, 1, 1)


def _min_snr(alphas_cumprod: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """min(SNR, γ) in units of x, turned into the units of the prediction; finite at SNR 0."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    clamped = snr.clamp(max=gamma)
    return clamped if prediction_type == "sample" else clamped / (snr + 1)
