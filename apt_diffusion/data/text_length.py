"""Reports texts that are longer than a model's context, and what truncation removes from them."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

logger = logging.getLogger(__name__)

SHOWN = 3  # texts that a message names
BATCH = 10000


def kept_and_lost(texts: Iterable[str], tokenizer: Any, max_length: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """For each text over `max_length` tokens: the token ids that are kept, without special ones, and the text cut off.

    Args:
        texts: any number; only those that could be too long are tokenised.
        tokenizer: one of transformers'.
        max_length: tokens that the model reads, special ones included.
    """
    keep = max_length - tokenizer.num_special_tokens_to_add()
    long = [text for text in dict.fromkeys(texts) if len(text.encode()) >= keep]  # a token has at least one byte
    found = {}
    for start in range(0, len(long), BATCH):
        batch = long[start : start + BATCH]
        ids_of = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        for text, ids in zip(batch, ids_of, strict=True):
            if len(ids) > keep:
                found[text] = tuple(ids[:keep]), tokenizer.decode(ids[keep:]).strip()
    return found


def warn_of_cut_texts(
    texts: Sequence[tuple[str, str]], tokenizer: Any, max_length: int, remedy: str = "Shorten them."
) -> None:
    """Logs one warning that names texts which are cut, and the words that they lose.

    Args:
        texts: where each text stands (a file, a flag, or the text itself in quotes), and the text.
        tokenizer, max_length: as for `kept_and_lost`.
        remedy: a sentence on what to do.
    """
    lost = kept_and_lost((text for _, text in texts), tokenizer, max_length)
    cut = [(name, lost[text][1]) for name, text in texts if text in lost]
    if cut:
        shown = "; ".join(f"{name} loses {end!r}" for name, end in cut[:SHOWN])
        logger.warning(
            "%d of %d texts are longer than the %d tokens that the model reads, and their ends are left out: %s%s. %s",
            len(cut), len(texts), max_length, shown, "; ..." if len(cut) > SHOWN else "", remedy,
        )  # fmt: skip
