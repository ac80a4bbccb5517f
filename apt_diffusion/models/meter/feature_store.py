"""A key-value store of tensors on disk, in safetensors shards; each shard is written once, atomically."""

import contextlib
import functools
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class FeatureStore:
    """All shards of one folder. Any number of processes may add and read; shards are never changed or deleted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shard_of: dict[str, Path] = {}
        self._known: set[Path] = set()
        self.refresh()

    def refresh(self) -> None:
        """Sees what others have added. `ValueError` for a shard that cannot be read."""
        for shard in sorted(set(self.folder.glob("*.safetensors")) - self._known):
            for key in _open(shard).keys():  # noqa: SIM118
                self._shard_of.setdefault(key, shard)
            self._known.add(shard)

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of

    def __len__(self) -> int:
        return len(self._shard_of)

    def __getitem__(self, key: str) -> Tensor:
        return _open(self._shard_of[key]).get_tensor(key)

    def require(self, names: dict[str, Any]) -> None:
        """`ValueError` with the first few of the names, by key, whose tensors are not here."""
        if all(key in self for key in names):
            return
        self.refresh()
        missing = [str(name) for key, name in names.items() if key not in self]
        if missing:
            some = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
            raise ValueError(
                f"{len(missing)} of {len(names)} are not in {self.folder}, or have changed since: {some}. Fill it."
            )

    def check_space(self, needed: int) -> None:
        """`OSError` unless so many bytes are free."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"{self.folder} needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free. Choose another "
                "folder, dtype=torch.float16 for half of it, or train without the cache."
            )

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Writes one shard with the tensors that no other process has written meanwhile."""
        self.refresh()
        new = {key: tensor for key, tensor in tensors.items() if key not in self}
        if not new:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        temporary, shard = self.folder / f".{name}.tmp", self.folder / f"{name}.safetensors"
        try:
            save_file(new, temporary, {"format": "pt"})
            os.replace(temporary, shard)
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"{shard} could not be written ({error}). Everything written before is kept: make room and run again."
            ) from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
        self.refresh()


# Readers map their file into memory; they are kept open, but not all of thousands.
@functools.lru_cache(maxsize=256)
def _open(shard: Path) -> safe_open:
    try:
        return safe_open(shard, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{shard} is damaged ({error}): delete it and run again, it will be made anew.") from error
