"""What a denoiser is asked in a training step."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Noisy:
    """Noisy latents, and what a denoiser is told of them.

    Args:
        latents: `(B, c, h, w)`.
        times: `(B,)`.
        embeddings: of the texts, by the names that the base gives them.
        time_ids: `(B, 6)`: how pictures were cut.
        class_labels: `(B,)`, for a UNet that takes them.
    """

    latents: Tensor
    times: Tensor
    embeddings: dict[str, Tensor]
    time_ids: Tensor
    class_labels: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Noisy":
        """Latents and embeddings in the precision of the frozen weights; masks, times and sizes as they are."""
        embeddings = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in self.embeddings.items()
        }
        return dataclasses.replace(self, latents=self.latents.to(dtype), embeddings=embeddings)
