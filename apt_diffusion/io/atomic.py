"""Atomic writes of files and folders: written under a temporary name, then renamed. No partial file is visible."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(file: str | Path) -> Iterator[Path]:
    """Gives a hidden name in the same folder, with the same ending; at the end of the block that file becomes `file`.

    After an exception, or a kill, `file` is what it was before. Missing folders are made.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem[:40]}-", suffix=f".tmp{file.suffix}")
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
def new_folder(folder: str | Path, replace: bool = False, prefix: str = ".unfinished-") -> Iterator[Path]:
    """Gives a folder next to `folder`, whose name begins with `prefix`; at the end of the block it becomes `folder`.

    After an exception nothing is left. An existing `folder` with content is replaced only with `replace`; else its
    content raises `OSError`.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if replace and folder.exists():
            remove_folder(folder, prefix)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(folder: Path, prefix: str = ".unfinished-") -> None:
    """Takes its name away first: a folder that is half deleted must not look like a whole one."""
    doomed = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
    os.rename(folder, doomed / folder.name)
    shutil.rmtree(doomed)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
