"""New words beside an adapter: their embeddings in CLIP's text encoders, and tokenizers that know them.

A word is one token with an id past those of the base. The embeddings' module looks such ids up in its child
`apt_words` and all others in its own table, which stays as it is. Tokenizers are replaced by copies that know the
words; the pipeline gets its own back when the last word is gone.

axes: B batch, L tokens, n words of an adapter, d width
"""

import contextlib
import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CHILD = "apt_words"
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}  # of CLIP; no other encoder learns words
MOST_WORDS = 1000
LONGEST_WORD = 100  # characters
_LEGACY_EOS = 2  # CLIP's settings before they named the right token: the pooled token is that of the highest id


@dataclass(frozen=True)
class AdapterWords:
    """The new words of one adapter: `names`, and `rows`, their embeddings by text encoder, `(n, d)` each."""

    names: tuple[str, ...]
    rows: dict[str, Tensor]


class Words(nn.Module):
    """The embeddings of the new words of all adapters of one text encoder.

    Attributes:
        rows: adapter name -> embeddings, `(n, d)`.
        names: adapter name -> its words.
        starts: adapter name -> id of its first word; the others follow.
        lent: `(id of the first word, embeddings)` of what is here for one call only, see `Lender`.
        tokenizer: the text encoder's own, without new words.
    """

    def __init__(self, tokenizer: Any, legacy_eos: bool) -> None:
        super().__init__()
        self.rows = nn.ParameterDict()
        self.names: dict[str, tuple[str, ...]] = {}
        self.starts: dict[str, int] = {}
        self.lent: tuple[tuple[int, Tensor], ...] = ()
        self.tokenizer = tokenizer
        self.legacy_eos = legacy_eos

    def embed(self, table: nn.Embedding, ids: Tensor) -> Tensor:
        """Embeddings of token ids, `(B, L) -> (B, L, d)`; those of the base come from `table`."""
        embeddings = table(ids.where(ids < table.num_embeddings, 0))  # (B, L, d)
        for start, rows in (*((self.starts[name], rows) for name, rows in self.rows.items()), *self.lent):
            places = ids - start
            own = (places >= 0) & (places < len(rows))  # (B, L)
            found = functional.embedding(places.where(own, 0), rows.to(embeddings))
            embeddings = torch.where(own[..., None], found, embeddings)
        return embeddings


def look_up(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of CLIP's embeddings: gives it the embeddings of tokens in place of their ids."""
    ids = args[0] if args else kwargs.get("input_ids")
    if ids is None:
        return None
    found = module.get_submodule(CHILD).embed(module.token_embedding, ids)
    return (None, *args[1:]) if args else (), ({} if args else kwargs | {"input_ids": None}) | {"inputs_embeds": found}


def words_of(text_encoder: nn.Module) -> Words | None:
    """The new words of a text encoder, `None` where it has none."""
    text = _text_model(text_encoder)
    return None if text is None else getattr(text.embeddings, CHILD, None)


def has_words(model: Any, adapter_name: str | None = None) -> bool:
    """Whether an adapter (`None`: any) of a pipeline, a dict of components, or a model has new words."""
    encoders = [model] if isinstance(model, nn.Module) else list(_encoders(model).values())
    found = [words for encoder in encoders if (words := words_of(encoder)) is not None]
    return any(words.names if adapter_name is None else adapter_name in words.names for words in found)


def check_words(words: Sequence[str], tokenizer: Any, there: Sequence[str] = ()) -> None:
    """`ValueError` for words that a tokenizer cannot learn.

    Args:
        words: new ones.
        tokenizer: of a text encoder, without new words.
        there: words of other adapters.
    """
    if not words or len(words) > MOST_WORDS or len(set(words)) != len(words):
        raise ValueError(f"New words must be different ones, from 1 to {MOST_WORDS}, got {list(words)[:8]}.")
    known = tokenizer.get_vocab()  # made anew in each call
    for word in words:
        if not isinstance(word, str) or not 0 < len(word) <= LONGEST_WORD or any(map(str.isspace, word)):
            raise ValueError(f"A new word must be one short word without blanks, got {str(word)[:LONGEST_WORD]!r}.")
        if re.search(r"_\d+$", word):
            raise ValueError(f"To diffusers {word!r} is a part of another word: leave out the number at its end.")
        if word != word.lower():
            raise ValueError(f"CLIP's tokenizers read small letters only, got {word!r}: write {word.lower()!r}.")
        if word in there:
            raise ValueError(f"Another adapter has the word {word!r}, too: unload that one first.")
        if word in known or tokenizer.tokenize(word) == [f"{word}</w>"]:
            raise ValueError(f"{word!r} is a word that the tokenizer knows already: choose another, such as <{word}>.")


def add_words(text_encoder: nn.Module, tokenizer: Any, adapter_name: str, words: Sequence[str], rows: Tensor) -> Any:
    """Gives a text encoder new words.

    Args:
        text_encoder: of CLIP.
        tokenizer: its own.
        adapter_name: that the words belong to.
        words: new ones.
        rows: their embeddings, `(n, d)`.

    Returns:
        A copy of the tokenizer that knows the words of all adapters.

    Raises:
        ValueError: for words that are there already, or rows that do not fit.
    """
    text = _text_model(text_encoder)
    if text is None:
        raise ValueError(f"New words are for text encoders of CLIP, not for a {type(text_encoder).__name__}.")
    _check_new(text, tokenizer, words)
    width = text.embeddings.token_embedding.embedding_dim
    if tuple(rows.shape) != (len(words), width):
        raise ValueError(f"{len(words)} new words of width {width} need other rows than {tuple(rows.shape)}.")
    present = words_of(text_encoder) or _register(text, tokenizer)
    present.names[adapter_name] = tuple(words)
    table = text.embeddings.token_embedding.weight
    present.rows[adapter_name] = nn.Parameter(rows.detach().to(table.device, copy=True))
    return _taught(present)


def remove_words(text_encoder: nn.Module, adapter_name: str) -> Any:
    """Takes the words of an adapter away; returns the tokenizer that is left. `KeyError` where it has none."""
    text, words = _text_model(text_encoder), words_of(text_encoder)
    if text is None or words is None:
        raise KeyError(adapter_name)
    del words.rows[adapter_name], words.names[adapter_name]
    if words.names:
        return _taught(words)
    _unregister(text, words)
    return words.tokenizer


def teach(tokenizer: Any, words: Sequence[str]) -> None:
    """Makes each word one token; a plain word is not found inside others."""
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(word, single_word=word.isalnum()) for word in words])


def taught_copy(tokenizer: Any, words: Sequence[str]) -> Any:
    """A copy of a tokenizer that knows more words; their ids follow its own."""
    taught = copy.deepcopy(tokenizer)
    teach(taught, words)
    assert taught.convert_tokens_to_ids(list(words)) == list(range(len(tokenizer), len(tokenizer) + len(words)))
    return taught


class Lender:
    """A text encoder that is lent words for one call, which no other call reads.

    Words that it has itself are away until `close`.

    Args:
        text_encoder: of CLIP.
        tokenizer: its own.

    Attributes:
        own_tokenizer: its own, without new words.
        tokenizer: a copy of that one.
        own: the words that are away, `None` where there are none.

    Raises:
        ValueError: for a text encoder of another kind.
    """

    def __init__(self, text_encoder: nn.Module, tokenizer: Any) -> None:
        self._text = _text_model(text_encoder)
        if self._text is None:
            raise ValueError(f"New words are for text encoders of CLIP, not for a {type(text_encoder).__name__}.")
        self.own = words_of(text_encoder)
        self.own_tokenizer = tokenizer if self.own is None else self.own.tokenizer
        self.tokenizer = copy.deepcopy(self.own_tokenizer)
        if self.own is None:
            self._words = _register(self._text, self.tokenizer)
        else:
            self._words = self._text.embeddings._modules[CHILD] = Words(self.tokenizer, self.own.legacy_eos)

    @contextlib.contextmanager
    def lend(self, rows: Sequence[Tensor]) -> Iterator[None]:
        """Context manager: calls read these words, whose ids follow those of `tokenizer`.

        Args:
            rows: embeddings, `(n, d)` for each adapter.
        """
        start, lent = len(self.tokenizer), []
        for embeddings in rows:
            lent.append((start, embeddings))
            start += len(embeddings)
        self._words.lent = tuple(lent)
        try:
            yield
        finally:
            self._words.lent = ()

    def close(self) -> None:
        """The text encoder as it was."""
        if self.own is None:
            _unregister(self._text, self._words)
        else:
            self._text.embeddings._modules[CHILD] = self.own


def _check_new(text: Any, tokenizer: Any, words: Sequence[str]) -> None:
    """`ValueError` for words that a text encoder with this tokenizer cannot learn beside those that it has."""
    present = getattr(text.embeddings, CHILD, None)
    own = tokenizer if present is None else present.tokenizer
    check_words(words, own, [] if present is None else [one for known in present.names.values() for one in known])
    if len(own) < text.embeddings.token_embedding.num_embeddings:
        raise ValueError("The tokenizer knows fewer tokens than its text encoder: they do not belong together.")


def _register(text: Any, tokenizer: Any) -> Words:
    words = Words(tokenizer, text.eos_token_id == _LEGACY_EOS)
    text.embeddings.add_module(CHILD, words)
    text.embeddings.register_forward_pre_hook(look_up, with_kwargs=True)
    if words.legacy_eos:
        text.eos_token_id = tokenizer.eos_token_id  # the highest id is a new word's now
    return words


def _unregister(text: Any, words: Words) -> None:
    embeddings = text.embeddings
    del embeddings._modules[CHILD]
    for key in [key for key, hook in embeddings._forward_pre_hooks.items() if hook is look_up]:
        del embeddings._forward_pre_hooks[key]
        embeddings._forward_pre_hooks_with_kwargs.pop(key, None)
    if words.legacy_eos:
        text.eos_token_id = _LEGACY_EOS


def _taught(words: Words) -> Any:
    """A copy of the tokenizer that knows all words; notes where each adapter's begin."""
    start = len(words.tokenizer)
    words.starts = {}
    for name, own in words.names.items():
        words.starts[name] = start
        start += len(own)
    return taught_copy(words.tokenizer, [name for own in words.names.values() for name in own])


# Pipelines


def check_pipeline(pipeline: Any, rows: Mapping[str, Tensor], words: Sequence[str]) -> None:
    """`ValueError` where these words cannot be given to a pipeline; nothing is changed.

    Args:
        pipeline: of diffusers, or a dict of its components.
        rows: embeddings by component, `(n, d)` each.
        words: new ones.
    """
    if isinstance(pipeline, nn.Module):
        raise ValueError("The file has new words: load it into a pipeline, whose tokenizers learn them.")
    encoders = _encoders(pipeline)
    for part, values in rows.items():
        slot = TOKENIZERS.get(part)
        if part not in encoders or slot is None or _slot(pipeline, slot) is None:
            raise ValueError(f"The file has new words for {part}, but there is no {part} with a tokenizer here.")
        text = _text_model(encoders[part])
        if text is None or tuple(values.shape) != (len(words), text.embeddings.token_embedding.embedding_dim):
            raise ValueError(f"The new words do not fit: {part} needs others than rows of {tuple(values.shape)}.")
        if not values.is_floating_point() or not bool(values.float().isfinite().all()):
            raise ValueError(f"The file is damaged: its new words in {part} are no finite numbers.")
        _check_new(text, _slot(pipeline, slot), words)


def check_apart(adapters: Sequence[AdapterWords]) -> None:
    """`ValueError` where two adapters that are used at once have a word in common."""
    twice = [name for name, count in Counter(name for words in adapters for name in words.names).items() if count > 1]
    if twice:
        raise ValueError(f"Two of the adapters have the word {twice[0]!r}: ask for one of them at a time.")


def add_to_pipeline(pipeline: Any, adapter_name: str, rows: Mapping[str, Tensor], words: Sequence[str]) -> None:
    """`add_words` for every text encoder of a pipeline that has rows; call `check_pipeline` first."""
    encoders = _encoders(pipeline)
    for part, values in rows.items():
        slot = TOKENIZERS[part]
        taught = add_words(encoders[part], _slot(pipeline, slot), adapter_name, words, values)
        _set_slot(pipeline, slot, taught)


def remove_from_pipeline(pipeline: Any, adapter_name: str | None = None) -> None:
    """Takes the words of an adapter (`None`: of all) away, with what its tokenizers know of them.

    Raises:
        ValueError: for a single model, whose tokenizer is not here.
    """
    if not has_words(pipeline, adapter_name):
        return
    if isinstance(pipeline, nn.Module):
        raise ValueError("This adapter has new words: remove it from the pipeline, whose tokenizers know them.")
    for part, encoder in _encoders(pipeline).items():
        words = words_of(encoder)
        for name in list(words.rows) if words is not None else ():
            if adapter_name in (None, name):
                _set_slot(pipeline, TOKENIZERS[part], remove_words(encoder, name))


@contextlib.contextmanager
def hidden_words(pipeline: Any) -> Iterator[None]:
    """Context manager: text encoders and tokenizers have no new words. For saving the base."""
    hidden = []
    for part, encoder in _encoders(pipeline).items():
        if (words := words_of(encoder)) is not None:
            taught = _slot(pipeline, TOKENIZERS[part])
            hidden.append((part, _text_model(encoder).embeddings, words, taught))
            _set_slot(pipeline, TOKENIZERS[part], words.tokenizer)
            del hidden[-1][1]._modules[CHILD]
    try:
        yield
    finally:
        for part, embeddings, words, taught in hidden:
            embeddings._modules[CHILD] = words
            _set_slot(pipeline, TOKENIZERS[part], taught)


def _encoders(pipeline: Any) -> dict[str, nn.Module]:
    parts = pipeline if isinstance(pipeline, dict) else getattr(pipeline, "components", {})
    return {part: parts[part] for part in TOKENIZERS if isinstance(parts.get(part), nn.Module)}


def _slot(pipeline: Any, slot: str) -> Any:
    return pipeline.get(slot) if isinstance(pipeline, dict) else getattr(pipeline, slot, None)


def _set_slot(pipeline: Any, slot: str, tokenizer: Any) -> None:
    if isinstance(pipeline, dict):
        pipeline[slot] = tokenizer
    else:
        setattr(pipeline, slot, tokenizer)


def _text_model(text_encoder: nn.Module) -> Any:
    """The part of a text encoder of CLIP that has the embeddings, whatever the version of transformers."""
    text = getattr(text_encoder, "text_model", text_encoder)
    embeddings = getattr(text, "embeddings", None)
    known = isinstance(getattr(embeddings, "token_embedding", None), nn.Embedding) and hasattr(text, "eos_token_id")
    return text if known else None
