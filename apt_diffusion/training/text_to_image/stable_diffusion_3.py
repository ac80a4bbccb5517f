"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206) in the trainer: a transformer, two text encoders of CLIP, and T5."""

import argparse
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from ... import StableDiffusion3APTPipeline
from .noisy import Noisy
from .stable_diffusion import Embeddings, StableDiffusionBase, Tokens, full_config, side_of

CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"


class StableDiffusion3Base(StableDiffusionBase):
    """[`StableDiffusionBase`] with a transformer. T5 may be missing; its part of the text is zero then.

    Attributes:
        max_sequence_length: tokens that T5 reads.
    """

    family = "Stable Diffusion 3"
    denoiser_part = "transformer"
    denoiser_class = SD3Transformer2DModel
    largest_default_resolution = 1024
    pipeline_class = StableDiffusion3APTPipeline
    image_to_image_class = StableDiffusion3Img2ImgPipeline
    tag = "stable-diffusion-3"
    ignored_by_pipeline = ("latents_mean", "latents_std")
    trained_text_parts = CLIPS
    max_sequence_length: int = 256
    longest_sequence = 512
    image_to_image_has_size = True

    def read_denoiser(self, name_or_path: str) -> None:
        """The transformer's and the text encoders' settings."""
        self.settings = StableDiffusion3Pipeline.load_config(self.path, revision=self.revision)
        present = [part for part in (*CLIPS, T5) if self.settings.get(part, [None])[0] is not None]
        if present[:2] != list(CLIPS):
            raise ValueError(
                f"{name_or_path} has only the text encoders {present}: training needs both of CLIP "
                f"({', '.join(CLIPS)}), and may do without T5 ({T5})."
            )
        self.text_parts = tuple(present)
        place = {"subfolder": "transformer", "revision": self.revision}
        self.transformer = full_config(SD3Transformer2DModel, self.path, **place)
        largest = self.largest_default_resolution // self.stride
        self.native_resolution = side_of(self.transformer["sample_size"], largest) * self.stride
        self.has_class_embedding = False
        self.check_channels(name_or_path, "transformer", self.transformer)

    def configure(self, args: argparse.Namespace) -> None:
        """See `StableDiffusionBase`. Unless flags say otherwise image and text are corrected."""
        # With both streams the embedded model draws subjects better: see docs/miniature.md. Places that
        # --target_modules names may have no text output.
        if args.streams is None and args.target_modules is None and not args.no_train_unet:
            args.streams = ["query", "text"]

    def check_resolution(self, resolution: int | None) -> int:
        """The size of the training squares; `ValueError` for one that is no whole number of patches, or too many."""
        size = super().check_resolution(resolution)
        patch = self.stride * self.transformer["patch_size"]
        if size % patch or size // patch > self.transformer["pos_embed_max_size"]:
            most = patch * self.transformer["pos_embed_max_size"]
            raise ValueError(f"--resolution must be a multiple of {patch}, at most {most}, got {size}.")
        return size

    def architecture(self) -> str:
        """See `StableDiffusionBase`."""
        return "stable-diffusion-3"

    def skeletons(self) -> dict[str, nn.Module]:
        """See `StableDiffusionBase`; without T5, which is never trained."""
        with torch.device("meta"):
            models = {part: CLIPTextModelWithProjection(self.text_config(part)) for part in CLIPS}
            return {"transformer": SD3Transformer2DModel.from_config(self.transformer), **models}

    def check_widths(self, skeletons: dict[str, nn.Module]) -> None:
        """`ValueError` where text encoders and transformer do not belong together."""
        pooled = sum(skeletons[part].config.projection_dim for part in CLIPS)
        clip = sum(skeletons[part].config.hidden_size for part in CLIPS)
        taken = self.transformer["joint_attention_dim"]
        t5 = self.text_config(T5).d_model if T5 in self.text_parts else taken
        if pooled != self.transformer["pooled_projection_dim"] or t5 != taken or clip > taken:
            raise ValueError(
                f"The parts of {self.path} do not belong together: its transformer takes texts of width {taken} and "
                f"pooled texts of width {self.transformer['pooled_projection_dim']}; its text encoders give "
                f"{t5} (T5), {clip} (CLIP) and {pooled}."
            )

    def tokenizers(self, name: str | None = None) -> dict[str, Any]:
        """One per text encoder."""
        place = {"revision": self.revision}
        found = {
            part: CLIPTokenizer.from_pretrained(
                self.path, subfolder=part.replace("text_encoder", "tokenizer"), **place
            )
            for part in CLIPS
        }
        if T5 in self.text_parts:
            found[T5] = AutoTokenizer.from_pretrained(self.path, subfolder="tokenizer_3", **place)
        return found

    def text_config(self, part: str) -> Any:
        """A text encoder's settings."""
        if part != T5:
            return super().text_config(part)
        return T5Config.from_pretrained(self.path, subfolder=part, revision=self.revision)

    def longest_texts(self) -> dict[str, int]:
        """How many tokens each text encoder reads."""
        longest = {part: self.text_config(part).max_position_embeddings for part in CLIPS}
        return longest | ({T5: self.max_sequence_length} if T5 in self.text_parts else {})

    def text_encoders(self, dtype: torch.dtype) -> dict[str, nn.Module]:
        """The frozen text encoders, by part."""
        kinds = {CLIPS[0]: CLIPTextModelWithProjection, CLIPS[1]: CLIPTextModelWithProjection, T5: T5EncoderModel}
        return {
            part: kinds[part]
            .from_pretrained(self.path, subfolder=part, dtype=dtype, **self.files)
            .requires_grad_(False)
            for part in self.text_parts
        }

    def pipeline(self, dtype: torch.dtype) -> StableDiffusion3Pipeline:
        """The whole base model, without adapters."""
        parts: dict[str, Any] = {} if self.other_vae is None else {"vae": self.vae(dtype)}
        if T5 not in self.text_parts:
            parts |= {T5: None, "tokenizer_3": None}
        return StableDiffusion3Pipeline.from_pretrained(self.path, dtype=dtype, **parts, **self.files)

    def embed(self, text_encoders: dict[str, nn.Module], tokens: dict[str, Tokens]) -> Embeddings:
        """`prompt_embeds` `(B, L + L', d)`, CLIP's states padded to T5's width, then T5's; `pooled_prompt_embeds`."""
        clips = [text_encoders[part](**tokens[part], output_hidden_states=True) for part in CLIPS]
        states = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
        width = self.transformer["joint_attention_dim"]
        if T5 in self.text_parts:
            t5 = text_encoders[T5](**tokens[T5])[0].to(states.dtype)
        else:
            t5 = states.new_zeros(len(states), self.max_sequence_length, width)
        states = torch.cat([functional.pad(states, (0, width - states.shape[-1])), t5], dim=1)
        return {"prompt_embeds": states, "pooled_prompt_embeds": torch.cat([clip.text_embeds for clip in clips], -1)}

    def predict(self, denoiser: nn.Module, given: Noisy) -> Tensor:
        """What the transformer predicts for noisy latents, `(B, c, h, w)`."""
        return denoiser(
            hidden_states=given.latents,
            timestep=given.times,
            encoder_hidden_states=given.embeddings["prompt_embeds"],
            pooled_projections=given.embeddings["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def drawing_pipeline(self, denoiser: nn.Module, image_to_image: bool) -> Any:
        """The model as it is now without its text encoders."""
        nothing = dict.fromkeys(
            ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
        )
        return (self.image_to_image_class if image_to_image else self.pipeline_class)(
            vae=self.vae(denoiser.dtype).to(denoiser.device),
            transformer=denoiser,
            scheduler=self.scheduler(),
            **nothing,
        )
