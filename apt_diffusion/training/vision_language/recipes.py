"""The published recipes behind the defaults of the trainers of ViLT and METER."""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig

from ...baselines import get_method

logger = logging.getLogger(__name__)

SOURCE = "APT's released code, https://github.com/DoubtedSteam/APT (config.py and the scripts beside it)"


@dataclass(frozen=True)
class Recipe:
    """A published setting of one task and model.

    Args:
        learning_rate: of APT and all methods but full tuning.
        full_learning_rate: of full tuning.
        head_lr_multiplier: factor on the rate of the task's head.
        total_batch_size: examples of a step, over all processes and accumulated batches.
        max_text_length: tokens of a text.
        image_size: shorter side of the pictures; the model's own processor's if `None`.
        cross_modal_lr_multiplier: factor on the rate of what lies in METER's cross-modal layers.
    """

    learning_rate: float
    full_learning_rate: float
    head_lr_multiplier: float
    total_batch_size: int
    max_text_length: int
    image_size: int | None
    cross_modal_lr_multiplier: float = 1.0

    def fill_in(self, args: argparse.Namespace, num_processes: int, config: PreTrainedConfig) -> None:
        """Gives a value to what the command line left open.

        Args:
            args: of `add_shared_flags`.
            num_processes: that share a batch.
            config: of the model that is trained.

        Raises:
            ValueError: where a flag is not for this model.
        """
        if args.cache_encoder_outputs and config.model_type != "meter":
            raise ValueError("--cache_encoder_outputs is for METER: ViLT has no encoders whose outputs could be kept.")
        defaults = {
            "learning_rate": self.full_learning_rate if get_method(args.method).trains_base else self.learning_rate,
            "head_lr_multiplier": self.head_lr_multiplier,
            "cross_modal_lr_multiplier": self.cross_modal_lr_multiplier,
            "image_size": self.image_size,
            "gradient_accumulation_steps": max(1, self.total_batch_size // (args.train_batch_size * num_processes)),
        }
        for name, value in defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        check_image_size(args.image_size, config)
        positions = max_positions(config)
        if args.max_text_length is not None and args.max_text_length > positions:
            logger.warning("--max_text_length %d is %d: the model has no more.", args.max_text_length, positions)
        args.max_text_length = min(args.max_text_length or self.max_text_length, positions)


# For the embedded models: ours, from a few runs of VQA.
MINIATURE = Recipe(1e-3, 2e-4, head_lr_multiplier=20, total_batch_size=64, max_text_length=24, image_size=None)


def max_positions(config: PreTrainedConfig) -> int:
    """Tokens that a text may have."""
    if config.model_type == "meter":
        return config.text_config.max_position_embeddings - 2  # RoBERTa counts from 2
    return config.max_position_embeddings


def check_image_size(image_size: int | None, config: PreTrainedConfig) -> None:
    """`ValueError` for an `--image_size` that leaves pixels over (CLIP, METER), or no patch at all (ViLT)."""
    patch = getattr(config, "vision_config", config).patch_size
    if image_size is None or (image_size >= patch and (config.model_type == "vilt" or image_size % patch == 0)):
        return
    needed = f"at least {patch}" if config.model_type == "vilt" else f"a multiple of {patch}"
    raise ValueError(f"--image_size {image_size} must be {needed}: the model reads patches of {patch} pixels.")


def recipe_help(recipes: dict[str, Recipe], value: Callable[[Recipe], object]) -> str:
    """The defaults of a flag by model, with their source, for its help."""
    values = ", ".join(
        f"{value(recipe)} for {kind.upper()}" for kind, recipe in recipes.items() if kind != "miniature"
    )
    ours = ""
    if "miniature" in recipes:
        own = value(recipes["miniature"])
        ours = f"; {'their own' if own is None else own} for the embedded models"
    return f"Default: {values} ({SOURCE}){ours}."
