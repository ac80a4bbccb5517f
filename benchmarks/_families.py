"""How a model of each family is trained: which parts are adapted, what its captions become, what it predicts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Captions = tuple[Tensor, ...]


@dataclass(frozen=True)
class Family:
    """A kind of pipeline.

    Args:
        lora_modules: by part of the pipeline that is adapted, as diffusers' scripts choose them.
        encode: `(pipeline, caption)`: what is kept of it, without a batch axis.
        predict: `(pipeline, latents (B, C, H, W), captions (B, ...), generator)`: the prediction and its target, both
            shaped as the latents. The generator is the CPU's, so that every device sees the same noise.
    """

    lora_modules: dict[str, list[str]]
    encode: Callable[[Any, str], Captions]
    predict: Callable[[Any, Tensor, Captions, torch.Generator], tuple[Tensor, Tensor]]

    @property
    def parts(self) -> tuple[str, ...]:
        """Of the pipeline, that are adapted."""
        return tuple(self.lora_modules)


def tokenize(pipeline: Any, caption: str) -> Captions:
    """Token ids `(T,)`: the text encoder is adapted too."""
    ids = pipeline.tokenizer(caption, padding="max_length", return_tensors="pt").input_ids[0]
    return (ids.to(pipeline.device),)


def velocity(pipeline: Any, latents: Tensor, captions: Captions, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of a UNet that predicts the velocity, at uniform timesteps."""
    scheduler = pipeline.scheduler
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    timesteps = torch.randint(1000, (len(latents),), generator=generator).to(latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    prediction = pipeline.unet(noisy, timesteps, pipeline.text_encoder(captions[0])[0]).sample
    return prediction, scheduler.get_velocity(latents, noise, timesteps)


def encode(pipeline: Any, caption: str) -> Captions:
    """States `(T, d)` and the pooled state: the text encoders stay as they are."""
    states, _, pooled, _ = pipeline.encode_prompt(
        caption, None, None, do_classifier_free_guidance=False, max_sequence_length=16
    )
    return states[0], pooled[0]


def flow(pipeline: Any, latents: Tensor, captions: Captions, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of a transformer's flow matching; noise levels are logit-normal and shifted as the sampler's are."""
    states, pooled = captions
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    times = torch.randn(len(latents), generator=generator).to(latents.device).sigmoid()
    shift = pipeline.scheduler.config.shift
    sigmas = (shift * times / (1 + (shift - 1) * times)).view(-1, 1, 1, 1)
    prediction = pipeline.transformer(
        hidden_states=(1 - sigmas) * latents + sigmas * noise,
        timestep=1000 * sigmas.flatten(),
        encoder_hidden_states=states,
        pooled_projections=pooled,
    ).sample
    return prediction, noise - latents


UNET = Family(
    {
        "unet": ["to_q", "to_k", "to_v", "to_out.0"],
        "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
    },
    tokenize,
    velocity,
)
TRANSFORMER = Family(
    {
        "transformer": [
            *("to_q", "to_k", "to_v", "to_out.0"),
            *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        ]
    },
    encode,
    flow,
)
