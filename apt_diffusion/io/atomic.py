"""Files and folders that are whole or not there: written under a temporary name, then renamed."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(file: str | Path) -> Iterator[Path]:
    """Gives a temporary name in the same folder; at the end of the block that file becomes `file`.

    After an exception, or a kill, `file` is what it was before. Missing folders are made.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name[:40]}-", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are for their owner only
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: str | Path, text: str) -> Path:
    """Writes `text` as UTF-8; the file is whole or as it was before."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(file)


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Gives a temporary folder next to `folder`; at the end of the block it gets that name.

    After an exception nothing is left. An existing empty `folder` is replaced; one with content raises `OSError`.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:40]}-"))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
