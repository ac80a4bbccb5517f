"""All that the trainer must know of Stable Diffusion: its parts, its latents, how prompts condition its UNet."""

from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from apt_diffusion import StableDiffusionAPTImg2ImgPipeline, StableDiffusionAPTPipeline
from apt_diffusion.miniature import resolve_model

# The default resolution of diffusers' trainer; models that can draw larger are trained at this if nothing is said.
LARGEST_DEFAULT_RESOLUTION = 512


class StableDiffusionBase:
    """The base model: its parts are loaded when they are asked for, so that only what is needed is in memory."""

    def __init__(self, name_or_path: str, revision: str | None = None, variant: str | None = None) -> None:
        self.path = resolve_model(name_or_path)
        self.revision = revision
        self.files = {"revision": revision, "variant": variant}
        unet = UNet2DConditionModel.load_config(self.path, subfolder="unet", revision=revision)
        vae = AutoencoderKL.load_config(self.path, subfolder="vae", revision=revision)
        self.latent_channels = vae["latent_channels"]
        self.scaling_factor = vae["scaling_factor"]
        self.stride = 2 ** (len(vae["block_out_channels"]) - 1)  # pixels per latent cell
        self.native_resolution = unet["sample_size"] * self.stride
        if unet["in_channels"] != self.latent_channels or unet["out_channels"] != self.latent_channels:
            raise ValueError(
                f"{name_or_path} is no text-to-image model over latents of {self.latent_channels} channels: its UNet "
                f"has {unet['in_channels']} input and {unet['out_channels']} output channels."
            )

    def check_resolution(self, resolution: int | None) -> int:
        """The size of the training squares; `ValueError` where the VAE cannot encode it whole."""
        if resolution is None:
            return min(self.native_resolution, LARGEST_DEFAULT_RESOLUTION)
        if resolution % self.stride:
            raise ValueError(f"--resolution must be a multiple of {self.stride}, got {resolution}.")
        return resolution

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        return self.latent_channels, resolution // self.stride, resolution // self.stride

    def noise_schedule(self) -> DDPMScheduler:
        return DDPMScheduler.from_pretrained(self.path, subfolder="scheduler", revision=self.revision)

    def sampler(self) -> Any:
        """The scheduler that the model itself names: samples look as they will in use."""
        config = DDPMScheduler.load_config(self.path, subfolder="scheduler", revision=self.revision)
        return getattr(diffusers, config["_class_name"]).from_config(config)

    def skeletons(self) -> dict[str, nn.Module]:
        """UNet and text encoder without weights, from their configurations: to see whether settings fit them."""
        unet = UNet2DConditionModel.load_config(self.path, subfolder="unet", revision=self.revision)
        text = CLIPTextConfig.from_pretrained(self.path, subfolder="text_encoder", revision=self.revision)
        with torch.device("meta"):
            return {"unet": UNet2DConditionModel.from_config(unet), "text_encoder": CLIPTextModel(text)}

    def tokenizer(self, name: str | None = None) -> Any:
        if name is not None:
            return AutoTokenizer.from_pretrained(name, revision=self.revision)
        return CLIPTokenizer.from_pretrained(self.path, subfolder="tokenizer", revision=self.revision)

    def text_encoder(self, dtype: torch.dtype) -> CLIPTextModel:
        model = CLIPTextModel.from_pretrained(self.path, subfolder="text_encoder", dtype=dtype, **self.files)
        return model.requires_grad_(False)

    def vae(self, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
        model = AutoencoderKL.from_pretrained(self.path, subfolder="vae", torch_dtype=dtype, **self.files)
        return model.requires_grad_(False)

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        model = UNet2DConditionModel.from_pretrained(self.path, subfolder="unet", torch_dtype=dtype, **self.files)
        return model.requires_grad_(False)

    def pipeline(self, dtype: torch.dtype) -> StableDiffusionPipeline:
        """The whole base model, without adapters."""
        return StableDiffusionPipeline.from_pretrained(
            self.path, torch_dtype=dtype, safety_checker=None, requires_safety_checker=False, **self.files
        )

    @torch.no_grad()
    def latent_distribution(self, vae: AutoencoderKL, pixels: Tensor) -> Tensor:
        """Mean and standard deviation of the latents: `(B, 3, H, W) -> (B, 2, c, h, w)`."""
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1).float() * self.scaling_factor

    @torch.no_grad()
    def draw(
        self,
        unet: UNet2DConditionModel,
        conditioning: tuple[Tensor, Tensor],
        seeds: list[int],
        resolution: int,
        start_images: list[Image.Image] | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Images of the model as it is now, drawn as the APT pipeline draws them, one per seed.

        Args:
            unet: with its adapter.
            conditioning: embeddings of prompt and negative prompt, `(1, L, d)` each.
            seeds: of the starting noise, on the CPU.
            resolution: height and width.
            start_images: image to image instead, one image per seed.
            settings: `num_inference_steps`, `guidance_scale`.
        """
        pipeline_class = StableDiffusionAPTPipeline if start_images is None else StableDiffusionAPTImg2ImgPipeline
        pipeline = pipeline_class(
            vae=self.vae(unet.dtype).to(unet.device),
            text_encoder=None,
            tokenizer=None,
            unet=unet,
            scheduler=self.sampler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        prompt, negative = (embedding.to(unet.device, unet.dtype) for embedding in conditioning)
        size = {"height": resolution, "width": resolution} if start_images is None else {}
        images = []
        # Accelerate's wrapper answers in float32 whatever the weights are; the VAE takes that under autocast only.
        with torch.autocast(unet.device.type, unet.dtype, enabled=unet.dtype != torch.float32):
            for index, seed in enumerate(seeds):  # one at a time: memory, and no image depends on how many there are
                start = {} if start_images is None else {"image": start_images[index].resize((resolution, resolution))}
                images += pipeline(
                    prompt_embeds=prompt,
                    negative_prompt_embeds=negative,
                    generator=torch.Generator().manual_seed(seed),
                    **size,
                    **start,
                    **settings,
                ).images
        return images


class Prompts:
    """Prompts as conditioning of the UNet: kept embeddings, or the text encoder's as it is now where it learns.

    Args:
        prompts: all that will be asked for.
        tokenizer: of the base model.
        max_length: tokens per prompt; the tokenizer's maximum if `None`.
        use_attention_mask: hide padding from the text encoder.
        text_encoder: of the base model, on its device.
    """

    def __init__(
        self,
        prompts: list[str],
        tokenizer: Any,
        max_length: int | None,
        use_attention_mask: bool,
        text_encoder: CLIPTextModel,
    ) -> None:
        distinct = list(dict.fromkeys(prompts))
        max_length = max_length or min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
        tokens = tokenizer(distinct, truncation=True, padding="max_length", max_length=max_length, return_tensors="pt")
        self.rows = {prompt: row for row, prompt in enumerate(distinct)}
        self.input_ids = tokens.input_ids.to(text_encoder.device)  # (n, L)
        self.attention_mask = tokens.attention_mask.to(text_encoder.device) if use_attention_mask else None
        self.embeddings: Tensor | None = None  # (n, L, d)

    @torch.no_grad()
    def keep_embeddings(self, text_encoder: CLIPTextModel) -> None:
        """Encodes all prompts, one by one so that none depends on the others: the text encoder can go."""
        text_encoder.eval()
        rows = torch.arange(len(self.rows), device=self.input_ids.device)
        self.embeddings = torch.cat([self._encode(row[None], text_encoder) for row in rows])

    def __call__(self, prompts: list[str], text_encoder: nn.Module | None) -> Tensor:
        """Embeddings `(B, L, d)`: the kept ones, or those of `text_encoder`, which reads each distinct prompt once."""
        rows = torch.tensor([self.rows[prompt] for prompt in prompts], device=self.input_ids.device)
        if self.embeddings is not None:
            return self.embeddings[rows]
        distinct, places = rows.unique(return_inverse=True)
        return self._encode(distinct, text_encoder)[places]

    def _encode(self, rows: Tensor, text_encoder: nn.Module) -> Tensor:
        mask = None if self.attention_mask is None else self.attention_mask[rows]
        return text_encoder(self.input_ids[rows], attention_mask=mask)[0]
