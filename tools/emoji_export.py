"""Writing the pipeline of emoji and its judge, in fp16."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apt_diffusion.io.atomic import new_folder
from apt_diffusion.miniature.emoji.judge import JUDGE_FILE, VOCABULARY_FILE, Judge
from apt_diffusion.miniature.models import make_scheduler

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
license: apache-2.0
---
# miniature-emoji

A real, small Stable Diffusion that draws some six hundred things in the styles of three artists' emoji, made by
`tools/pretrain_miniature_emoji.py`; see docs/emoji.md. Pictures are 64 x 64. Prompts look like
`a large noto fox on a striped green background` or `a fluent rocket left of a twemoji pizza on a blue background`.

It was trained on these, reduced to 64 x 64 pixels and placed on coloured grounds:

- Noto Emoji, Google Inc., https://github.com/googlefonts/noto-emoji, Apache License 2.0
- Twemoji, Copyright 2020 Twitter, Inc and other contributors, https://github.com/jdecked/twemoji, CC-BY 4.0
  (https://creativecommons.org/licenses/by/4.0/)
- Fluent Emoji, Copyright (c) Microsoft Corporation, https://github.com/microsoft/fluentui-emoji, MIT License
- names from emojibase-data, Copyright (c) 2017-2019 Miles Johnson, https://github.com/milesj/emojibase, MIT License

The full notices are in NOTICE, which is part of every distribution of apt-diffusion.
"""


def build_pipeline(vae: nn.Module, text_encoder: nn.Module, unet: nn.Module, tokenizer: Any) -> Any:
    """Stock `StableDiffusionPipeline` around the parts."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def export_pipeline(folder: str | Path, pipeline: Any, card: str) -> None:
    """Writes all parts in fp16 to a new folder, then puts it in the place of the old one."""
    folder = Path(folder)
    for part in (pipeline.vae, pipeline.unet):
        part.to(memory_format=torch.contiguous_format)
    with new_folder(folder, replace=True) as temporary:
        pipeline.to(dtype=torch.float16)
        pipeline.save_pretrained(temporary)
        pipeline.to(dtype=torch.float32)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def export_judge(folder: str | Path, judge: Judge) -> None:
    """Writes weights in fp16, and what they tell apart."""
    from safetensors.torch import save_file

    tensors = {key: value.half().contiguous().cpu() for key, value in judge.state_dict().items()}
    save_file(tensors, Path(folder) / JUDGE_FILE.name, {"format": "pt"})
    vocabulary = dataclasses.asdict(judge.vocabulary)
    (Path(folder) / VOCABULARY_FILE.name).write_text(json.dumps(vocabulary, indent=1) + "\n", encoding="utf-8")
