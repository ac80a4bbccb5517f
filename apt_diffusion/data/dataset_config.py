"""Several folders of pictures in one TOML file, each with its own prompt, class, captions, masks, repeats and weight.

    [[folders]]
    instance_data_dir = "dog"            # relative to the file
    instance_prompt = "a photo of sks dog"
    repeats = 4

The keys are the names of the trainer's flags; what a folder does not say is as the command line has it.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import kohya_config
from .captions import CaptionOptions
from .folders import MAX_REPEATS, SIDECARS, FolderOptions
from .settings_file import read_toml, refuse
from .toml_lines import TomlLines


@dataclass(frozen=True)
class ConfiguredFolder:
    """One folder of the file."""

    path: Path
    prompt: str
    options: FolderOptions


@dataclass(frozen=True)
class DatasetConfig:
    """What the file says.

    Attributes:
        folders: of the subject, at least one.
        of_class: of its class.
        for_the_run: settings of a file of kohya's scripts that are flags here, each with its flag.
    """

    folders: list[ConfiguredFolder]
    of_class: list[ConfiguredFolder]
    for_the_run: list[str]


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
    "caption_extension": _Key((str,), f"{' or '.join(SIDECARS)}", lambda value: value in SIDECARS),
    "caption_separator": _Key((str,), "more than spaces", lambda value: bool(value.strip(" "))),
    "caption_tag_dropout_rate": _SHARE,
    "caption_prefix": _TEXT,
    "caption_suffix": _TEXT,
    "trigger_word": _TEXT,
    "enable_wildcard": _SWITCH,
    "keep_tokens_separator": _TEXT,
    "secondary_separator": _TEXT,
}
TABLE = "folders"


def read_dataset_config(file: str | Path, defaults: Mapping[str, Any]) -> DatasetConfig:
    """The folders of the file, in its order.

    Args:
        file: TOML with at least one `[[folders]]`, or a file of kohya's scripts, with `[[datasets.subsets]]`.
        defaults: the values of the command line by key: for keys that a folder leaves out. Not `repeats`, which are 1.

    Raises:
        ValueError: with everything that is wrong with the file, each with its line.
    """
    file = Path(file)
    content, text = read_toml("--dataset_config", file)
    lines = TomlLines(text)
    kohyas = kohya_config.is_kohyas(content)
    mistakes = _kohyas_mistakes(content, defaults) if kohyas else _mistakes(content, file.parent, defaults)
    found = sorted({(lines.of(table, key), mistake) for table, key, mistake in mistakes})
    refuse("--dataset_config", file, found)
    return _kohyas_folders(content, defaults) if kohyas else _folders(content, file.parent, defaults)


def _folders(content: Mapping[str, Any], where: Path, defaults: Mapping[str, Any]) -> DatasetConfig:
    folders, of_class = [], []
    for own in content[TABLE]:
        values = {**defaults, **own}
        folders.append(_folder(where, values))
        if "class_data_dir" in values:
            path = where / Path(values["class_data_dir"]).expanduser()
            options = dataclasses.replace(folders[-1].options, prompt_from="class_prompt")
            of_class.append(ConfiguredFolder(path, values["class_prompt"], _of_class(options)))
    return DatasetConfig(folders, list(dict.fromkeys(of_class)), [])  # several folders may have the same class


def _of_class(options: FolderOptions) -> FolderOptions:
    """How the class of a folder is read: as it is, and each picture once."""
    return FolderOptions(
        options.caption_column, options.recursive, options.prompt_from, sidecars=options.sidecars, of_class=True
    )


def _kohyas_folders(content: Mapping[str, Any], defaults: Mapping[str, Any]) -> DatasetConfig:
    """Paths in such files are relative to the folder in which the trainer was started."""
    folders, of_class = [], []
    for own, _, is_class in kohya_config.subsets(content):
        values = {**defaults, **own}
        folder = _folder(Path(), values, "class_tokens")
        if is_class:
            of_class.append(ConfiguredFolder(folder.path, folder.prompt, _of_class(folder.options)))
        else:
            folders.append(folder)
    return DatasetConfig(folders, list(dict.fromkeys(of_class)), kohya_config.for_the_run(content))


def _folder(where: Path, values: Mapping[str, Any], prompt_from: str = "instance_prompt") -> ConfiguredFolder:
    captions = CaptionOptions(
        shuffle=values["shuffle_caption"],
        keep_tokens=values["keep_tokens"],
        separator=values["caption_separator"],
        tag_dropout=values["caption_tag_dropout_rate"],
        prefix=values["caption_prefix"].strip(),
        suffix=values["caption_suffix"].strip(),
        trigger=values["trigger_word"].strip(),
        dropout=values["caption_dropout_rate"],
        wildcards=values["enable_wildcard"],
        keep_separator=values["keep_tokens_separator"].strip(),
        inner_separator=values["secondary_separator"].strip(),
    )
    masks = values.get("mask_data_dir")
    options = FolderOptions(
        values["caption_column"],
        values["recursive"],
        prompt_from,
        captions,
        values["masked_loss"],
        None if masks is None else where / Path(masks).expanduser(),
        values.get("repeats", 1),
        values.get("weight", 1.0),
        (values["caption_extension"],) if "caption_extension" in values else SIDECARS,
    )
    return ConfiguredFolder(where / Path(values["instance_data_dir"]).expanduser(), values["instance_prompt"], options)


def _mistakes(content: Mapping[str, Any], where: Path, defaults: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Table, key and text of everything that is wrong."""
    for key in content:
        if key != TABLE:
            yield "", key, f"{key!r} is not known here: give each folder a [[{TABLE}]] of its own."
    folders = content.get(TABLE, [])
    if not isinstance(folders, list) or not folders or not all(isinstance(folder, dict) for folder in folders):
        yield "", TABLE, f"there is no [[{TABLE}]], of which each folder has one."
        return
    for index, folder in enumerate(folders):
        table = f"{TABLE}[{index}]"
        for key, value in folder.items():
            mistake = _mistake(key, key, value, where)
            if mistake:
                yield table, key, mistake
        for key in ("instance_data_dir", "instance_prompt"):
            if key not in folder and (key == "instance_data_dir" or not defaults.get(key)):
                yield table, "", f"this folder has no {key}."
        if "mask_data_dir" in folder and folder.get("masked_loss", defaults.get("masked_loss")) is False:
            yield table, "mask_data_dir", "mask_data_dir needs masked_loss = true beside it."
        for key, other in (("class_data_dir", "class_prompt"), ("class_prompt", "class_data_dir")):
            if key in folder and other not in folder:
                yield table, key, f"{key} needs a {other} beside it."


def _kohyas_mistakes(content: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The same for a file of kohya's scripts."""
    yield from kohya_config.unknown(content)
    subsets = list(kohya_config.subsets(content))
    if all(is_class for _, _, is_class in subsets):
        yield "", "datasets", "there is no [[datasets.subsets]] with pictures of the subject."
    for values, places, is_class in subsets:
        for key, value in values.items():
            table, theirs = places[key]
            mistake = _mistake(key, theirs, value, Path())
            if mistake:
                yield table, theirs, mistake
        if "instance_data_dir" not in values:
            yield *places[""], "this subset has no image_dir."
        if "instance_prompt" not in values and (is_class or not defaults.get("instance_prompt")):
            hint = "" if is_class else ", and there is no --instance_prompt"
            yield *places[""], f"this subset has no class_tokens{hint}."
        masks = values.get("mask_data_dir")
        if masks is not None and not is_class and not values.get("masked_loss", defaults.get("masked_loss")):
            yield *places["mask_data_dir"], "conditioning_data_dir needs --masked_loss, or alpha_mask = true."


def _mistake(key: str, name: str, value: Any, where: Path) -> str:
    """What is wrong with a value, or nothing; `name` is the key as the file has it."""
    if key not in KEYS:
        near = difflib.get_close_matches(key, KEYS, 1)
        hint = f": is {near[0]!r} meant?" if near else f". Keys: {', '.join(KEYS)}."
        return f"{name!r} is no key of a folder{hint}"
    known = KEYS[key]
    if type(value) not in known.kinds or not known.is_allowed(value):
        return f"{name} must be {known.wanted}, got {value!r}."
    if key.endswith("_data_dir") and not _is_folder(where / Path(value).expanduser()):
        return f"{name}: there is no folder {where / value}."
    return ""


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long
        return False
