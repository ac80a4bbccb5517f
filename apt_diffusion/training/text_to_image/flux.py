"""Flux.1 in the trainer: CLIP gives the pooled text, T5 its tokens; latents are packed 2 x 2."""

from typing import Any

import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from ... import FluxAPTPipeline
from .flow_transformer import pack, unpack
from .guided_transformer import GuidedTransformerBase
from .noisy import Noisy
from .stable_diffusion import Embeddings, StableDiffusionBase, Tokens


class FluxBase(GuidedTransformerBase):
    """[`GuidedTransformerBase`] of Flux.1. CLIP can be trained, T5 cannot."""

    family = "Flux.1"
    stock_class = FluxPipeline
    pipeline_class = FluxAPTPipeline
    image_to_image_class = FluxImg2ImgPipeline
    denoiser_class = FluxTransformer2DModel
    text_parts = ("text_encoder", "text_encoder_2")
    trained_text_parts = ("text_encoder",)
    tag = "flux"
    default_guidance = 3.5

    def skeletons(self) -> dict[str, nn.Module]:
        """The transformer and CLIP."""
        with torch.device("meta"):
            return super().skeletons() | {"text_encoder": CLIPTextModel(self.text_config("text_encoder"))}

    def text_config(self, part: str) -> Any:
        """A text encoder's settings; `ValueError` where the first is no CLIP's."""
        if part == "text_encoder":
            return StableDiffusionBase.text_config(self, part)
        return super().text_config(part)

    def architecture(self) -> str:
        """See `StableDiffusionBase`: the model that takes a guidance is called dev, the other schnell."""
        return "flux-1-dev" if self.takes_guidance else "flux-1-schnell"

    def text_widths(self) -> dict[str, int]:
        """See `FlowTransformerBase`."""
        return {
            "joint_attention_dim": self.text_width("text_encoder_2"),
            "pooled_projection_dim": self.text_width("text_encoder"),
        }

    def encode(self, pipeline: Any, prompt: str, device: torch.device) -> Embeddings:
        """`prompt_embeds` `(1, L, d)` of T5, padded to L as the pipeline does; `pooled_prompt_embeds` of CLIP."""
        length = self.max_sequence_length
        states, pooled, _ = pipeline.encode_prompt(prompt, device=device, max_sequence_length=length)
        return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

    def embed(self, text_encoders: dict[str, nn.Module], tokens: dict[str, Tokens]) -> Embeddings:
        """`pooled_prompt_embeds` `(B, d)` of a CLIP that is trained."""
        return {"pooled_prompt_embeds": text_encoders["text_encoder"](**tokens["text_encoder"]).pooler_output}

    def predict(self, denoiser: nn.Module, given: Noisy) -> Tensor:
        """What the transformer predicts for noisy latents, `(B, c, h, w)`."""
        _, _, height, width = given.latents.shape
        states = given.embeddings["prompt_embeds"]
        prediction = denoiser(
            hidden_states=pack(given.latents),
            timestep=given.times / 1000,
            guidance=self.guidance_for(given),
            pooled_projections=given.embeddings["pooled_prompt_embeds"],
            encoder_hidden_states=states,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=places(height // 2, width // 2).to(states),
            return_dict=False,
        )[0]
        return unpack(prediction, height, width)


def places(height: int, width: int) -> Tensor:
    """Row and column of each token behind a zero, `(height * width, 3)`."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))
