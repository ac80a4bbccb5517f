"""`--new_tokens`: words whose embeddings are trained next to the adapter (pivotal tuning, arXiv 2106.05744)."""

import argparse
import copy
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...io.files import WEIGHTS_NAME, read_adapter_file
from ...words import CHILD, TOKENIZERS, add_words, check_words, teach, words_of
from .number_types import not_negative

logger = logging.getLogger(__name__)


def new_word_flags(add: Callable[..., Any]) -> None:
    """Adds the flags of new words to a group of a parser."""
    add(
        "--new_tokens",
        nargs="+",
        metavar="WORD",
        help="Words such as <sks> that the text encoders of CLIP learn as one token each, next to the adapter: their "
        "embeddings are trained and saved in its file (pivotal tuning).",
    )
    add(
        "--new_tokens_initializer",
        nargs="+",
        metavar="WORD",
        help="Known words whose embeddings the new ones start from: one for all, or one for each; random if not set.",
    )
    add(
        "--new_tokens_lr",
        type=not_negative,
        help="Learning rate of the embeddings of --new_tokens; --learning_rate if not set.",
    )


def check_new_word_flags(args: argparse.Namespace) -> None:
    """`ValueError` for flags that contradict each other."""
    if args.new_tokens is None:
        for flag in ("new_tokens_initializer", "new_tokens_lr"):
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag} needs --new_tokens.")
        return
    if args.cache_text_embeddings or args.pre_compute_text_embeddings:
        raise ValueError("--new_tokens changes the text embeddings in every step: they cannot be computed beforehand.")
    starts = args.new_tokens_initializer or ()
    if starts and len(starts) not in (1, len(args.new_tokens)):
        raise ValueError(
            f"--new_tokens_initializer has {len(starts)} words for {len(args.new_tokens)} of --new_tokens: give one "
            "for all, or one for each."
        )


def is_word(parameter_name: str) -> bool:
    """Whether this is the name of the embeddings of new words."""
    return parameter_name.endswith(f".{CHILD}")


def taught(tokenizers: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Copies of CLIP's tokenizers that know the words; `ValueError` for words that cannot be new."""
    found = {}
    for part in tokenizers.keys() & TOKENIZERS.keys():
        check_words(words, tokenizers[part])
        found[part] = copy.deepcopy(tokenizers[part])
        teach(found[part], words)
    return found


def warn_of_prompts_without(words: Sequence[str], prompts: Sequence[tuple[str, str]]) -> None:
    """One warning names texts of the run that ask for none of the new words: what they show is not taught to them."""
    without = [
        place for place, prompt in prompts if place and prompt and not any(_has(prompt, word) for word in words)
    ]
    without = [place for place in without if place != "--class_prompt"]
    if without:
        logger.warning(
            "%d texts have none of the words of --new_tokens (%s), which learn nothing from them, e.g. %s.",
            len(without), " ".join(words[:4]), ", ".join(without[:3]),
        )  # fmt: skip


def _has(prompt: str, word: str) -> bool:
    """Whether a tokenizer finds a new word: one of letters only where it stands alone, `<sks>` anywhere."""
    start, end = (r"(?<!\w)" if word[0].isalnum() else ""), (r"(?!\w)" if word[-1].isalnum() else "")
    return re.search(f"{start}{re.escape(word)}{end}", prompt, re.IGNORECASE) is not None


def attach_words(
    args: argparse.Namespace, prompts: Any, text_encoders: dict[str, nn.Module], checkpoint: Path | None
) -> dict[str, nn.Parameter]:
    """Gives the text encoders of CLIP the words of `--new_tokens`.

    Args:
        args: the script's flags.
        prompts: of the run, with tokenizers that know the words and those that do not.
        text_encoders: of the base.
        checkpoint: a checkpoint's folder, whose embeddings are continued.

    Returns:
        The embeddings in float32, by name: none without the flag.

    Raises:
        ValueError: where the checkpoint has other words, or a word to start from is unknown.
    """
    words = args.new_tokens or []
    stored = None if checkpoint is None else read_adapter_file(checkpoint / WEIGHTS_NAME, with_words=True)
    if stored is not None and stored.words != words:
        raise ValueError(f"{checkpoint} has the new words {stored.words}, this run trains {words}.")
    parameters = {}
    for part in [part for part in text_encoders if part in TOKENIZERS] if words else ():
        encoder, tokenizer = text_encoders[part], prompts.own_tokenizers[part]
        rows = _first_rows(args, encoder, tokenizer) if stored is None else stored.word_rows[part]
        add_words(encoder, tokenizer, "default", words, rows)
        own = words_of(encoder)
        assert own is not None
        own.rows["default"].data = own.rows["default"].data.float()
        parameters[f"{part}.{CHILD}"] = own.rows["default"].requires_grad_(True)
    return parameters


def check_new_words(args: argparse.Namespace, base: Any) -> None:
    """`ValueError` for a base without trainable words, or words to start from that a tokenizer does not know."""
    if not args.new_tokens:
        return
    if base.keeps_embeddings:
        raise ValueError(
            f"--new_tokens is for Stable Diffusion 1, 2, XL and 3: the texts of {base.path} are read by a language "
            "model, whose embeddings are computed before training."
        )
    for part, tokenizer in base.tokenizers(args.tokenizer_name).items():
        for word in (args.new_tokens_initializer or ()) if part in TOKENIZERS else ():
            _ids(tokenizer, word)


def _first_rows(args: argparse.Namespace, encoder: nn.Module, tokenizer: Any) -> Tensor:
    """Of the words named, the mean over their tokens; else random, as wide as the table of the base is."""
    table = encoder.get_input_embeddings().weight.detach().float().cpu()
    starts = args.new_tokens_initializer
    if starts is None:
        return torch.randn(len(args.new_tokens), table.shape[1]) * table.std(0) + table.mean(0)
    rows = torch.stack([table[_ids(tokenizer, word)].mean(0) for word in starts])
    return rows.expand(len(args.new_tokens), -1).clone()


def _ids(tokenizer: Any, word: str) -> list[int]:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"--new_tokens_initializer: the tokenizer reads nothing in {word!r}.")
    return ids
