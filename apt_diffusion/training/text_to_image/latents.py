"""Latents of the training pictures, encoded once before the first step."""

from collections.abc import Iterable

from torch import nn
from tqdm.auto import tqdm

from ...data.dreambooth import DreamBoothData, LatentCache
from .stable_diffusion import StableDiffusionBase


def encode_views(
    base: StableDiffusionBase, vae: nn.Module, data: DreamBoothData, positions: Iterable[int], show_progress: bool
) -> LatentCache:
    """Encodes every view that these positions show, once, and one by one so that none depends on the others.

    What a position draws is known beforehand, so cuts and flips stay random. Means and standard deviations are kept:
    the latents are still sampled in every step.
    """
    views = sorted({view for position in positions for view in data.views_at(position)})
    cache = {}
    for view in tqdm(views, desc="Encoding pictures", disable=not show_progress):
        cache[view] = base.latent_distribution(vae, data.pixels([view])[view][None])[0].cpu()
    return cache
