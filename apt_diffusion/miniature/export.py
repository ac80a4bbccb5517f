"""Writing and reading the embedded pipelines."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..io.atomic import new_folder
from .models import make_scheduler, make_tokenizer
from .pictures import save_picture_grid, to_images
from .transformer import make_flow_scheduler, make_t5_tokenizer

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---
# miniature

A real, small Stable Diffusion of a drawn world, made by `tools/pretrain_miniature.py`; see docs/miniature.md.
Pictures are 64 x 64. Prompts look like `a small red circle on a blue background` or
`a green star left of a pink ring on a striped yellow and black background`.
"""


SD3_CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---
# miniature-sd3

A real, small Stable Diffusion 3 of a drawn world, made by `tools/pretrain_miniature_sd3.py`; see docs/miniature.md.
Pictures are 64 x 64. Prompts look like `a small red circle on a blue background` or
`a green star left of a pink ring on a striped yellow and black background`. Captions have at most 16 tokens of T5:
`max_sequence_length=32` draws as well as the pipeline's 256, in less than half the time.
"""


def export_pipeline(folder: str | Path, vae: nn.Module, text_encoder: nn.Module, unet: nn.Module) -> None:
    """Writes all parts in fp16 to a new folder, then puts it in the place of the old one."""
    write_pipeline(build_pipeline(vae, text_encoder, unet), Path(folder), CARD)


def export_sd3_pipeline(folder: str | Path, **parts: nn.Module) -> None:
    """As `export_pipeline`, for the parts of `build_sd3_pipeline`."""
    write_pipeline(build_sd3_pipeline(**parts), Path(folder), SD3_CARD)


def write_pipeline(pipeline: Any, folder: Path, card: str) -> None:
    """A whole new folder in fp16, then the exchange: an interruption leaves the old one."""
    with new_folder(folder, replace=True) as temporary:
        pipeline.to(dtype=torch.float16)
        pipeline.save_pretrained(temporary)
        pipeline.to(dtype=torch.float32)
        (temporary / "README.md").write_text(card)


def build_pipeline(vae: nn.Module, text_encoder: nn.Module, unet: nn.Module) -> Any:
    """The parts as a `StableDiffusionPipeline`, with the embedded tokenizer and scheduler."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=vae.to(memory_format=torch.contiguous_format),
        text_encoder=text_encoder,
        tokenizer=make_tokenizer(),
        unet=unet.to(memory_format=torch.contiguous_format),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_sd3_pipeline(
    vae: nn.Module,
    text_encoder: nn.Module,
    text_encoder_2: nn.Module,
    text_encoder_3: nn.Module,
    transformer: nn.Module,
) -> Any:
    """The parts as a `StableDiffusion3Pipeline`; the transformer gets the stock attention processors."""
    from diffusers import StableDiffusion3Pipeline
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    transformer.set_attn_processor(JointAttnProcessor2_0())
    pipeline = StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=make_tokenizer(),
        text_encoder_2=text_encoder_2,
        tokenizer_2=make_tokenizer(),
        text_encoder_3=text_encoder_3,
        tokenizer_3=make_t5_tokenizer(),
        transformer=transformer,
        scheduler=make_flow_scheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_drawn(drawn: dict, file: Path, per_row: int = 8) -> None:
    """A sheet with the first pictures of every row of the grade table."""
    labels = [label for captions, _ in drawn.values() for label in captions[:per_row]]
    pictures = [picture for _, pictures in drawn.values() for picture in to_images(pictures[:per_row])]
    save_picture_grid(pictures, labels, file, columns=per_row)
