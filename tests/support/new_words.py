"""Adapters with new words, as training leaves them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import randomize

import apt_diffusion as apt
from apt_diffusion.words import TOKENIZERS, add_to_pipeline


def save_with_words(pipe: Any, place: Path, words: Sequence[str], seed: int) -> Path:
    """Writes an adapter of the denoiser that acts, with words in every text encoder of CLIP; leaves none on `pipe`."""
    apt.add_apt(pipe, apt.APTConfig(num_prompts=6, rank=2), "written")
    randomize(pipe, seed)
    generator = torch.Generator().manual_seed(seed)
    rows = {
        part: torch.randn(len(words), pipe.components[part].config.hidden_size, generator=generator)
        for part in TOKENIZERS
        if part in pipe.components
    }
    add_to_pipeline(pipe, "written", rows, words)
    pipe.save_apt_weights(place, "written")
    pipe.unload_apt_weights()
    return place
