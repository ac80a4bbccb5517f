"""Several folders of pictures in one TOML file, each with its own prompt, class, captions, masks, repeats and weight.

    [[folders]]
    instance_data_dir = "dog"            # relative to the file
    instance_prompt = "a photo of sks dog"
    repeats = 4

The keys are the names of the trainer's flags; what a folder does not say is as the command line has it.
"""

import difflib
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .captions import CaptionOptions
from .folders import AS_IT_IS, MAX_REPEATS, FolderOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class ConfiguredFolder:
    """One folder of the file, and that of its class, if it has one."""

    path: Path
    prompt: str
    options: FolderOptions
    class_path: Path | None = None
    class_prompt: str = ""
    class_options: FolderOptions = AS_IT_IS


@dataclass(frozen=True)
class _Key:
    """What the value of a key may be."""

    kinds: tuple[type, ...]
    wanted: str
    is_allowed: Callable[[Any], bool] = lambda value: True


_TEXT = _Key((str,), "a text")
_NAME = _Key((str,), "a text that is not empty", lambda value: bool(value.strip()))
_SWITCH = _Key((bool,), "true or false")
_SHARE = _Key((int, float), "a number of at least 0 and below 1", lambda value: 0 <= value < 1)
KEYS = {
    "instance_data_dir": _NAME,
    "instance_prompt": _NAME,
    "class_data_dir": _NAME,
    "class_prompt": _NAME,
    "repeats": _Key((int,), f"a whole number from 1 to {MAX_REPEATS}", lambda value: 1 <= value <= MAX_REPEATS),
    "weight": _Key((int, float), "a number of at least 0, and finite", lambda value: 0 <= value < math.inf),
    "recursive": _SWITCH,
    "masked_loss": _SWITCH,
    "mask_data_dir": _NAME,
    "caption_column": _NAME,
    "caption_dropout_rate": _SHARE,
    "shuffle_caption": _SWITCH,
    "keep_tokens": _Key((int,), "a whole number of at least 0", lambda value: value >= 0),
    "caption_separator": _NAME,
    "caption_tag_dropout_rate": _SHARE,
    "caption_prefix": _TEXT,
    "caption_suffix": _TEXT,
    "trigger_word": _TEXT,
}
TABLE = "folders"


def read_dataset_config(file: str | Path, defaults: Mapping[str, Any]) -> list[ConfiguredFolder]:
    """The folders of the file, in its order.

    Args:
        file: TOML with at least one `[[folders]]`.
        defaults: the values of the command line by key: for keys that a folder leaves out. Not `repeats`, which are 1.

    Raises:
        ValueError: with everything that is wrong with the file, each with its line.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"--dataset_config: there is no file {file}.")
    try:
        text = file.read_text(encoding="utf-8-sig")
        content = tomllib.loads(text)
    except ValueError as error:  # TOML's and Unicode's are ones
        raise ValueError(f"--dataset_config: {file} is no TOML: {error}.") from error
    found = sorted(_mistakes(content, _lines(text), file.parent, defaults))
    if found:
        listed = "".join(f"\n  line {line}: {mistake}" for line, mistake in found)
        count = "a mistake" if len(found) == 1 else f"{len(found)} mistakes"
        raise ValueError(f"--dataset_config: {file} has {count}:{listed}")
    return [_folder(file.parent, defaults | folder) for folder in content[TABLE]]


def _folder(where: Path, values: Mapping[str, Any]) -> ConfiguredFolder:
    captions = CaptionOptions(
        shuffle=values["shuffle_caption"],
        keep_tokens=values["keep_tokens"],
        separator=values["caption_separator"],
        tag_dropout=values["caption_tag_dropout_rate"],
        prefix=values["caption_prefix"].strip(),
        suffix=values["caption_suffix"].strip(),
        trigger=values["trigger_word"].strip(),
        dropout=values["caption_dropout_rate"],
    )
    shared = values["caption_column"], values["recursive"]
    repeats, weight = values.get("repeats", 1), values.get("weight", 1.0)
    masks = values.get("mask_data_dir")
    mask_folder = None if masks is None else where / Path(masks).expanduser()
    options = FolderOptions(*shared, "instance_prompt", captions, values["masked_loss"], mask_folder, repeats, weight)
    of_class = values.get("class_data_dir")
    return ConfiguredFolder(
        where / Path(values["instance_data_dir"]).expanduser(),
        values["instance_prompt"],
        options,
        None if of_class is None else where / Path(of_class).expanduser(),
        values.get("class_prompt") or "",
        FolderOptions(*shared, "class_prompt"),
    )


def _mistakes(
    content: Mapping[str, Any], lines: Mapping[tuple[int, str], int], where: Path, defaults: Mapping[str, Any]
) -> Iterator[tuple[int, str]]:
    """Line and text of everything that is wrong."""
    for key in content:
        if key != TABLE:
            yield lines.get((-1, key), 1), f"{key!r} is not known here: give each folder a [[{TABLE}]] of its own."
    folders = content.get(TABLE, [])
    if not isinstance(folders, list) or not folders or not all(isinstance(folder, dict) for folder in folders):
        yield lines.get((-1, TABLE), 1), f"there is no [[{TABLE}]], of which each folder has one."
        return
    for index, folder in enumerate(folders):
        first = lines.get((index, ""), lines.get((-1, TABLE), 1))
        for key, value in folder.items():
            mistake = _mistake(key, value, where)
            if mistake:
                yield lines.get((index, key), first), mistake
        for key in ("instance_data_dir", "instance_prompt"):
            if key not in folder and (key == "instance_data_dir" or not defaults.get(key)):
                yield first, f"this folder has no {key}."
        if "mask_data_dir" in folder and folder.get("masked_loss", defaults.get("masked_loss")) is False:
            yield lines.get((index, "mask_data_dir"), first), "mask_data_dir needs masked_loss = true beside it."
        for key, other in (("class_data_dir", "class_prompt"), ("class_prompt", "class_data_dir")):
            if key in folder and other not in folder:
                yield lines.get((index, key), first), f"{key} needs a {other} beside it."


def _mistake(key: str, value: Any, where: Path) -> str:
    """What is wrong with a value, or nothing."""
    if key not in KEYS:
        near = difflib.get_close_matches(key, KEYS, 1)
        return f"{key!r} is no key of a folder" + (
            f": is {near[0]!r} meant?" if near else f". Keys: {', '.join(KEYS)}."
        )
    known = KEYS[key]
    if type(value) not in known.kinds or not known.is_allowed(value):
        return f"{key} must be {known.wanted}, got {value!r}."
    if key.endswith("_data_dir") and not (where / Path(value).expanduser()).is_dir():
        return f"{key}: there is no folder {where / value}."
    return ""


def _lines(text: str) -> dict[tuple[int, str], int]:
    """`{(folder, key): line}`; the folder is -1 outside of all, the key empty for its heading."""
    # Texts over several lines may hold what looks like a key.
    text = re.sub(r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'', lambda match: '""' + "\n" * match[0].count("\n"), text)
    found: dict[tuple[int, str], int] = {}
    folder, inside = -1, -1
    for number, line in enumerate(text.split("\n"), start=1):
        heading = re.match(r"\s*(\[\[?)\s*([\w-]+)\s*\.?\s*([\w-]*)", line)
        key = re.match(r"\s*[\"']?([\w-]+)[\"']?\s*(\.[^=]*)?=", line)
        if heading and heading[2] == TABLE and heading[3]:  # a table within a folder
            found.setdefault((folder, heading[3]), number)
        elif heading and heading[2] == TABLE and heading[1] == "[[":
            folder = inside = folder + 1
            found[folder, ""] = number
        elif heading:
            inside = -1
            found.setdefault((-1, heading[2]), number)
        elif key:
            found.setdefault((inside, key[1]), number)
    return found
