"""Names for what lies on the user's machine, for files that are shared: a folder's name, not the way to it."""

import os
from pathlib import Path
from typing import Any

# Flags of the trainers that name a folder which the run makes.
WRITTEN = ("output_dir", "class_data_dir", "cache_encoder_outputs")


def is_local(value: str) -> bool:
    """Whether a text is a path on this machine: absolute, in a home folder, or a relative one that exists.

    A bare name is no path, nor is a hub id of which there is no folder here, nor a prompt that begins with a slash.
    """
    path = Path(os.path.expanduser(value))
    if str(path) != str(Path(value)):  # it began with ~
        return True
    if path.is_absolute():
        return _exists(Path(*path.parts[:2]))
    return len(path.parts) > 1 and _exists(path)


def public_name(value: str) -> str:
    """The name of the folder or file where `value` is a path of this machine, also behind `name=`; else `value`."""
    if is_local(value):
        return os.path.basename(os.path.abspath(os.path.expanduser(value))) or "files"
    key, equals, rest = value.partition("=")
    return f"{key}={public_name(rest)}" if equals and key.isidentifier() else value


def public_value(value: Any) -> Any:
    """`public_name` of a setting's value and of the values in its list; numbers and switches are as they were."""
    if isinstance(value, list | tuple):
        return [public_value(one) for one in value]
    return public_name(str(value)) if isinstance(value, str | Path) else value


def public_setting(name: str, value: Any) -> Any:
    """`public_value` of a flag; a place that a run writes is local before it is there."""
    if name in WRITTEN and isinstance(value, str | Path) and str(value):
        return os.path.basename(os.path.abspath(os.path.expanduser(value))) or "files"
    return public_value(value)


def placeholder(value: str) -> str:
    """What stands for a local folder in code that others run: `path/to/<its name>`; anything else is as it was."""
    return placeholder_of(public_name(value)) if is_local(value) or os.path.isdir(value) else value


def placeholder_of(name: str) -> str:
    """The placeholder of a folder of this name."""
    return f"path/to/{name}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a long prompt is no name of a file
        return False
