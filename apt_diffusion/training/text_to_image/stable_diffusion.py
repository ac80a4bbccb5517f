"""Stable Diffusion in the trainer: loading its components, encoding latents, and conditioning the UNet on prompts."""

import argparse
import logging
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ... import StableDiffusionAPTImg2ImgPipeline, StableDiffusionAPTPipeline
from ...miniature import resolve_model
from .latents import LatentSpace
from .noisy import Noisy
from .sampling import GUIDANCE, guidance_embedding

logger = logging.getLogger(__name__)

# Text-encoder inputs and outputs by argument name; axis 0 indexes prompts.
Tokens = dict[str, Tensor]
Embeddings = dict[str, Tensor]


def load_config(model_class: type[ConfigMixin], path: str, **place: Any) -> dict[str, Any]:
    """A part's settings as its file has them; `ValueError` where it is of another class."""
    config = model_class.load_config(path, **place)
    name = config.get("_class_name") or " or ".join(config.get("architectures") or ["model of another kind"])
    if name != model_class.__name__:
        raise ValueError(f"{path} has a {name} where this trainer needs a {model_class.__name__}.")
    return config


def full_config(model_class: type[ConfigMixin], path: str, **place: Any) -> dict[str, Any]:
    """A part's settings, with its class's defaults for what its file does not say; else as `load_config`."""
    with torch.device("meta"):
        return dict(model_class.from_config(load_config(model_class, path, **place)).config)


def side_of(sample_size: Any, otherwise: int) -> int:
    """The side of square latents by a denoiser's `sample_size`: a number, height and width, or nothing."""
    if isinstance(sample_size, list | tuple):
        return min(sample_size)
    return otherwise if sample_size is None else sample_size


class StableDiffusionBase:
    """The base model. Each part is loaded by a method of its own, so that only those in use are in memory.

    Args:
        name_or_path: a hub id, a folder, or `miniature`.
        revision, variant: of its files.
        vae: hub id or folder of another VAE, for the same latents.
    """

    family = "Stable Diffusion"  # as people call it
    vae_class: Any = AutoencoderKL
    denoiser_part = "unet"
    denoiser_class: Any = UNet2DConditionModel
    text_parts: tuple[str, ...] = ("text_encoder",)
    trained_text_parts: tuple[str, ...] | None = None  # by --train_text_encoder; `None`: all of them
    largest_default_resolution = 512  # the default of diffusers' trainer; the model's own size where that is smaller
    pipeline_class: Any = StableDiffusionAPTPipeline
    image_to_image_class: Any = StableDiffusionAPTImg2ImgPipeline
    tag = "stable-diffusion"
    ignored_by_pipeline: tuple[str, ...] = ("shift_factor", "latents_mean", "latents_std")  # settings of the VAE
    guidance_width: int | None = None  # of the guidance as an input, which UNets of latent consistency models take
    guidance: float = GUIDANCE  # that such a UNet is trained at
    max_sequence_length: int | None = None  # tokens that a text encoder beside CLIP reads; `None` where there is none
    longest_sequence: int | None = None  # what its pipeline allows
    text_encoder_out_layers: tuple[int, ...] | None = None  # whose states are the text's, where that can be chosen
    keeps_embeddings = False  # whether prompts are encoded before the denoiser is loaded, whatever the flags say
    takes_negative_prompts = True
    is_distilled = False  # as its files say, for pictures in few steps
    takes_guidance = False  # whether the denoiser was distilled to be given the guidance
    default_guidance = GUIDANCE  # of samples of a base that is not distilled
    image_to_image_has_size = False  # whether that pipeline takes height and width, and else the model's own size

    def __init__(
        self, name_or_path: str, revision: str | None = None, variant: str | None = None, vae: str | None = None
    ) -> None:
        self.path = resolve_model(name_or_path)
        self.revision = revision
        self.files = {"revision": revision, "variant": variant}
        self.other_vae = vae
        config_of = {"subfolder": "vae", "revision": revision} if vae is None else {}
        vae_config = full_config(self.vae_class, vae or self.path, **config_of)
        self.read_vae(vae_config)
        self.read_denoiser(name_or_path)
        self.unapplied = [name for name in self.ignored_by_pipeline if vae_config.get(name)]
        if self.unapplied:
            logger.warning(
                "The VAE has %s. Training and its samples apply it; diffusers' %s ignores it, so pictures drawn with "
                "that pipeline will differ.", " and ".join(self.unapplied), self.pipeline_class.__name__,
            )  # fmt: skip

    def read_vae(self, config: dict[str, Any]) -> None:
        """Channels, scale and size of the latents, from the VAE's settings."""
        self.latent_channels = config["latent_channels"]
        self.latent_space = LatentSpace(config)
        self.stride = 2 ** (len(config["block_out_channels"]) - 1)  # pixels per latent cell

    def read_denoiser(self, name_or_path: str) -> None:
        """The UNet's settings; `ValueError` where it is no text-to-image model of these latents."""
        unet = full_config(UNet2DConditionModel, self.path, subfolder="unet", revision=self.revision)
        largest = self.largest_default_resolution // self.stride
        self.native_resolution = side_of(unet["sample_size"], largest) * self.stride
        self.guidance_width = unet["time_cond_proj_dim"]
        self.has_class_embedding = unet["class_embed_type"] is not None or unet["num_class_embeds"] is not None
        self.check_channels(name_or_path, "UNet", unet)

    def check_channels(self, name_or_path: str, kind: str, config: dict[str, Any]) -> None:
        """`ValueError` where the denoiser's channels are not those of the latents."""
        if {config["in_channels"], config["out_channels"] or config["in_channels"]} != {self.latent_channels}:
            raise ValueError(
                f"{name_or_path} is no text-to-image model over latents of {self.latent_channels} channels, which "
                f"{self.other_vae or 'its VAE'} makes: its {kind} has {config['in_channels']} input and "
                f"{config['out_channels']} output channels."
            )

    def configure(self, args: argparse.Namespace) -> None:
        """Takes over the script's flags that only some families know; `ValueError` for a value that it cannot take."""

    def drawing_settings(self, args: argparse.Namespace) -> dict[str, Any]:
        """Steps and guidance of images that the trainer draws, by the names that the pipeline gives them."""
        return {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}

    def class_picture_settings(self, args: argparse.Namespace, count: int) -> dict[str, Any]:
        """What the stock pipeline is told beside the prompts when it draws so many pictures of the class."""
        return self.drawing_settings(args)

    def check_resolution(self, resolution: int | None) -> int:
        """The size of the training squares; `ValueError` where the VAE cannot encode it whole."""
        if resolution is None:
            return min(self.native_resolution, self.largest_default_resolution)
        if resolution % self.stride:
            raise ValueError(f"--resolution must be a multiple of {self.stride}, got {resolution}.")
        return resolution

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """`(c, h, w)` of a square's latents."""
        return self.latent_channels, resolution // self.stride, resolution // self.stride

    def scheduler(self) -> Any:
        """The scheduler that the model itself names, with its own class's defaults: for training and for samples.

        Raises:
            ValueError: for a class that diffusers does not have, or settings that it does not take.
        """
        config = DDPMScheduler.load_config(self.path, subfolder="scheduler", revision=self.revision)
        scheduler_class: Any = getattr(diffusers, str(config.get("_class_name")), None)
        is_scheduler = isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)
        if not is_scheduler:
            name = config.get("_class_name")
            raise ValueError(f"The base model's scheduler is {name}, which diffusers does not have.")
        try:
            return scheduler_class.from_config(config)
        except Exception as error:  # each class has errors of its own
            raise ValueError(
                f"The base model's scheduler/scheduler_config.json makes no {scheduler_class.__name__}: {error}. "
                "Take the file from the model's own repository."
            ) from error

    def architecture(self) -> str:
        """The model's family as ModelSpec names it; `stable-diffusion` alone for one of other widths than 1 and 2."""
        width = UNet2DConditionModel.load_config(self.path, subfolder="unet", revision=self.revision).get(
            "cross_attention_dim"
        )
        predicts_velocity = self.scheduler().config.get("prediction_type") == "v_prediction"
        second = "stable-diffusion-v2-768-v" if predicts_velocity else "stable-diffusion-v2-512"
        return {768: "stable-diffusion-v1", 1024: second}.get(width, "stable-diffusion")

    def skeletons(self) -> dict[str, nn.Module]:
        """UNet and text encoders without weights, from their configurations: to see whether settings fit them."""
        unet = UNet2DConditionModel.load_config(self.path, subfolder="unet", revision=self.revision)
        text = self.text_config("text_encoder")
        with torch.device("meta"):
            return {"unet": UNet2DConditionModel.from_config(unet), "text_encoder": CLIPTextModel(text)}

    def check_widths(self, skeletons: dict[str, nn.Module]) -> None:
        """`ValueError` where text encoders and denoiser do not belong together."""
        width = sum(skeletons[part].config.hidden_size for part in self.text_parts)
        taken = skeletons["unet"].config.cross_attention_dim
        if isinstance(taken, int) and taken != width:  # else a width for each block
            raise ValueError(
                f"The parts of {self.path} do not belong together: its UNet takes texts of width "
                f"{taken}, its text encoders give {width}."
            )

    def tokenizers(self, name: str | None = None) -> dict[str, Any]:
        """One per text encoder."""
        if name is not None:
            return {"text_encoder": AutoTokenizer.from_pretrained(name, revision=self.revision)}
        own = CLIPTokenizer.from_pretrained(self.path, subfolder="tokenizer", revision=self.revision)
        return {"text_encoder": own}

    def text_config(self, part: str) -> CLIPTextConfig:
        """A text encoder's settings; `ValueError` where it is no CLIP's."""
        place = {"subfolder": part, "revision": self.revision}
        kind = CLIPTextConfig.get_config_dict(self.path, **place)[0].get("model_type", "clip_text_model")
        if kind not in ("clip", "clip_text_model"):
            raise ValueError(f"The {part} of {self.path} is a {kind!r} model where this trainer needs CLIP's.")
        return CLIPTextConfig.from_pretrained(self.path, **place)

    def longest_texts(self) -> dict[str, int]:
        """How many tokens each text encoder reads."""
        return {part: self.text_config(part).max_position_embeddings for part in self.text_parts}

    def text_encoders(self, dtype: torch.dtype) -> dict[str, nn.Module]:
        """The frozen text encoders, by part."""
        return {"text_encoder": self.text_encoder(dtype)}

    def text_encoder(self, dtype: torch.dtype) -> CLIPTextModel:
        """The frozen text encoder."""
        model = CLIPTextModel.from_pretrained(self.path, subfolder="text_encoder", dtype=dtype, **self.files)
        return model.requires_grad_(False)

    def vae(self, dtype: torch.dtype = torch.float32) -> Any:
        """The frozen VAE, or the other one."""
        place = {"subfolder": "vae", **self.files} if self.other_vae is None else {}
        model = self.vae_class.from_pretrained(self.other_vae or self.path, dtype=dtype, **place)
        return model.requires_grad_(False)

    def denoiser(self, dtype: torch.dtype, **settings: Any) -> Any:
        """The frozen UNet or transformer; `settings` are more arguments of `from_pretrained`."""
        place = {"subfolder": self.denoiser_part, **self.files, **settings}
        return self.denoiser_class.from_pretrained(self.path, dtype=dtype, **place).requires_grad_(False)

    def pipeline(self, dtype: torch.dtype) -> StableDiffusionPipeline:
        """The whole base model, without adapters."""
        parts = {} if self.other_vae is None else {"vae": self.vae(dtype)}
        return StableDiffusionPipeline.from_pretrained(
            self.path, dtype=dtype, safety_checker=None, requires_safety_checker=False, **parts, **self.files
        )

    def embed(self, text_encoders: dict[str, nn.Module], tokens: dict[str, Tokens]) -> Embeddings:
        """`prompt_embeds` `(B, L, d)`, by the name that the pipeline gives them."""
        return {"prompt_embeds": text_encoders["text_encoder"](**tokens["text_encoder"])[0]}

    def conditions(self, given: Noisy) -> dict[str, Any]:
        """The UNet's other inputs next to latents, times and class labels."""
        states = given.embeddings["prompt_embeds"]
        if self.guidance_width is None:
            return {"encoder_hidden_states": states}
        guidance = guidance_embedding(self.guidance, self.guidance_width, states)
        return {"encoder_hidden_states": states, "timestep_cond": guidance}

    def predict(self, denoiser: nn.Module, given: Noisy) -> Tensor:
        """What the denoiser predicts for noisy latents, `(B, c, h, w)`.

        Args:
            denoiser: with its adapter, as the run has wrapped it.
            given: in the precision of the frozen weights.
        """
        others = self.conditions(given) | {"class_labels": given.class_labels}
        return denoiser(given.latents, given.times, **others, return_dict=False)[0]

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
        """Whether this parameter of an adapter has no influence on the UNet."""
        return False

    @torch.no_grad()
    def latent_distribution(self, vae: Any, pixels: Tensor) -> Tensor:
        """Mean and standard deviation of the latents: `(B, 3, H, W) -> (B, 2, c, h, w)`."""
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return self.latent_space.from_vae(posterior.mean, posterior.std)

    @torch.no_grad()
    def pictures(self, pipeline: Any, *args: Any, **settings: Any) -> list[Image.Image]:
        """What the pipeline draws; a VAE's map that this pipeline ignores is applied here."""
        if not self.unapplied:
            return pipeline(*args, **settings).images
        vae = self.vae().to(pipeline.device)
        if isinstance(settings.get("image"), Image.Image):
            pixels = pipeline.image_processor.preprocess(settings["image"])
            mean, std = self.latent_distribution(vae, pixels).unbind(1)
            noise = randn_tensor(mean.shape, settings["generator"], mean.device)  # as the pipeline draws it
            settings["image"] = (mean + std * noise).to(getattr(pipeline, self.denoiser_part).dtype)
        latents = pipeline(*args, **settings, output_type="latent").images
        pixels = vae.decode(self.latent_space.to_vae(latents.float()), return_dict=False)[0]
        return pipeline.image_processor.postprocess(pixels)

    def without_negative(self, empty: Embeddings) -> Embeddings:
        """What stands for no negative prompt, by the embeddings of the empty text."""
        return empty

    def drawing_inputs(self, prompt: Embeddings, negative: Embeddings) -> dict[str, Any]:
        """Embeddings of prompt and negative prompt, by the names that the pipeline gives them."""
        return prompt | {f"negative_{name}": embedding for name, embedding in negative.items()}

    @torch.no_grad()
    def draw(
        self,
        denoiser: Any,
        conditioning: tuple[Embeddings, Embeddings],
        seeds: list[int],
        resolution: int | tuple[int, int],
        start_images: list[Image.Image] | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Images of the model as it is now, drawn as the APT pipeline draws them, one per seed.

        Args:
            denoiser: with its adapter.
            conditioning: embeddings of prompt and negative prompt.
            seeds: of the starting noise, on the CPU.
            resolution: height and width, or the side of a square.
            start_images: image to image instead, one image per seed.
            settings: of `drawing_settings`.
        """
        pipeline = self.drawing_pipeline(denoiser, start_images is not None)
        pipeline.set_progress_bar_config(disable=True)
        moved = [
            {
                name: tensor.to(denoiser.device, denoiser.dtype if tensor.is_floating_point() else None)
                for name, tensor in embeddings.items()
            }
            for embeddings in conditioning
        ]
        embeddings = self.drawing_inputs(*moved)
        takes_size = start_images is None or self.image_to_image_has_size
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        size = {"height": height, "width": width} if takes_size else {}
        images = []
        # Accelerate's wrapper answers in float32 whatever the weights are; the VAE takes that under autocast only.
        with torch.autocast(denoiser.device.type, denoiser.dtype, enabled=denoiser.dtype != torch.float32):
            for index, seed in enumerate(seeds):  # one at a time: memory, and no image depends on how many there are
                start = {} if start_images is None else {"image": start_images[index].resize((width, height))}
                drawn = {"generator": torch.Generator().manual_seed(seed), **size, **start, **settings}
                images += self.pictures(pipeline, **embeddings, **drawn)
        return images
