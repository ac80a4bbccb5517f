"""New words in an engine: each picture reads those of its own adapters, and no other's."""

import contextlib
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..io.files import AdapterFile
from ..io.load import check_words_fit
from ..words import TOKENIZERS, AdapterWords, Lender, taught_copy

MAX_TAUGHT = 16  # tokenizers that are kept; one of CLIP takes 10 MiB


class OneAtATime:
    """A tokenizer for several threads: the fast ones change while they are used."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return self._tokenizer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._tokenizer, name)
        if not callable(value):
            return value

        def locked(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                return value(*args, **kwargs)

        return locked


class Vocabulary:
    """The tokenizers of a pipeline, and its text encoders of CLIP, which are lent words until `close`.

    Args:
        pipeline: of diffusers. Words that it has itself are away until `close`: they, too, are read in pictures of
            their adapter only.

    Attributes:
        tokenizers: those without new words, by their names in the pipeline, for several threads.
    """

    def __init__(self, pipeline: Any) -> None:
        parts = pipeline.components
        self._lenders: dict[str, Lender] = {}
        for part, slot in TOKENIZERS.items():
            if isinstance(parts.get(part), nn.Module) and parts.get(slot) is not None:
                with contextlib.suppress(ValueError):  # not of CLIP: it learns no words
                    self._lenders[part] = Lender(parts[part], parts[slot])
        untaught = {TOKENIZERS[part]: lender.own_tokenizer for part, lender in self._lenders.items()}
        self.tokenizers = {
            name: OneAtATime(untaught.get(name, part))
            for name, part in parts.items()
            if name.startswith("tokenizer") and part is not None
        }
        self._own: dict[str, AdapterWords] = {}  # by adapter of the pipeline
        for part, lender in self._lenders.items():
            if lender.own is not None:
                for name, rows in lender.own.rows.items():
                    self._own.setdefault(name, AdapterWords(lender.own.names[name], {})).rows[part] = rows
        # What is checked and copied is not what pictures' threads use meanwhile.
        self._components = dict(parts) | {TOKENIZERS[part]: one.tokenizer for part, one in self._lenders.items()}
        self._taught: OrderedDict[tuple[str, tuple[str, ...]], OneAtATime] = OrderedDict()
        self._lock = threading.Lock()  # of the lenders' tokenizers, and of those that are kept

    def words_of_own(self, adapter_name: str) -> AdapterWords:
        """The words of an adapter that the pipeline has itself."""
        return self._own.get(adapter_name, AdapterWords((), {}))

    def check(self, adapter: AdapterFile) -> None:
        """`ValueError` where the new words of a file do not fit the pipeline."""
        if not adapter.word_rows:
            return
        with self._lock:
            check_words_fit(adapter, self._components, adapter.word_rows)

    def taught(self, words: Sequence[AdapterWords], texts: Sequence[str | None]) -> dict[str, OneAtATime]:
        """Tokenizers that know these words, by their names in the pipeline; from any thread.

        Args:
            words: of the adapters of one picture.
            texts: that are to be read. Where they have none of the words, no tokenizer need be taught.
        """
        read = unicodedata.normalize("NFC", " ".join(filter(None, texts))).lower()
        found = {}
        for part in self._lenders:
            names = tuple(name for one in words if part in one.rows for name in one.names)
            if any(unicodedata.normalize("NFC", name) in read for name in names):
                found[TOKENIZERS[part]] = self._knowing(part, names)
        return found

    def lent(self, part: str, words: Sequence[AdapterWords]) -> contextlib.AbstractContextManager[None]:
        """Context manager: a text encoder reads the words of the adapters of one picture."""
        rows = [one.rows[part] for one in words if part in one.rows]
        return self._lenders[part].lend(rows) if rows else contextlib.nullcontext()

    def close(self) -> None:
        """The text encoders as they were."""
        for lender in self._lenders.values():
            lender.close()

    def _knowing(self, part: str, names: tuple[str, ...]) -> OneAtATime:
        key = (part, names)
        with self._lock:  # pictures of one request come together, and want the same
            if key not in self._taught:
                self._taught[key] = OneAtATime(taught_copy(self._lenders[part].tokenizer, names))
            self._taught.move_to_end(key)
            while len(self._taught) > MAX_TAUGHT:
                self._taught.popitem(last=False)
            return self._taught[key]
