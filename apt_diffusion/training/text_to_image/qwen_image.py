"""Qwen-Image in the trainer: Qwen2.5-VL reads the texts, and the VAE is one of videos, here of one frame."""

import argparse
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor, nn

from ... import QwenImageAPTPipeline
from .flow_transformer import MASK, FlowTransformerBase, pack, unpack
from .latents import LatentSpace
from .noisy import Noisy
from .stable_diffusion import Embeddings


class QwenImageBase(FlowTransformerBase):
    """[`FlowTransformerBase`] of Qwen-Image. Each channel of its latents has a mean and a deviation."""

    family = "Qwen-Image"
    stock_class = QwenImagePipeline
    pipeline_class = QwenImageAPTPipeline
    image_to_image_class = QwenImageImg2ImgPipeline
    vae_class = AutoencoderKLQwenImage
    denoiser_class = QwenImageTransformer2DModel
    tag = "qwen-image"
    ignored_by_pipeline = ()
    longest_sequence = 1024
    default_guidance = 4.0

    def read_vae(self, config: dict[str, Any]) -> None:
        """See `StableDiffusionBase`."""
        self.latent_channels = config["z_dim"]
        self.latent_space = LatentSpace(config | {"latent_channels": config["z_dim"], "scaling_factor": 1.0})
        self.stride = self.vae_stride = 2 ** len(config["temperal_downsample"])

    def token_channels(self) -> tuple[int, int]:
        """See `FlowTransformerBase`: the output is counted in channels of a latent cell."""
        taken, returned = super().token_channels()
        return taken, returned * self.transformer["patch_size"] ** 2

    def architecture(self) -> str:
        """See `StableDiffusionBase`."""
        return "qwen-image"

    def text_widths(self) -> dict[str, int]:
        """See `FlowTransformerBase`."""
        return {"joint_attention_dim": self.text_width("text_encoder")}

    def encode(self, pipeline: Any, prompt: str, device: torch.device) -> Embeddings:
        """`prompt_embeds` `(1, L, d)`, as long as the prompt is, and a mask of ones."""
        states, _ = pipeline.encode_prompt([prompt], device=device, max_sequence_length=self.max_sequence_length)
        return {"prompt_embeds": states, MASK: torch.ones(states.shape[:2], dtype=torch.long)}

    def drawing_settings(self, args: argparse.Namespace) -> dict[str, Any]:
        """Guidance by a negative prompt is `true_cfg_scale` there."""
        return {"num_inference_steps": args.num_inference_steps, "true_cfg_scale": args.guidance_scale}

    def class_picture_settings(self, args: argparse.Namespace, count: int) -> dict[str, Any]:
        """With empty negative prompts, without which the pipeline does not guide."""
        return super().class_picture_settings(args, count) | {"negative_prompt": [""] * count}

    @torch.no_grad()
    def latent_distribution(self, vae: Any, pixels: Tensor) -> Tensor:
        """Mean and standard deviation of the latents: `(B, 3, H, W) -> (B, 2, c, h, w)`."""
        posterior = vae.encode(pixels.to(vae.device, vae.dtype).unsqueeze(2)).latent_dist  # (B, c, 1, h, w)
        return self.latent_space.from_vae(posterior.mean.squeeze(2), posterior.std.squeeze(2))

    def predict(self, denoiser: nn.Module, given: Noisy) -> Tensor:
        """What the transformer predicts for noisy latents, `(B, c, h, w)`."""
        batch, _, height, width = given.latents.shape
        mask = given.embeddings[MASK]
        prediction = denoiser(
            hidden_states=pack(given.latents),
            timestep=given.times / 1000,
            encoder_hidden_states=given.embeddings["prompt_embeds"],
            encoder_hidden_states_mask=None if mask.all() else mask,  # as the pipeline does
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        return unpack(prediction, height, width)
