"""Z-Image in the trainer: Qwen3 reads the texts; pictures and texts are lists, and time runs the other way."""

from typing import Any

import torch
from diffusers import ZImageImg2ImgPipeline, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn

from ... import ZImageAPTPipeline
from .flow_transformer import MASK, PROMPT, FlowTransformerBase, tokens_before
from .noisy import Noisy
from .stable_diffusion import Embeddings


class ZImageBase(FlowTransformerBase):
    """[`FlowTransformerBase`] of Z-Image. Its transformer cuts pictures into tokens itself."""

    family = "Z-Image"
    stock_class = ZImagePipeline
    pipeline_class = ZImageAPTPipeline
    image_to_image_class = ZImageImg2ImgPipeline
    denoiser_class = ZImageTransformer2DModel
    tag = "z-image"
    longest_sequence = None
    default_guidance = 5.0
    packs = False
    samples_posterior = False

    def architecture(self) -> str:
        """See `StableDiffusionBase`."""
        return "z-image"

    def text_widths(self) -> dict[str, int]:
        """See `FlowTransformerBase`."""
        return {"cap_feat_dim": self.text_width("text_encoder")}

    def text_before(self, tokenizer: Any) -> int:
        """The chat template's tokens before a prompt."""
        chat = [{"role": "user", "content": PROMPT}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        return tokens_before(tokenizer, text)

    def encode(self, pipeline: Any, prompt: str, device: torch.device) -> Embeddings:
        """`prompt_embeds` `(1, L, d)`, as long as the prompt is, and a mask of ones."""
        length = self.max_sequence_length
        # A list of its own: the pipeline writes its template into the list that it is given.
        (states,), _ = pipeline.encode_prompt(
            [prompt], device=device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"prompt_embeds": states[None], MASK: torch.ones(1, len(states), dtype=torch.long)}

    def drawing_inputs(self, prompt: Embeddings, negative: Embeddings) -> dict[str, Any]:
        """Lists of texts, as the pipeline takes them."""
        return {"prompt_embeds": texts(prompt), "negative_prompt_embeds": texts(negative)}

    def predict(self, denoiser: nn.Module, given: Noisy) -> Tensor:
        """What the transformer predicts for noisy latents, `(B, c, h, w)`: it predicts x - n, and 1 is no noise."""
        pictures = list(given.latents.unsqueeze(2))  # each (c, 1, h, w)
        times = (1000 - given.times) / 1000
        predictions = denoiser(pictures, times, texts(given.embeddings), return_dict=False)[0]
        return -torch.stack(list(predictions)).squeeze(2)


def texts(embeddings: Embeddings) -> list[Tensor]:
    """The states of each text without padding, `(L, d)` each."""
    lengths = embeddings[MASK].sum(1).tolist()
    return [states[:length] for states, length in zip(embeddings["prompt_embeds"], lengths, strict=True)]
