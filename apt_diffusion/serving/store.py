"""A store for serving: many adapters on disk, the most recently used of them in memory.

pipe.apt_store = AdapterStore("adapters")
pipe("a sks dog", apt_scale={"dog": 0.8})                                # attached for this call only
pipe(["a sks dog", "a sks cat"], apt_adapter_names=["dog", "cat"])       # so are these
pipe.load_apt_weights(pipe.apt_store.get("cat"), "slot", hotswap=True)   # swapped in place, from memory
"""

import contextlib
import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..components import components_of
from ..io.files import WEIGHTS_NAME, AdapterFile, read_adapter_file
from ..io.load import load_apt_weights
from ..model import ModelAdapters
from ..words import check_apart, remove_from_pipeline

Stamp = tuple[int, int, int]


class _Kept(NamedTuple):
    adapter: AdapterFile
    stamp: Stamp  # of the file that it was read from
    size: int


class AdapterStore:
    """The adapters of a folder: `name/pytorch_apt_weights.safetensors` (a trainer's output) or `name.safetensors`.

    Names are looked up in the folder's listing and never become paths; links that lead out of it are not followed.
    Adapters may come, change and go on disk at any time. Every method may be called from several threads; a pipeline
    itself serves one call at a time.

    Args:
        folder: where the adapters are.
        max_bytes: what may be kept in memory. An adapter larger than this is read for each use.

    Raises:
        FileNotFoundError: where there is no such folder.
        ValueError: for a negative limit.
    """

    def __init__(self, folder: str | Path, max_bytes: int = 2**30) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self.max_bytes = max_bytes
        if not self.folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder}: an adapter store needs one, even an empty one.")
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, got {max_bytes}.")
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()  # of the two dicts
        self._reading: dict[str, threading.Lock] = defaultdict(threading.Lock)  # two threads do not read one file

    def names(self) -> list[str]:
        """Names of the adapters that are on disk now, sorted."""
        return sorted(self._files())

    def file(self, name: str) -> Path:
        """The file of one adapter, next to a trainer's model card and samples. `ValueError` if unknown."""
        file = self._files(name).get(name)
        if file is None:
            with self._lock:
                self._kept.pop(name, None)
                self._reading.pop(name, None)
            names = self.names()
            some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"There is no adapter {name!r} in {self.folder}; there are {len(names)}: {some}")
        return file

    def version(self, name: str) -> Stamp:
        """Changes whenever the file of this adapter does. `ValueError` if unknown."""
        return _stamp(self.file(name))

    def get(self, name: str) -> AdapterFile:
        """One adapter, from memory where it is kept and unchanged on disk. Its tensors are shared: only read them.

        Raises:
            ValueError: for an unknown name, or a file that is damaged or no adapter.
        """
        file = self.file(name)
        with self._lock:
            reading = self._reading[name]
        with reading:
            stamp = _stamp(file)  # before reading: what changes meanwhile is read again next time
            with self._lock:
                kept = self._kept.get(name)
                if kept is not None and kept.stamp == stamp:
                    self._kept.move_to_end(name)
                    return kept.adapter
            adapter = _in_memory(read_adapter_file(file, with_words=True))
            self._keep(name, adapter, stamp)
            return adapter

    @contextlib.contextmanager
    def attached(self, model: Any, names: str | Sequence[str]) -> Iterator[None]:
        """Context manager: attaches the named adapters to `model` in addition to its own, without activating them.

        One that `model` has already is left alone. A failure attaches none. New words are known as long as this holds.

        Args:
            model: a model, a pipeline, or a dict of components.
            names: of the store.

        Raises:
            ValueError: as `get`, for an adapter that does not fit this model, and for new words that two of them have.
        """
        components = components_of(model)
        present = {name for component in components.values() for name in ModelAdapters.of(component).configs}
        wanted = dict.fromkeys([names] if isinstance(names, str) else names)
        adapters = {name: self.get(name) for name in wanted if name not in present}
        check_apart([adapter.new_words for adapter in adapters.values()])
        attached = []
        try:
            for name, adapter in adapters.items():
                load_apt_weights(model, adapter, name, activate=False)
                attached.append(name)
            yield
        finally:
            for name in attached:
                remove_from_pipeline(model, name)
                for component in map(ModelAdapters.of, components.values()):
                    if name in component.configs:  # it may have been deleted meanwhile
                        component.delete(name)

    @property
    def bytes_in_memory(self) -> int:
        """Size of all tensors that are kept."""
        with self._lock:
            return sum(kept.size for kept in self._kept.values())

    @property
    def names_in_memory(self) -> list[str]:
        """Names of the adapters in memory, the least recently used first."""
        with self._lock:
            return list(self._kept)

    def _keep(self, name: str, adapter: AdapterFile, stamp: Stamp) -> None:
        with self._lock:
            self._kept.pop(name, None)
            if adapter.num_bytes > self.max_bytes:
                return
            self._kept[name] = _Kept(adapter, stamp, adapter.num_bytes)
            while sum(kept.size for kept in self._kept.values()) > self.max_bytes:
                self._kept.popitem(last=False)

    def _files(self, start: str = "") -> dict[str, Path]:
        """Adapter files whose name starts with `start`; the filter avoids a stat per file."""
        files = {}
        for entry in map(self.folder.joinpath, filter(lambda name: name.startswith(start), os.listdir(self.folder))):
            if entry.name.startswith("."):
                continue
            file = entry / WEIGHTS_NAME if entry.is_dir() else entry
            if file.suffix == ".safetensors" and file.is_file() and file.resolve().is_relative_to(self.folder):
                name = entry.name if entry.is_dir() else entry.stem
                if name not in files or entry.is_dir():  # a folder goes before a file of the same name
                    files[name] = file
        return files


def _stamp(file: Path) -> Stamp:
    try:
        stat = os.stat(file)
    except FileNotFoundError as error:
        raise ValueError(f"{file} has just been removed.") from error
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _in_memory(file: AdapterFile) -> AdapterFile:
    # What safetensors hands out is mapped from the file, and would change with it.
    tensors, rows = ({key: tensor.clone() for key, tensor in held.items()} for held in (file.tensors, file.word_rows))
    return replace(file, tensors=tensors, word_rows=rows)
