"""What Flux.1 and Flux.2 have in common in the trainer: guidance is an input of the transformer."""

import argparse
from typing import Any

import torch
from torch import Tensor

from .flow_transformer import FlowTransformerBase
from .noisy import Noisy
from .stable_diffusion import Embeddings


class GuidedTransformerBase(FlowTransformerBase):
    """[`FlowTransformerBase`] of a transformer that may have been distilled to take a guidance.

    Attributes:
        guidance_embedding: the guidance that the transformer is given in training, where it takes one.
    """

    takes_negative_prompts = False
    guidance_embedding = 3.5

    def read_denoiser(self, name_or_path: str) -> None:
        """See `FlowTransformerBase`."""
        super().read_denoiser(name_or_path)
        self.takes_guidance = self.transformer["guidance_embeds"]

    def configure(self, args: argparse.Namespace) -> None:
        """See `StableDiffusionBase`."""
        self.guidance_embedding = args.guidance_embedding

    def guidance_for(self, given: Noisy) -> Tensor | None:
        """`(B,)`; `None` for a transformer without the input."""
        if not self.takes_guidance:
            return None
        return torch.full((len(given.latents),), self.guidance_embedding, device=given.latents.device)

    def drawing_inputs(self, prompt: Embeddings, negative: Embeddings) -> dict[str, Any]:
        """Without a negative prompt."""
        return dict(prompt)
