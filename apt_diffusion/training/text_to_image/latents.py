"""A VAE's latents as the denoiser takes them, and those of the training pictures, encoded before the first step."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...data.dreambooth import LatentCache
from ...data.pictures import View


class LatentSpace:
    """The affine map between a VAE's latents x and the denoiser's, z = (x - mean) scale / std.

    Args:
        config: of an `AutoencoderKL`. Mean and std are its `latents_mean` and `latents_std`, one number per channel;
            where it has none, the mean is its `shift_factor` and std is 1.

    Raises:
        ValueError: for a scale that is no number but 0, or means of another number of channels.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        channels = config["latent_channels"]
        self.scale = config["scaling_factor"]
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if not isinstance(self.scale, int | float) or not self.scale:
            raise ValueError(f"The VAE's config.json says scaling_factor {self.scale}: latents need a number but 0.")
        if any(values and len(values) != channels for values in (mean, std)):
            raise ValueError(
                f"The VAE's config.json has latents_mean or latents_std of other than {channels} channels."
            )
        self.mean = torch.tensor(mean or [config.get("shift_factor") or 0.0] * channels).view(channels, 1, 1)
        self.std = torch.tensor(std or [1.0] * channels).view(channels, 1, 1)

    def from_vae(self, mean: Tensor, std: Tensor) -> Tensor:
        """Means and standard deviations of the VAE's posterior `(B, c, h, w)` to the denoiser's `(B, 2, c, h, w)`."""
        center, width = self.mean.to(mean.device), self.std.to(mean.device)
        return torch.stack([mean.float() - center, std.float()], dim=1) * self.scale / width

    def to_vae(self, latents: Tensor) -> Tensor:
        """The denoiser's latents to what the VAE decodes, `(B, c, h, w)`."""
        return latents * self.std.to(latents) / self.scale + self.mean.to(latents)


class Views(Protocol):
    """Data whose samples are squares of pictures, known beforehand."""

    def views_at(self, position: int) -> list[View]:
        """The squares at a position."""
        ...

    def pixels(self, views: list[View]) -> dict[View, Tensor]:
        """Their pixels, `(3, H, W)` each."""
        ...


class KeptLatents(Protocol):
    """Latents that may be known already, such as those of `EncoderOutputs`."""

    def latents(self, view: View, compute: Callable[[], Tensor]) -> Tensor:
        """Those of a view; `compute` encodes it."""
        ...


def encode_views(
    encode: Callable[[Tensor], Tensor],
    data: Views,
    positions: Iterable[int],
    show_progress: bool,
    outputs: KeptLatents | None = None,
) -> LatentCache:
    """Encodes every view that these positions show, once, and one by one so that none depends on the others.

    What a position draws is known beforehand, so cuts and flips stay random. Means and standard deviations are kept:
    the latents are still sampled in every step.

    Args:
        encode: pixels `(1, 3, H, W)` to the distribution of their latents `(1, 2, c, h, w)`.
        data: which views there are, and their pixels.
        positions: places in the stream of training.
        show_progress: with a progress bar.
        outputs: those on disk.
    """
    views = sorted({view for position in positions for view in data.views_at(position)})
    cache = {}
    for view in tqdm(views, desc="Encoding pictures", disable=not show_progress):

        def compute(view: View = view) -> Tensor:
            return encode(data.pixels([view])[view][None])[0].cpu()

        cache[view] = compute() if outputs is None else outputs.latents(view, compute)
    return cache
