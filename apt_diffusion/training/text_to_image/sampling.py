"""How samples of a base are drawn where the user does not say: distilled bases need few steps and little guidance."""

import argparse
import logging
import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

# What diffusers' pipelines are told for their usual models.
STEPS, GUIDANCE = 25, 7.5
# In names of distilled models: "sdxl-turbo", "SDXL-Lightning", "dreamshaperXL_lightningDPMSDE"; not "HyperRealism".
NAMES = re.compile(r"(?i:turbo|lightning|hyper(?![-_ ]?real)|lcm|tcd|dmd2?|schnell|distill(?:ed)?)(?![a-z])")
NOTE = (
    "This base is distilled (%s): samples are drawn with %d steps and a guidance of %g. Long training undoes the "
    "distillation, and pictures in few steps turn soft: keep the run short, or train on the model that it was "
    "distilled from, whose adapters work here, too."
)


@dataclass(frozen=True)
class Sampling:
    """Settings that suit a base.

    Args:
        steps: denoising steps.
        guidance: guidance scale; 1 is none.
        distilled: what tells that the base is distilled; `None` if nothing does.
    """

    steps: int = STEPS
    guidance: float = GUIDANCE
    distilled: str | None = None


def sampling_of(
    name_or_path: str, scheduler: Any, guidance_width: int | None = None, usual: float = GUIDANCE
) -> Sampling:
    """What can be told from the scheduler, the UNet and the name of a base.

    Args:
        name_or_path: of the base; its last part counts.
        scheduler: the base's own.
        guidance_width: `time_cond_proj_dim` of a UNet that takes the guidance as an input, as latent consistency
            models do (arXiv 2310.04378).
        usual: guidance of the family's models that are not distilled.
    """
    kind = type(scheduler).__name__
    if guidance_width is not None:
        return Sampling(4, 8.0, f"{kind}, and a UNet that takes the guidance")
    if kind in ("LCMScheduler", "TCDScheduler"):
        return Sampling(4, 1.0, kind)
    if not NAMES.search(PurePath(name_or_path).name):
        return Sampling(guidance=usual)
    if kind.startswith("FlowMatch"):
        return Sampling(8, 1.0, "by its name")
    if kind.startswith("Euler") and scheduler.config.timestep_spacing == "trailing":
        return Sampling(4, 1.0, f"by its name, and {kind} with trailing timesteps")
    return Sampling(distilled="by its name, though its scheduler is an ordinary one")


def choose_sampling(args: argparse.Namespace, base: Any, logger: logging.Logger) -> None:
    """Fills in `num_inference_steps` and `guidance_scale` where the user gives none, and says what a base is.

    Args:
        args: the script's flags.
        base: a `StableDiffusionBase`; it is told the guidance that its UNet is trained at.
        logger: of the run.
    """
    chosen = sampling_of(
        args.pretrained_model_name_or_path, base.scheduler(), base.guidance_width, base.default_guidance
    )
    if base.is_distilled:
        chosen = Sampling(4, 1.0, "by is_distilled in its model_index.json")
    if args.num_inference_steps is None:
        args.num_inference_steps = chosen.steps
    if args.guidance_scale is None:
        args.guidance_scale = chosen.guidance
    base.guidance = args.guidance_scale
    if chosen.distilled is not None:
        logger.warning(NOTE, chosen.distilled, args.num_inference_steps, args.guidance_scale)


def guidance_embedding(guidance: float, width: int, like: Tensor) -> Tensor:
    """The guidance as the UNet of a latent consistency model takes it, `(B, width)`, as in diffusers' pipeline.

    Args:
        guidance: scale; the model knows it as w = guidance - 1.
        width: of the embedding.
        like: its batch size, type and device.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000 * (guidance - 1) * frequencies
    embedding = torch.cat([angles.sin(), angles.cos(), torch.zeros(width % 2)])
    return embedding.expand(len(like), -1).to(like)
