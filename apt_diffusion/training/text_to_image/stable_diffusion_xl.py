"""Stable Diffusion XL (arXiv 2307.01952) in the trainer: two text encoders, pooled text, size and crop inputs."""

import re
from typing import Any

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from ... import StableDiffusionXLAPTPipeline
from .noisy import Noisy
from .stable_diffusion import Embeddings, StableDiffusionBase, Tokens, full_config


class StableDiffusionXLBase(StableDiffusionBase):
    """[`StableDiffusionBase`] with a second text encoder."""

    text_parts = ("text_encoder", "text_encoder_2")
    largest_default_resolution = 1024
    pipeline_class = StableDiffusionXLAPTPipeline
    image_to_image_class = StableDiffusionXLImg2ImgPipeline
    tag = "stable-diffusion-xl"
    ignored_by_pipeline = ("shift_factor",)

    def __init__(self, name_or_path: str, *args: Any) -> None:
        super().__init__(name_or_path, *args)
        unet = full_config(UNet2DConditionModel, self.path, subfolder="unet", revision=self.revision)
        self.settings = StableDiffusionXLPipeline.load_config(self.path, revision=self.revision)
        if self.settings.get("text_encoder", [None])[0] is None:
            raise ValueError(f"{name_or_path} has no first text encoder: is it SDXL's refiner? Give its base model.")
        pooled = self.text_config("text_encoder_2")
        taken = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        if taken != pooled.projection_dim:
            raise ValueError(
                f"{name_or_path} is no SDXL base model: its UNet takes pooled text of width {taken} and six sizes, "
                f"its second text encoder gives {pooled.projection_dim}."
            )

    def architecture(self) -> str:
        """See `StableDiffusionBase`."""
        return "stable-diffusion-xl-v1-base"

    def skeletons(self) -> dict[str, nn.Module]:
        """As for Stable Diffusion, with two text encoders."""
        second = self.text_config("text_encoder_2")
        with torch.device("meta"):
            return super().skeletons() | {"text_encoder_2": CLIPTextModelWithProjection(second)}

    def tokenizers(self, name: str | None = None) -> dict[str, Any]:
        """The two tokenizers, by text encoder."""
        second = CLIPTokenizer.from_pretrained(self.path, subfolder="tokenizer_2", revision=self.revision)
        return super().tokenizers(name) | {"text_encoder_2": second}

    def text_encoders(self, dtype: torch.dtype) -> dict[str, nn.Module]:
        """The two text encoders, by name."""
        return super().text_encoders(dtype) | {"text_encoder_2": self.text_encoder_2(dtype)}

    def text_encoder_2(self, dtype: torch.dtype) -> CLIPTextModelWithProjection:
        """The second text encoder, whose pooled output is a condition of the UNet."""
        place = {"subfolder": "text_encoder_2", "dtype": dtype, **self.files}
        return CLIPTextModelWithProjection.from_pretrained(self.path, **place).requires_grad_(False)

    def pipeline(self, dtype: torch.dtype) -> StableDiffusionXLPipeline:
        """The stock pipeline around these components."""
        parts = {} if self.other_vae is None else {"vae": self.vae(dtype)}
        return StableDiffusionXLPipeline.from_pretrained(
            self.path, dtype=dtype, add_watermarker=False, **parts, **self.files
        )

    def embed(self, text_encoders: dict[str, nn.Module], tokens: dict[str, Tokens]) -> Embeddings:
        """`prompt_embeds` `(B, L, d1 + d2)`, states before the last layers; `pooled_prompt_embeds` `(B, d2')`."""
        outputs = [text_encoders[part](**tokens[part], output_hidden_states=True) for part in self.text_parts]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {"prompt_embeds": states, "pooled_prompt_embeds": outputs[1].text_embeds}

    def idle(self, parameter_name: str) -> bool:
        """The first text encoder's last layer is not seen; the second's is, in the pooled text."""
        last = self.text_config("text_encoder").num_hidden_layers - 1
        return re.match(rf"text_encoder\..*\blayers\.{last}\.", parameter_name) is not None

    def conditions(self, given: Noisy) -> dict[str, Any]:
        """The UNet's other inputs: text states, pooled text, and the sizes and cut of each picture."""
        pooled = given.embeddings["pooled_prompt_embeds"]
        added = {"text_embeds": pooled, "time_ids": given.time_ids.float()}  # bfloat16 has no 1000 different sizes
        return super().conditions(given) | {"added_cond_kwargs": added}

    def drawing_pipeline(self, unet: UNet2DConditionModel, image_to_image: bool) -> Any:
        """The pipeline that draws samples."""
        return (self.image_to_image_class if image_to_image else self.pipeline_class)(
            vae=self.vae(unet.dtype).to(unet.device),
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=unet,
            scheduler=self.scheduler(),
            add_watermarker=False,
        )

    def without_negative(self, empty: Embeddings) -> Embeddings:
        """Zeros, where the pipeline takes these for no negative prompt."""
        if not self.settings.get("force_zeros_for_empty_prompt", True):
            return empty
        return {name: torch.zeros_like(embedding) for name, embedding in empty.items()}
