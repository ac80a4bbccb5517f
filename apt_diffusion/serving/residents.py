"""The adapters that are attached to an engine's pipeline: the most recently used ones, up to a number of bytes."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..components import components_of, cores_of
from ..io.files import AdapterFile
from ..io.load import load_apt_weights
from ..model import ModelAdapters
from ..words import AdapterWords, check_apart
from .store import AdapterStore, Stamp
from .vocabulary import Vocabulary

Version = tuple[str, Stamp | None]  # an adapter's name, and its file as it was


@dataclass
class _Resident:
    name: str  # that it is attached under
    size: int  # bytes
    words: AdapterWords  # known only to prompts of pictures that are drawn with it
    users: int = 0  # pictures that are being drawn with it


class Residents:
    """Three tiers: on the pipeline's device, in the store's memory, on disk. What leaves one is still in the next.

    A file that has changed is another version: pictures that were begun go on with the former one. Not for several
    threads, but for `fetch` and `release`.

    Args:
        pipeline: to attach to. The adapters that it has already stay.
        store: where the others come from, or `None`.
        max_bytes: of attached adapters. One that is larger is refused.
        vocabulary: of the pipeline.
    """

    def __init__(self, pipeline: Any, store: AdapterStore | None, max_bytes: int, vocabulary: Vocabulary) -> None:
        self.pipeline = pipeline
        self.store = store
        self.max_bytes = max_bytes
        self.vocabulary = vocabulary
        self.found = Counter({"device": 0, "memory": 0, "disk": 0})  # where adapters were, when they were asked for
        components = [ModelAdapters.of(component) for component in components_of(pipeline).values()]
        self.own = {name for component in components for name in component.configs}
        self._attached: OrderedDict[Version, _Resident] = OrderedDict()  # the least recently used first
        self._count = 0
        self._lock = threading.Lock()  # of the counts

    def names(self) -> list[str]:
        """What can be asked for now."""
        return sorted(self.own | set(self.store.names() if self.store else ()))

    def version(self, name: str) -> Version:
        """The adapter as it is now; `ValueError` where there is none of this name."""
        if name in self.own:
            return name, None
        if self.store is None:
            raise ValueError(f"There is no adapter {name!r}; there are {len(self.own)}: {', '.join(sorted(self.own))}")
        return name, self.store.version(name)

    def fetch(self, name: str) -> tuple[Version, AdapterFile | None]:
        """The adapter for `attach`, read where it is not attached yet. From any thread.

        Raises:
            ValueError: for a file that is gone, damaged, or larger than all that may be attached.
        """
        version = self.version(name)
        if version[1] is None or version in self._attached:
            self._count_found("device")
            return version, None
        assert self.store is not None  # else there is no such version
        self._count_found("memory" if name in self.store.names_in_memory else "disk")
        adapter = self.store.get(name)
        self._check_size(f"the adapter {name!r}", adapter)
        return version, adapter

    def fits(self, wanted: Mapping[Version, AdapterFile | None]) -> bool:
        """Whether these can be attached beside those that are in use."""
        used = sum(r.size for version, r in self._attached.items() if r.users and version not in wanted)
        new = sum(
            self._attached[version].size if version in self._attached else adapter.num_bytes if adapter else 0
            for version, adapter in wanted.items()
        )
        return not used or used + new <= self.max_bytes

    def attach(self, version: Version, adapter: AdapterFile | None) -> tuple[Version, str]:
        """Takes an adapter in use, until `release` of the version that this returns, and attaches it where it is not.

        Returns:
            The version, a newer one where this one has left meanwhile, and its name on the pipeline.

        Raises:
            ValueError: for one that does not fit this model, or that is gone.
        """
        if version[1] is None:
            return version, version[0]
        resident = self._attached.get(version)
        if resident is None and adapter is None:
            version, adapter = self.fetch(version[0])
            resident = self._attached.get(version)
        if resident is None:
            assert adapter is not None
            resident = self._attach(version, adapter)
        self._attached.move_to_end(version)
        with self._lock:
            resident.users += 1
        return version, resident.name

    def words(self, versions: Sequence[Version]) -> list[AdapterWords]:
        """The new words of adapters in use; `ValueError` where two of them have the same."""
        words = [self._words_of(version) for version in versions]
        check_apart(words)
        return words

    def try_out(self, adapter: AdapterFile) -> None:
        """Attaches an adapter and takes it off; `ValueError` where it does not fit, or is too large."""
        self._check_size("this adapter", adapter)
        version: Version = ("", None)
        self._attach(version, adapter)
        self._detach(version)

    def release(self, version: Version) -> None:
        """One picture fewer uses it."""
        if version[1] is not None:
            with self._lock:
                self._attached[version].users -= 1

    def clear(self) -> None:
        """Detaches all that came from the store."""
        for version in list(self._attached):
            self._detach(version)

    @property
    def bytes(self) -> int:
        """Size of what is attached from the store."""
        return sum(resident.size for resident in self._attached.values())

    def __len__(self) -> int:
        return len(self._attached)

    def _attach(self, version: Version, adapter: AdapterFile) -> _Resident:
        self.vocabulary.check(adapter)
        self._make_room(adapter.num_bytes)
        self._count += 1
        resident = _Resident(f"{version[0]}#{self._count}", adapter.num_bytes, adapter.new_words)
        load_apt_weights(self.pipeline, replace(adapter, word_rows={}), resident.name, activate=False)
        self._attached[version] = resident
        try:
            for component in components_of(self.pipeline).values():
                ModelAdapters.of(component).check_batch_axis()
        except ValueError:
            self._detach(version)
            raise
        for core in cores_of(self.pipeline):
            if not core.keep_folded:
                core.set_keep_folded(True)
        return resident

    def _words_of(self, version: Version) -> AdapterWords:
        return self.vocabulary.words_of_own(version[0]) if version[1] is None else self._attached[version].words

    def _check_size(self, what: str, adapter: AdapterFile) -> None:
        if adapter.num_bytes > self.max_bytes:
            raise ValueError(f"The server holds {self.max_bytes} bytes of adapters; {what} has {adapter.num_bytes}.")

    def _count_found(self, tier: str) -> None:
        with self._lock:
            self.found[tier] += 1

    def _make_room(self, size: int) -> None:
        for version, resident in list(self._attached.items()):
            if self.bytes + size <= self.max_bytes:
                return
            if not resident.users:
                self._detach(version)

    def _detach(self, version: Version) -> None:
        name = self._attached.pop(version).name
        for component in components_of(self.pipeline).values():
            adapters = ModelAdapters.of(component)
            if name in adapters.configs:
                adapters.delete(name)
