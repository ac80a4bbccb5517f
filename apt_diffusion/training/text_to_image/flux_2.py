"""Flux.2 and Flux.2 Klein in the trainer: states of several layers of Mistral or Qwen3, and whitened patches."""

import argparse
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from torch import Tensor, nn

from ... import Flux2APTPipeline, Flux2KleinAPTPipeline
from .flow_transformer import PROMPT, tokens_before
from .guided_transformer import GuidedTransformerBase
from .noisy import Noisy
from .stable_diffusion import Embeddings

PATCH = 2  # latent cells on each side of a patch


class Flux2Base(GuidedTransformerBase):
    """[`GuidedTransformerBase`] of Flux.2, whose latents are those of 2 x 2 cells, whitened by the VAE's batch norm.

    Attributes:
        text_encoder_out_layers: whose states are the text's.
    """

    family = "Flux.2"
    stock_class: Any = Flux2Pipeline
    pipeline_class: Any = Flux2APTPipeline
    vae_class = AutoencoderKLFlux2
    denoiser_class = Flux2Transformer2DModel
    tag = "flux-2"
    ignored_by_pipeline = ()
    default_guidance = 4.0
    sides = 1
    samples_posterior = False
    text_encoder_out_layers = (10, 20, 30)

    def read_vae(self, config: dict[str, Any]) -> None:
        """See `StableDiffusionBase`; scale and shift are weights of the VAE."""
        if tuple(config["patch_size"]) != (PATCH, PATCH):
            raise ValueError(
                f"The VAE of {self.path} has patches of {config['patch_size']}, not of {PATCH} x {PATCH}."
            )
        self.latent_channels = config["latent_channels"] * PATCH**2
        self.vae_stride = 2 ** (len(config["block_out_channels"]) - 1)
        self.stride = self.vae_stride * PATCH

    def configure(self, args: argparse.Namespace) -> None:
        """See `StableDiffusionBase`."""
        super().configure(args)
        if args.text_encoder_out_layers is not None:
            self.text_encoder_out_layers = tuple(args.text_encoder_out_layers)

    def architecture(self) -> str:
        """See `StableDiffusionBase`."""
        return "flux-2"

    def text_widths(self) -> dict[str, int]:
        """See `FlowTransformerBase`; `ValueError` where the text encoder lacks a layer."""
        config = self.text_config("text_encoder").get_text_config()
        if max(self.text_encoder_out_layers) > config.num_hidden_layers:
            raise ValueError(
                f"--text_encoder_out_layers {' '.join(map(str, self.text_encoder_out_layers))}: the text encoder of "
                f"{self.path} has {config.num_hidden_layers} layers."
            )
        return {"joint_attention_dim": config.hidden_size * len(self.text_encoder_out_layers)}

    def text_before(self, tokenizer: Any) -> int:
        """Tokens of the system's message and the chat template before a prompt."""
        content = [{"type": "text", "text": PROMPT}]
        system = {"role": "system", "content": [{"type": "text", "text": SYSTEM_MESSAGE}]}
        text = tokenizer.apply_chat_template([system, {"role": "user", "content": content}], tokenize=False)
        return tokens_before(tokenizer, text)

    def encode(self, pipeline: Any, prompt: str, device: torch.device) -> Embeddings:
        """`prompt_embeds` `(1, L, n d)` of n layers, padded to L as the pipeline does."""
        states, _ = pipeline.encode_prompt(
            [prompt],
            device=device,
            max_sequence_length=self.max_sequence_length,
            text_encoder_out_layers=self.text_encoder_out_layers,
        )
        return {"prompt_embeds": states}

    def class_picture_settings(self, args: argparse.Namespace, count: int) -> dict[str, Any]:
        """See `FlowTransformerBase`."""
        layers = {"text_encoder_out_layers": self.text_encoder_out_layers}
        return super().class_picture_settings(args, count) | layers

    @torch.no_grad()
    def latent_distribution(self, vae: Any, pixels: Tensor) -> Tensor:
        """Means of the latents, and deviations of zero: `(B, 3, H, W) -> (B, 2, c, h, w)`."""
        mode = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
        batch, channels, height, width = mode.shape
        patches = mode.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
        patches = patches.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, height // PATCH, width // PATCH)
        mean, variance = (buffer.float().view(-1, 1, 1) for buffer in (vae.bn.running_mean, vae.bn.running_var))
        latents = (patches - mean) / (variance + vae.config.batch_norm_eps).sqrt()
        return torch.stack([latents, torch.zeros_like(latents)], dim=1)

    def predict(self, denoiser: nn.Module, given: Noisy) -> Tensor:
        """What the transformer predicts for noisy latents, `(B, c, h, w)`."""
        batch, _, height, width = given.latents.shape
        states = given.embeddings["prompt_embeds"]
        prediction = denoiser(
            hidden_states=given.latents.flatten(2).transpose(1, 2),
            timestep=given.times / 1000,
            guidance=self.guidance_for(given),
            encoder_hidden_states=states,
            txt_ids=places(1, 1, states.shape[1], states.device).expand(batch, -1, -1),
            img_ids=places(height, width, 1, states.device).expand(batch, -1, -1),
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2).reshape(given.latents.shape)


class Flux2KleinBase(Flux2Base):
    """[`Flux2Base`] of Klein: Qwen3 reads the texts, and the transformer takes no guidance."""

    family = "Flux.2 Klein"
    stock_class = Flux2KleinPipeline
    pipeline_class = Flux2KleinAPTPipeline
    text_encoder_out_layers = (9, 18, 27)

    def read_denoiser(self, name_or_path: str) -> None:
        """See `Flux2Base`; its pipeline gives no guidance, whatever the transformer could take."""
        super().read_denoiser(name_or_path)
        self.takes_guidance = False
        self.is_distilled = self.settings.get("is_distilled", False)
        self.takes_negative_prompts = not self.is_distilled
        self.drawing_options = {"is_distilled": self.is_distilled}

    def text_before(self, tokenizer: Any) -> int:
        """The chat template's tokens before a prompt."""
        chat = [{"role": "user", "content": PROMPT}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return tokens_before(tokenizer, text)

    def drawing_inputs(self, prompt: Embeddings, negative: Embeddings) -> dict[str, Any]:
        """With a negative prompt, unless the model was distilled to do without."""
        return prompt | {"negative_prompt_embeds": negative["prompt_embeds"]}


def places(height: int, width: int, length: int, device: torch.device) -> Tensor:
    """Picture, row, column and place in the text of each token, `(height * width * length, 4)`."""
    sides = (torch.arange(size, device=device) for size in (1, height, width, length))
    return torch.cartesian_prod(*sides)
