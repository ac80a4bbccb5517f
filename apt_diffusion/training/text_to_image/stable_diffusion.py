"""All that the trainer must know of Stable Diffusion: its parts, its latents, how prompts condition its UNet."""

from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ... import StableDiffusionAPTImg2ImgPipeline, StableDiffusionAPTPipeline
from ...miniature import resolve_model

# What text encoders take, and what becomes of it: tensors by their argument names, the first axis is the prompts'.
Tokens = dict[str, Tensor]
Embeddings = dict[str, Tensor]


class StableDiffusionBase:
    """The base model: its parts are loaded when they are asked for, so that only what is needed is in memory.

    Args:
        name_or_path: a hub id, a folder, or `miniature`.
        revision, variant: of its files.
        vae: hub id or folder of another VAE, for the same latents.
    """

    text_parts = ("text_encoder",)
    largest_default_resolution = 512  # the default of diffusers' trainer; the model's own size where that is smaller
    pipeline_class = StableDiffusionAPTPipeline
    image_to_image_class = StableDiffusionAPTImg2ImgPipeline
    tag = "stable-diffusion"

    def __init__(
        self, name_or_path: str, revision: str | None = None, variant: str | None = None, vae: str | None = None
    ) -> None:
        self.path = resolve_model(name_or_path)
        self.revision = revision
        self.files = {"revision": revision, "variant": variant}
        self.other_vae = vae
        unet = UNet2DConditionModel.load_config(self.path, subfolder="unet", revision=revision)
        config_of = {"subfolder": "vae", "revision": revision} if vae is None else {}
        vae = AutoencoderKL.load_config(vae or self.path, **config_of)
        self.latent_channels = vae["latent_channels"]
        self.scaling_factor = vae["scaling_factor"]
        self.stride = 2 ** (len(vae["block_out_channels"]) - 1)  # pixels per latent cell
        self.native_resolution = unet["sample_size"] * self.stride
        if unet["in_channels"] != self.latent_channels or unet["out_channels"] != self.latent_channels:
            raise ValueError(
                f"{name_or_path} is no text-to-image model over latents of {self.latent_channels} channels, which "
                f"{self.other_vae or 'its VAE'} makes: its UNet has {unet['in_channels']} input and "
                f"{unet['out_channels']} output channels."
            )

    def check_resolution(self, resolution: int | None) -> int:
        """The size of the training squares; `ValueError` where the VAE cannot encode it whole."""
        if resolution is None:
            return min(self.native_resolution, self.largest_default_resolution)
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
        """UNet and text encoders without weights, from their configurations: to see whether settings fit them."""
        unet = UNet2DConditionModel.load_config(self.path, subfolder="unet", revision=self.revision)
        text = CLIPTextConfig.from_pretrained(self.path, subfolder="text_encoder", revision=self.revision)
        with torch.device("meta"):
            return {"unet": UNet2DConditionModel.from_config(unet), "text_encoder": CLIPTextModel(text)}

    def tokenizers(self, name: str | None = None) -> dict[str, Any]:
        """One per text encoder."""
        if name is not None:
            return {"text_encoder": AutoTokenizer.from_pretrained(name, revision=self.revision)}
        own = CLIPTokenizer.from_pretrained(self.path, subfolder="tokenizer", revision=self.revision)
        return {"text_encoder": own}

    def text_encoders(self, dtype: torch.dtype) -> dict[str, nn.Module]:
        return {"text_encoder": self.text_encoder(dtype)}

    def text_encoder(self, dtype: torch.dtype) -> CLIPTextModel:
        model = CLIPTextModel.from_pretrained(self.path, subfolder="text_encoder", dtype=dtype, **self.files)
        return model.requires_grad_(False)

    def vae(self, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
        place = {"subfolder": "vae", **self.files} if self.other_vae is None else {}
        model = AutoencoderKL.from_pretrained(self.other_vae or self.path, dtype=dtype, **place)
        return model.requires_grad_(False)

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        model = UNet2DConditionModel.from_pretrained(self.path, subfolder="unet", dtype=dtype, **self.files)
        return model.requires_grad_(False)

    def pipeline(self, dtype: torch.dtype) -> StableDiffusionPipeline:
        """The whole base model, without adapters."""
        parts = {} if self.other_vae is None else {"vae": self.vae(dtype)}
        return StableDiffusionPipeline.from_pretrained(
            self.path, dtype=dtype, safety_checker=None, requires_safety_checker=False, **parts, **self.files
        )

    def embed(self, text_encoders: dict[str, nn.Module], tokens: dict[str, Tokens]) -> Embeddings:
        """`prompt_embeds` `(B, L, d)`, by the name that the pipeline gives them."""
        return {"prompt_embeds": text_encoders["text_encoder"](**tokens["text_encoder"])[0]}

    def conditions(self, embeddings: Embeddings, time_ids: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """What the UNet gets beside latents and timesteps. `time_ids` `(B, 6)` say how pictures were cut."""
        return {"encoder_hidden_states": embeddings["prompt_embeds"].to(dtype)}

    def drawing_pipeline(self, unet: UNet2DConditionModel, image_to_image: bool) -> Any:
        """The model as it is now without its text encoders."""
        return (self.image_to_image_class if image_to_image else self.pipeline_class)(
            vae=self.vae(unet.dtype).to(unet.device),
            text_encoder=None,
            tokenizer=None,
            unet=unet,
            scheduler=self.sampler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def idle(self, parameter_name: str) -> bool:
        """Whether this parameter of an adapter sits where the UNet does not see what it does."""
        return False

    @torch.no_grad()
    def latent_distribution(self, vae: AutoencoderKL, pixels: Tensor) -> Tensor:
        """Mean and standard deviation of the latents: `(B, 3, H, W) -> (B, 2, c, h, w)`."""
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1).float() * self.scaling_factor

    @torch.no_grad()
    def draw(
        self,
        unet: UNet2DConditionModel,
        conditioning: tuple[Embeddings, Embeddings],
        seeds: list[int],
        resolution: int,
        start_images: list[Image.Image] | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Images of the model as it is now, drawn as the APT pipeline draws them, one per seed.

        Args:
            unet: with its adapter.
            conditioning: embeddings of prompt and negative prompt.
            seeds: of the starting noise, on the CPU.
            resolution: height and width.
            start_images: image to image instead, one image per seed.
            settings: `num_inference_steps`, `guidance_scale`.
        """
        pipeline = self.drawing_pipeline(unet, start_images is not None)
        pipeline.set_progress_bar_config(disable=True)
        prompt, negative = conditioning
        embeddings = prompt | {f"negative_{name}": embedding for name, embedding in negative.items()}
        embeddings = {name: embedding.to(unet.device, unet.dtype) for name, embedding in embeddings.items()}
        size = {"height": resolution, "width": resolution} if start_images is None else {}
        images = []
        # Accelerate's wrapper answers in float32 whatever the weights are; the VAE takes that under autocast only.
        with torch.autocast(unet.device.type, unet.dtype, enabled=unet.dtype != torch.float32):
            for index, seed in enumerate(seeds):  # one at a time: memory, and no image depends on how many there are
                start = {} if start_images is None else {"image": start_images[index].resize((resolution, resolution))}
                images += pipeline(
                    **embeddings,
                    generator=torch.Generator().manual_seed(seed),
                    **size,
                    **start,
                    **settings,
                ).images
        return images


class Prompts:
    """Prompts as embeddings: those that were kept, or the text encoders' as they are now where they learn.

    Args:
        prompts: all that will be asked for.
        base: the base model.
        text_encoders: its own, on their device.
        tokenizers: one for each.
        max_length: tokens per prompt; the tokenizer's maximum if `None`.
        use_attention_mask: hide padding from the text encoders.
    """

    def __init__(
        self,
        prompts: list[str],
        base: StableDiffusionBase,
        text_encoders: dict[str, nn.Module],
        tokenizers: dict[str, Any],
        max_length: int | None,
        use_attention_mask: bool,
    ) -> None:
        distinct = list(dict.fromkeys(prompts))
        self.base = base
        self.rows = {prompt: row for row, prompt in enumerate(distinct)}
        self.tokens: dict[str, Tokens] = {}  # by text encoder; each tensor (n, L)
        for part, text_encoder in text_encoders.items():
            longest = min(tokenizers[part].model_max_length, text_encoder.config.max_position_embeddings)
            tokens = tokenizers[part](
                distinct, truncation=True, padding="max_length", max_length=max_length or longest, return_tensors="pt"
            ).to(text_encoder.device)
            mask = {"attention_mask": tokens.attention_mask} if use_attention_mask else {}
            self.tokens[part] = {"input_ids": tokens.input_ids} | mask
            self.device = text_encoder.device
        self.embeddings: Embeddings | None = None

    @torch.no_grad()
    def keep_embeddings(self, text_encoders: dict[str, nn.Module]) -> None:
        """Encodes all prompts, one by one so that none depends on the others: the text encoders can go."""
        for text_encoder in text_encoders.values():
            text_encoder.eval()
        each = [self._encode(row[None], text_encoders) for row in torch.arange(len(self.rows), device=self.device)]
        self.embeddings = {name: torch.cat([one[name] for one in each]) for name in each[0]}

    def __call__(self, prompts: list[str], text_encoders: dict[str, nn.Module]) -> Embeddings:
        """The kept embeddings, or those of `text_encoders`, which read each distinct prompt once."""
        rows = torch.tensor([self.rows[prompt] for prompt in prompts], device=self.device)
        if self.embeddings is not None:
            return {name: embedding[rows] for name, embedding in self.embeddings.items()}
        distinct, places = rows.unique(return_inverse=True)
        return {name: embedding[places] for name, embedding in self._encode(distinct, text_encoders).items()}

    def _encode(self, rows: Tensor, text_encoders: dict[str, nn.Module]) -> Embeddings:
        tokens = {
            part: {name: tensor[rows] for name, tensor in of_part.items()} for part, of_part in self.tokens.items()
        }
        return self.base.embed(text_encoders, tokens)
