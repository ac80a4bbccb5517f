"""What Flux, Qwen-Image and Z-Image have in common in the trainer: a transformer, and texts read by language models.

A language model is as large as the transformer. So all prompts are encoded before the first step, by the stock
pipeline's own `encode_prompt`, and the text encoders are freed before the transformer is loaded.

axes: B batch, c channels, h height, w width, L tokens of text, N tokens of the picture
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from .stable_diffusion import Embeddings, StableDiffusionBase, full_config

MASK = "prompt_embeds_mask"  # 1 where a text of several has a token
PROMPT = "PROMPT"  # stands for a prompt in a template
SAMPLE_CELLS = 128  # sides of the latents that the pipelines draw by default


class FlowTransformerBase(StableDiffusionBase):
    """[`StableDiffusionBase`] with a transformer and language models; a subclass says what is a family's own.

    Attributes:
        stock_class: the family's pipeline in diffusers.
        sides: latent cells on each side of a token's square.
        packs: whether the channels of these cells are packed into one token before the transformer sees them.
        samples_posterior: whether diffusers trains on samples of the VAE's posterior; else on its mode.
    """

    stock_class: Any
    denoiser_part = "transformer"
    trained_text_parts: tuple[str, ...] = ()
    largest_default_resolution = 1024
    image_to_image_class: Any = None
    image_to_image_has_size = True
    keeps_embeddings = True
    ignored_by_pipeline: tuple[str, ...] = ("latents_mean", "latents_std")
    max_sequence_length: int = 512
    longest_sequence: int | None = 512
    drawing_options: Mapping[str, Any] = {}  # further arguments of the pipeline's class
    sides = 2
    packs = True
    samples_posterior = True

    def read_denoiser(self, name_or_path: str) -> None:
        """The settings of the transformer and of the pipeline."""
        self.settings = self.stock_class.load_config(self.path, revision=self.revision)
        for part in (*self.text_parts, *map(tokenizer_of, self.text_parts)):
            library, kind = self.settings.get(part) or (None, None)
            if kind is None:
                raise ValueError(
                    f"{name_or_path} has no {part}, without which {self.family} cannot read prompts: give a "
                    "checkpoint that is whole."
                )
            if library != "transformers" or not hasattr(transformers, kind):
                raise ValueError(f"The {part} of {name_or_path} is a {kind} of {library}, which is not known here.")
        place = {"subfolder": "transformer", "revision": self.revision}
        self.transformer = full_config(self.denoiser_class, self.path, **place)
        self.native_resolution = SAMPLE_CELLS * self.vae_stride
        self.has_class_embedding = False
        expected = self.latent_channels * (self.sides**2 if self.packs else 1)
        given = self.token_channels()
        if set(given) != {expected}:
            raise ValueError(
                f"{name_or_path} is no text-to-image model over the latents that {self.other_vae or 'its VAE'} makes: "
                f"they have {expected} channels for its transformer, which takes {given[0]} and returns {given[1]}."
            )

    def read_vae(self, config: dict[str, Any]) -> None:
        """See `StableDiffusionBase`."""
        super().read_vae(config)
        self.vae_stride = self.stride

    def token_channels(self) -> tuple[int, int]:
        """Channels of a token that the transformer takes, and that it returns."""
        taken = self.transformer["in_channels"]
        return taken, self.transformer.get("out_channels") or taken

    def check_resolution(self, resolution: int | None) -> int:
        """The size of the training squares; `ValueError` for one that is no whole number of tokens."""
        if resolution is not None and resolution % (self.stride * self.sides):
            raise ValueError(f"--resolution must be a multiple of {self.stride * self.sides}, got {resolution}.")
        return super().check_resolution(resolution)

    def skeletons(self) -> dict[str, nn.Module]:
        """See `StableDiffusionBase`; without language models, which are never trained."""
        with torch.device("meta"):
            return {"transformer": self.denoiser_class.from_config(self.transformer)}

    def text_widths(self) -> dict[str, int]:
        """The width that each setting of the transformer should have, by what the text encoders give."""
        raise NotImplementedError

    def check_widths(self, skeletons: dict[str, nn.Module]) -> None:
        """`ValueError` where text encoders and transformer do not belong together."""
        for setting, width in self.text_widths().items():
            if self.transformer[setting] != width:
                raise ValueError(
                    f"The parts of {self.path} do not belong together: its transformer takes texts of width "
                    f"{self.transformer[setting]} ({setting}), its text encoders give {width}."
                )

    def text_config(self, part: str) -> Any:
        """A text encoder's settings."""
        return AutoConfig.from_pretrained(self.path, subfolder=part, revision=self.revision)

    def text_width(self, part: str) -> int:
        """The width of a text encoder's states."""
        return self.text_config(part).get_text_config().hidden_size

    def tokenizers(self, name: str | None = None) -> dict[str, Any]:
        """One per text encoder, of the classes that the pipeline has them in."""
        place = {"revision": self.revision}
        return {
            part: getattr(transformers, self.settings[tokenizer_of(part)][1]).from_pretrained(
                self.path, subfolder=tokenizer_of(part), **place
            )
            for part in self.text_parts
        }

    def text_encoders(self, dtype: torch.dtype) -> dict[str, nn.Module]:
        """The frozen text encoders, by part."""
        return {
            part: getattr(transformers, self.settings[part][1])
            .from_pretrained(self.path, subfolder=part, dtype=dtype, **self.files)
            .requires_grad_(False)
            for part in self.text_parts
        }

    def text_pipeline(self, text_encoders: dict[str, nn.Module], tokenizers: dict[str, Any]) -> Any:
        """The stock pipeline with nothing but its text encoders."""
        of_text = {tokenizer_of(part): tokenizer for part, tokenizer in tokenizers.items()}
        return self.stock_class(vae=None, transformer=None, scheduler=None, **text_encoders, **of_text)

    def encode(self, pipeline: Any, prompt: str, device: torch.device) -> Embeddings:
        """The embeddings of one prompt, `(1, ...)` each; those of unequal lengths with a `prompt_embeds_mask`.

        Args:
            pipeline: of `text_pipeline`.
            prompt: a text.
            device: of the text encoders.
        """
        raise NotImplementedError

    def text_before(self, tokenizer: Any) -> int:
        """How many tokens the pipeline puts before a prompt, within `max_sequence_length`."""
        return 0

    def pipeline(self, dtype: torch.dtype) -> Any:
        """The whole base model, without adapters."""
        parts = {} if self.other_vae is None else {"vae": self.vae(dtype)}
        return self.stock_class.from_pretrained(self.path, dtype=dtype, **parts, **self.files)

    def class_picture_settings(self, args: Any, count: int) -> dict[str, Any]:
        """As large as pictures are trained: the pipelines' own size is not read from the model."""
        size = {"height": args.resolution, "width": args.resolution, "max_sequence_length": self.max_sequence_length}
        return super().class_picture_settings(args, count) | size

    @torch.no_grad()
    def latent_distribution(self, vae: Any, pixels: Tensor) -> Tensor:
        """Mean and standard deviation of the latents: `(B, 3, H, W) -> (B, 2, c, h, w)`."""
        distribution = super().latent_distribution(vae, pixels)
        if not self.samples_posterior:
            distribution[:, 1] = 0
        return distribution

    def drawing_pipeline(self, denoiser: nn.Module, image_to_image: bool) -> Any:
        """The model as it is now without its text encoders."""
        nothing = dict.fromkeys([*self.text_parts, *map(tokenizer_of, self.text_parts)])
        return (self.image_to_image_class if image_to_image else self.pipeline_class)(
            vae=self.vae(denoiser.dtype).to(denoiser.device),
            transformer=denoiser,
            scheduler=self.scheduler(),
            **nothing,
            **self.drawing_options,
        )


def tokenizer_of(part: str) -> str:
    """The pipeline's name for the tokenizer of a text encoder."""
    return part.replace("text_encoder", "tokenizer")


def tokens_before(tokenizer: Any, text: str) -> int:
    """How many tokens a template's text has before the prompt."""
    return len(plain(tokenizer)(text.split(PROMPT)[0], add_special_tokens=False).input_ids)


def plain(reader: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(reader, "tokenizer", reader)


def pack(latents: Tensor) -> Tensor:
    """Squares of 2 x 2 latent cells as tokens: `(B, c, h, w) -> (B, h/2 * w/2, 4 c)`."""
    batch, channels, height, width = latents.shape
    squares = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: `(B, N, 4 c) -> (B, c, h, w)`."""
    squares = tokens.reshape(len(tokens), height // 2, width // 2, -1, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)
