"""Texts that are longer than a model reads: which lose what."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

logger = logging.getLogger(__name__)

SHOWN = 3  # texts that a message names
BATCH = 10000


def cut_ends(texts: Iterable[str], tokenizer: Any, max_length: int) -> dict[str, str]:
    """`{text: the words at its end that are left out}` of the texts with more than `max_length` tokens.

    Args:
        texts: any number.
        tokenizer: one of transformers', which puts one special token at the end.
        max_length: tokens that the model reads, special ones included.
    """
    distinct = list(dict.fromkeys(texts))
    found = {}
    for start in range(0, len(distinct), BATCH):
        batch = distinct[start : start + BATCH]
        for text, ids in zip(batch, tokenizer(batch, verbose=False)["input_ids"], strict=True):
            if len(ids) > max_length:
                found[text] = tokenizer.decode(ids[max_length - 1 : -1]).strip()
    return found


def warn_of_cut_texts(
    texts: Sequence[tuple[str, str]], tokenizer: Any, max_length: int, remedy: str = "Shorten them."
) -> None:
    """Logs one warning that names texts which are cut, and the words that they lose.

    Args:
        texts: where each text stands (a file, a flag), and the text.
        tokenizer, max_length: as for `cut_ends`.
        remedy: a sentence on what to do.
    """
    ends = cut_ends((text for _, text in texts), tokenizer, max_length)
    cut = [(name, ends[text]) for name, text in texts if text in ends]
    if cut:
        shown = "; ".join(f"{name} loses {end!r}" for name, end in cut[:SHOWN])
        logger.warning(
            "%d of %d texts are longer than the %d tokens that the model reads, and their ends are left out: %s%s. %s",
            len(cut), len(texts), max_length, shown, "; ..." if len(cut) > SHOWN else "", remedy,
        )  # fmt: skip
