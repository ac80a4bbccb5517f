"""The parts of the miniature Stable Diffusion, untrained: real diffusers and transformers classes, small."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from .world import COLORS, LAYOUTS, PATTERNS, SHAPES, SIZE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

TRIGGERS = ("sks", "zwx", "qpl", "vrf")  # single tokens that no caption of the world uses
CLASS_WORD = "glyph"
GRAMMAR = ("a", "an", "the", "on", "and", "background", "picture", "of", "photo")
# Of captions and of names for subjects, each once.
WORDS = tuple(
    dict.fromkeys([*COLORS, *SHAPES, *PATTERNS, *" ".join(LAYOUTS).split(), *GRAMMAR, *TRIGGERS, CLASS_WORD])
)
MAX_TOKENS = 32
LATENT_SIZE = SIZE // 4


def make_tokenizer(words: Sequence[str] | None = None) -> "CLIPTokenizer":
    """Byte-level BPE in which each of `words` (those of the world) is one token, and any other text still encodes."""
    from transformers import CLIPTokenizer

    symbols = byte_symbols()
    words = words or WORDS
    vocabulary = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    merges = make_merges(list(dict.fromkeys(words)))
    vocabulary += list(dict.fromkeys("".join(pair) for pair in merges))
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=MAX_TOKENS)


def byte_symbols() -> list[str]:
    """GPT-2's letters for the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]


def make_merges(words: list[str], start: str = "", end: str = "</w>") -> list[tuple[str, str]]:
    """Merges after which each word is one token. One word's merge can split another anew, hence the rounds.

    Args:
        words: one token each, in the end.
        start: a symbol before the first letter (RoBERTa's `Ġ`).
        end: a mark of the last letter (CLIP's `</w>`).
    """
    split = [[*start, *word[:-1], f"{word[-1]}{end}"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(bpe(pieces, merges)) > 1 for pieces in split):
        for word in split:
            while len(pieces := bpe(word, merges)) > 1:
                merges.append((pieces[0], pieces[1]))
    return merges


def bpe(letters: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """The pieces of a word under byte-pair merges, the earliest merge first."""
    rank = {pair: index for index, pair in enumerate(merges)}
    pieces = list(letters)
    while len(pieces) > 1:
        pairs = list(pairwise(pieces))
        best = min(range(len(pairs)), key=lambda index: rank.get(pairs[index], len(merges)))
        if pairs[best] not in rank:
            break
        pieces[best : best + 2] = ["".join(pairs[best])]
    return pieces


def make_text_encoder(tokenizer: "CLIPTokenizer") -> "CLIPTextModel":
    """An untrained text encoder for the embedded Stable Diffusion."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_autoencoder() -> "AutoencoderKL":
    """An untrained VAE for the embedded Stable Diffusion."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )


def make_unet() -> "UNet2DConditionModel":
    """An untrained UNet for the embedded Stable Diffusion."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_scheduler() -> "DDIMScheduler":
    """v-prediction with zero terminal signal: plain backgrounds of any colour need it."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )
