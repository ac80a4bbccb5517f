"""Stable Diffusion as the trainer uses it: its parts, its latents, how prompts condition its UNet."""

from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers import SchedulerMixin
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ... import StableDiffusionAPTImg2ImgPipeline, StableDiffusionAPTPipeline
from ...miniature import resolve_model

# Text-encoder inputs and outputs by argument name; axis 0 indexes prompts.
Tokens = dict[str, Tensor]
Embeddings = dict[str, Tensor]


class StableDiffusionBase:
    """The base model: its parts are loaded when they are asked for, so that only what is needed is in memory.

    Args:
        name_or_path: a hub id, a folder, or `miniature`.
        revision, variant: of its files.
        vae: hub id or folder of another VAE, for the same latents.
    """

    text_parts: tuple[str, ...] = ("text_encoder",)
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
        vae_config = AutoencoderKL.load_config(vae or self.path, **config_of)
        self.latent_channels: int = vae_config["latent_channels"]
        self.scaling_factor: float = vae_config["scaling_factor"]
        self.stride = 2 ** (len(vae_config["block_out_channels"]) - 1)  # pixels per latent cell
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

    def scheduler(self) -> Any:
        """The scheduler that the model itself names, with its own class's defaults: for training and for samples.

        Raises:
            ValueError: for a class that diffusers does not have.
        """
        config = DDPMScheduler.load_config(self.path, subfolder="scheduler", revision=self.revision)
        scheduler_class: Any = getattr(diffusers, config["_class_name"], None)
        is_scheduler = isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)
        if not is_scheduler:
            raise ValueError(f"The base model's scheduler is {config['_class_name']}, which diffusers does not have.")
        return scheduler_class.from_config(config)

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

    def longest_texts(self) -> dict[str, int]:
        """How many tokens each text encoder reads."""
        skeletons = self.skeletons()
        return {part: skeletons[part].config.max_position_embeddings for part in self.text_parts}

    def text_encoders(self, dtype: torch.dtype) -> dict[str, nn.Module]:
        """The frozen text encoders by part."""
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
            scheduler=self.scheduler(),
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
