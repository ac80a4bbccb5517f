"""Prepares an adapter for download or publication: removes this computer's paths from its header and card."""

import json
import re
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any

from ..architectures import ARCHITECTURES
from ..io.files import AdapterFile
from ..io.public_names import placeholder_of

# What visitors read in place of a folder that the trainer has written down.
INSTEAD = {
    "instance_data_dir": "pictures", "class_data_dir": "class-pictures", "data_dir": "data",
    "train_data_dir": "data", "logging_dir": "logs",
}  # fmt: skip
_SIMPLE = re.compile(r"(?:\.\*)?(?:\\\.|\w){1,100}")  # the end of a name
LEFT_OUT = ("command_line",)  # names the same folders again


def known_paths(metadata: dict[str, str], name: str) -> dict[str, str]:
    """`{path: what to say instead}` of the folders that an adapter's header names."""
    training = _training(metadata)
    instead = INSTEAD | {"output_dir": f"{name}.safetensors"}
    named = {str(training[key]): word for key, word in instead.items() if training.get(key)}
    # Trainers leave bare names, and a placeholder in the card's code, since paths are no longer in what they write.
    paths = {path: word for path, word in named.items() if PurePath(path).name != path}
    if training.get("output_dir"):
        paths[placeholder_of(last_part(str(training["output_dir"])))] = instead["output_dir"]
    for value in (*training.values(), metadata.get("base_model", "")):
        if isinstance(value, str) and is_path(value):
            paths.setdefault(value, last_part(value))
    return paths


def without_paths(text: str, paths: dict[str, str]) -> str:
    """A text with other words for these paths, the longest first."""
    for path in sorted(paths, key=len, reverse=True):
        text = text.replace(path, paths[path])
    return text


def public_metadata(metadata: dict[str, str], name: str) -> dict[str, str]:
    """An adapter's header as others may read it: the same strings without the paths of this computer."""
    paths = known_paths(metadata, name)
    found = {key: without_paths(value, paths) for key, value in metadata.items() if key not in LEFT_OUT}
    if "training" in found:
        training = {
            key: paths.get(value, value) if isinstance(value, str) else value
            for key, value in _training(metadata).items()
        }
        found["training"] = json.dumps(training, sort_keys=True)
    return found


def check_patterns(file: AdapterFile) -> None:
    """`ValueError` where a stranger's header names modules by a pattern that may take for ever to match."""
    known = {row.target_modules for row in ARCHITECTURES}
    for config in (file.configs or {}).values():
        patterns = config.target_modules
        if isinstance(patterns, str) and patterns not in known and not _SIMPLE.fullmatch(patterns):
            raise ValueError(
                "This adapter names its modules by a pattern that is not taken here: save it with a list."
            )


def is_path(value: str) -> bool:
    """Whether a string is an absolute path, of any system, or leads into a folder that is hidden."""
    return (
        PurePosixPath(value).is_absolute()
        or PureWindowsPath(value).is_absolute()
        or value.startswith("~")
        or any(part.startswith(".") for part in PurePosixPath(value).parts)
    )


def last_part(value: str) -> str:
    """The name at the end of a path."""
    path: PurePath = PureWindowsPath(value) if "\\" in value else PurePosixPath(value)
    return path.name


def _training(metadata: dict[str, str]) -> dict[str, Any]:
    try:
        values = json.loads(metadata.get("training", "{}"))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
