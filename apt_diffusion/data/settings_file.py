"""Files of settings that people write: bounded, and with everything that is wrong told at once."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_BYTES = 2**20  # thousands of folders or prompts


def read_text(flag: str, file: str | Path) -> str:
    """The text of a file.

    Args:
        flag: that names the file, for errors.
        file: in UTF-8.

    Raises:
        ValueError: for a file that is not there, too large, or no text.
    """
    file = _checked(flag, file)
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag}: {file} is no text in UTF-8: {error}.") from error


def read_toml(flag: str, file: str | Path) -> tuple[dict[str, Any], str]:
    """A file's values, and its text; `ValueError` for a file that is not there, too large, or no TOML."""
    file = _checked(flag, file)
    try:
        text = file.read_text(encoding="utf-8-sig")
        return tomllib.loads(text), text
    except (ValueError, RecursionError) as error:  # TOML's and Unicode's are ValueErrors
        raise ValueError(f"{flag}: {file} is no TOML: {error}.") from error


def _checked(flag: str, file: str | Path) -> Path:
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{flag}: there is no file {file}.")
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"{flag}: {file} is larger than {MOST_BYTES // 2**20} MiB, which is no such file: not read.")
    return file


def refuse(flag: str, file: str | Path, found: Iterable[tuple[int, str]]) -> None:
    """`ValueError` with all mistakes, `(line, what is wrong)` each, if there are any."""
    listed = [f"\n  line {line}: {mistake}" for line, mistake in found]
    if listed:
        count = "a mistake" if len(listed) == 1 else f"{len(listed)} mistakes"
        raise ValueError(f"{flag}: {file} has {count}:{''.join(listed)}")
