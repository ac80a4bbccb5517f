"""The settings of a run as a file: `--config run.toml` is read before the command line, and every run writes one.

    config.toml          all settings, local folders by their names: it is uploaded, and may be shared
    config.local.toml    where these folders are; it stays on this machine

`--config out/config.toml` makes the run again, on the same machine without another flag.
"""

import argparse
import copy
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..data.settings_file import read_toml, refuse
from ..data.toml_lines import TomlLines
from ..io.atomic import write_text
from ..io.public_names import WRITTEN, is_local, public_setting, public_value
from ..miniature import MODELS
from . import deepspeed_config
from .provenance import SECRETS

CONFIG_NAME = "config.toml"
# Flags that say how a run is started and where its results go, not what it computes.
ASIDE = {
    *SECRETS, "help", "config", "local_rank", "check_data", "resume_from_checkpoint", "allow_changed_data",
    "push_to_hub", "hub_model_id",
}  # fmt: skip
# Ends of the names of flags that may hold a path; the others' relative paths are written as they are.
PATHS = (
    "_dir", "_path", "_config", "_images", "_outputs", "_prompts", "adapter", "dataset_name", "tokenizer_name",
)  # fmt: skip
HEADING = "# {command}\n# --config with this file makes the run again; flags on the command line override it.\n"
LOCAL_HEADING = f"# Where the folders of {CONFIG_NAME} are on this machine; not to be shared.\n"


class RunArguments(argparse.Namespace):
    """Flags by name, as `vars` has them.

    Attributes:
        parser: whose flags they are.
        given: the flags before checks and defaults of the base changed them; a run is made again from these.
        of_deepspeed: what is done in place of DeepSpeed, where the launcher asked for it.
    """

    __slots__ = ("given", "of_deepspeed", "parser")  # so that they are not among the flags

    parser: argparse.ArgumentParser
    given: dict[str, Any]
    of_deepspeed: str | None


def add_config_flag(add: Callable[..., Any]) -> None:
    """`--config`, for `add_argument` of a parser or group."""
    add(
        "--config",
        metavar="FILE",
        help="A TOML file of flags without their dashes, such as the config.toml that every run leaves; flags on the "
        "command line override it.",
    )


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> RunArguments:
    """The flags of the command line, and of the file that `--config` names for those that it does not have.

    Args:
        parser: with `--config` among its flags.
        argv: `sys.argv` if `None`.

    Raises:
        ValueError: with everything that is wrong with the file, each with its line; for a config of DeepSpeed that
            cannot be followed.
    """
    typed = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(prog=parser.prog, add_help=False)
    add_config_flag(first.add_argument)
    file = first.parse_known_args(typed)[0].config
    from_file = [] if file is None else _read(parser, Path(file))
    args = parser.parse_args([*from_file, *typed], RunArguments())
    del args.config  # what it said is among the flags
    for name, value in vars(args).items():
        if name.endswith(PATHS):  # no shell has seen those of a file
            setattr(args, name, _expanded(value))
    args.of_deepspeed = deepspeed_config.follow(args)
    args.parser, args.given = parser, copy.deepcopy(vars(args))
    return args


def command_words(args: RunArguments, seed: int) -> list[str]:
    """The flags of a command that makes the run: those that are not at their defaults, paths by their names."""
    words = []
    for action, value in _settings(args, seed):
        if value != args.parser.get_default(action.dest):
            words += _words(action, public_setting(action.dest, value))
    return words


def write_config(args: RunArguments, seed: int, command: str) -> None:
    """Writes `config.toml` and `config.local.toml` into the output folder.

    Args:
        args: of the run.
        seed: the one that the run has, whether it was given or drawn.
        command: for the heading.
    """
    folder = Path(args.output_dir)
    groups: dict[str, list[str]] = {}
    local = []
    titles = {action: group.title for group in args.parser._action_groups for action in group._group_actions}
    for action, value in _settings(args, seed):
        key = _key(action)
        groups.setdefault(str(titles[action]), []).append(f"{key} = {_toml(public_setting(key, value))}")
        if key.endswith(PATHS) and key != "logging_dir":  # which lies in the output folder
            if key in WRITTEN:
                absolute = os.path.abspath(value)
            else:
                absolute = [_absolute(one) for one in value] if isinstance(value, list) else _absolute(value)
            if absolute != value or public_setting(key, value) != value:
                local.append(f"{key} = {_toml(absolute)}")
        elif public_value(value) != value:
            local.append(f"{key} = {_toml(value)}")
    sections = ["\n".join([f"# {title}", *lines, ""]) for title, lines in groups.items()]
    shown = re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\x{ord(match[0]):02x}", " ".join(command.split()))
    write_text(folder / CONFIG_NAME, "\n".join([HEADING.format(command=shown), *sections]))
    write_text(_local(folder / CONFIG_NAME), "\n".join([LOCAL_HEADING, *local, ""]))


def local_path(folder: str | Path, name: str) -> str:
    """The folder or file that a run in `folder` has named `name` for others, if it was made here; else `name`."""
    try:
        values, _ = read_toml("--config", _local(Path(folder) / CONFIG_NAME))
    except (OSError, ValueError):
        return name
    return next(
        (value for key, value in values.items() if isinstance(value, str) and public_setting(key, value) == name), name
    )


def _settings(args: RunArguments, seed: int) -> Iterator[tuple[argparse.Action, Any]]:
    """Flags and values of all that the run computes with, in the order of `--help`."""
    given = {name: value for name, value in args.given.items() if name not in ASIDE and value is not None}
    given["output_dir"] = args.output_dir  # of one of several runs, it lies within that of the command line
    given |= {"seeds": [seed]} if "seeds" in given else {"seed": seed}
    for action in args.parser._actions:
        if action.dest in given:
            yield action, given[action.dest]


def _key(action: argparse.Action) -> str:
    return next(option for option in action.option_strings if option.startswith("--")).removeprefix("--")


def _is_switch(action: argparse.Action) -> bool:
    return action.nargs == 0


def _words(action: argparse.Action, value: Any) -> list[str]:
    """A flag with its value as a command line has them."""
    flag = f"--{_key(action)}"
    if _is_switch(action):
        off = [option for option in action.option_strings if option.startswith("--no-")]
        return [flag] if value else off
    values = [_text(one) for one in (value if isinstance(value, list) else [value])]
    if len(values) == 1:
        return [f"{flag}={values[0]}"] if values[0].startswith("-") else [flag, values[0]]
    return [flag, *values] if values else []


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool | int | float):
        return _text(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _absolute(value: Any) -> Any:
    """A path of this machine as one that holds in every folder."""
    if not isinstance(value, str) or value in MODELS or not (is_local(value) or os.path.exists(value)):
        return value
    return os.path.abspath(os.path.expanduser(value))


def _expanded(value: Any) -> Any:
    """A path in the home folder, or several, in full."""
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def _local(file: Path) -> Path:
    return file.with_suffix(".local.toml")


# Reading


def _read(parser: argparse.ArgumentParser, file: Path) -> list[str]:
    """The flags that the file has, as words."""
    actions = {
        option.removeprefix("--"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and not option.startswith("--no-") and action.dest not in ("help", "config")
    }
    values, text = read_toml("--config", file)
    lines = TomlLines(text)
    mistakes = sorted((lines.of("", key), _mistake(actions, key, value)) for key, value in values.items())
    refuse("--config", file, [(line, mistake) for line, mistake in mistakes if mistake])
    here = read_toml("--config", _local(file))[0] if _local(file).is_file() else {}
    words = []
    for key, value in values.items():
        # What was changed in the file since is meant.
        known_here = key in here and public_setting(key, here[key]) == value
        words += _words(actions[key], here[key] if known_here else value)
    return words


def _mistake(actions: dict[str, argparse.Action], key: str, value: Any) -> str:
    """What is wrong with a key and its value, or nothing."""
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(one, dict) for one in value)):
        return f"{key!r} is a table, of which this file has none: write all keys above."
    if key not in actions:
        near = difflib.get_close_matches(key, actions, 1)
        hint = f": is {near[0]!r} meant?" if near else "; --help lists all flags."
        return f"{key!r} is no flag of this trainer{hint}"
    action = actions[key]
    if _is_switch(action):
        return "" if isinstance(value, bool) else f"{key} must be true or false, got {value!r}."
    if isinstance(value, list) and action.nargs is None:
        return f"{key} takes one value, got {value!r}."
    for one in value if isinstance(value, list) else [value]:
        mistake = _mistake_in_value(action, one)
        if mistake:
            return f"{key}: {mistake}."
    return ""


def _mistake_in_value(action: argparse.Action, value: Any) -> str:
    if not isinstance(value, str | bool | int | float):
        return f"{value!r} is neither a text nor a number"
    text = _text(value)
    kind: Any = action.type or str
    try:
        converted = kind(text)
    except argparse.ArgumentTypeError as error:
        return str(error)
    except (TypeError, ValueError):
        kinds = {"int": "whole number", "float": "number"}
        return f"{text!r} is no {kinds.get(kind.__name__, 'value of this flag')}"
    if action.choices is not None and converted not in action.choices:
        return f"{text!r} is not one of {', '.join(map(str, action.choices))}"
    if action.nargs is not None and text.startswith("-") and not _is_number(text):
        return f"{text!r} begins with a dash, as flags do"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
