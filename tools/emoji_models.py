"""The parts of `miniature-emoji`, untrained."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from emoji_scenes import ANYTHING, COLORS, LAYOUTS, PATTERNS, SIDE
from torch import nn

from apt_diffusion.miniature.models import MAX_TOKENS, TRIGGERS, make_tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

FREE_WORDS = ("toy", "mascot", "figure", "glyph", "emoji", "sticker")  # single tokens that no caption uses
LATENT_CHANNELS = 8
WIDTH = 192  # of the text states


def make_emoji_tokenizer(names: Sequence[str], styles: Sequence[str]) -> "CLIPTokenizer":
    """Every word of a caption is one token; any other text still encodes."""
    grammar = ["a", "an", "the", "and", "on", "of", "in", "with", "picture", "photo", "background"]
    words = [*" ".join([*names, *LAYOUTS]).split(), *styles, *COLORS, *PATTERNS, *grammar, ANYTHING]
    return make_tokenizer([*words, *TRIGGERS, *FREE_WORDS])


def make_text_encoder(tokenizer: "CLIPTokenizer") -> "CLIPTextModel":
    """1.9 M parameters."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_autoencoder() -> "AutoencoderKL":
    """64 px to 8 channels of 16 x 16; 1.6 M parameters."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIDE,
    )


def make_discriminator() -> nn.Sequential:
    """`(B, 3, 64, 64)` to a verdict on each of 8 x 8 patches that overlap, positive where it looks real.

    0.5 M parameters, which serve the training of the decoder and are not shipped.
    """
    layers: list[nn.Module] = []
    widths = (3, 64, 128, 192)
    for before, after in itertools.pairwise(widths):
        norm = nn.GroupNorm(8, after) if before > 3 else nn.Identity()
        layers += [nn.Conv2d(before, after, 4, 2, 1), norm, nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, 1, 1))


def make_unet() -> "UNet2DConditionModel":
    """19.1 M parameters, cross-attention in the two deeper blocks."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 160, 256),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
