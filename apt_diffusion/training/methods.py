"""Connects the compared methods to the trainers: command-line flags, attaching, saving and loading."""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..architectures import resolve_config
from ..baselines import (
    MethodConfig,
    Setting,
    add_method,
    freeze_for_method,
    get_method,
    load_method,
    method_names,
    method_of,
    read_header,
)
from ..config import APTConfig
from ..model import ModelAdapters

logger = logging.getLogger(__name__)

TASK_HEADS = ("classifier", "rank_output")


def add_method_flags(add: Callable[..., Any]) -> None:
    """`--method`, with every registered method, and one flag per setting of them all.

    Args:
        add: `add_argument` of a parser or group.
    """
    add("--method", choices=method_names(), default="apt", help="What is trained together with heads and poolers.")
    for name, users in _settings().items():
        first = next(iter(users.values()))
        add(
            f"--{name}",
            type=_parser_of(first),
            help=" ".join(dict.fromkeys(setting.help for setting in users.values()))
            + f" Of {', '.join(users)}."
            + ("" if first.default is None else f" (default: {', '.join(_defaults(users))})"),
        )


def settle_method_flags(args: argparse.Namespace) -> None:
    """Gives the settings of `--method` that were not given their defaults; warns of those that it does not have.

    Raises:
        ValueError: for a value that a setting cannot have.
    """
    own = get_method(args.method).defaults()
    idle = [f"--{name}" for name in _settings() if name not in own and getattr(args, name) is not None]
    if idle:
        logger.warning("%s: without effect, because --method %s has no such setting.", ", ".join(idle), args.method)
    for name, default in own.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    method_config(args)


def method_config(args: argparse.Namespace) -> APTConfig | MethodConfig:
    """What the flags of `add_method_flags` ask for."""
    method = get_method(args.method)
    return method.config(**{name: getattr(args, name) for name in method.defaults()})


def attach_method(model: nn.Module, config: APTConfig | MethodConfig) -> None:
    """Attaches APT or another method and freezes the rest, except the heads that are trained with every method.

    Args:
        model: ViLT, METER or CLIP, in float32.
        config: `APTConfig` for APT, `MethodConfig` for the others.
    """
    places = add_method(model, config)
    trainable, total = freeze_for_method(model)
    where = f" at {len(places)} places" if places else ""
    logger.info("%s%s: %s of %s parameters are trained.", method_of(model), where, f"{trainable:,}", f"{total:,}")


def load_trained(model: nn.Module, place: str | Path, **hub: Any) -> None:
    """Attaches what `save_method` wrote to a model without a method, ready to be trained on.

    Args:
        model: the base model.
        place: a folder, a file or a hub repository.
        hub: as for `load_apt_weights`.

    Raises:
        FileNotFoundError, ValueError: where there is no such file, or it does not fit; the model stays as it was.
    """
    load_method(model, place, **hub)
    freeze_for_method(model)


def check_same_method(model: nn.Module, config: APTConfig | MethodConfig, place: str | Path) -> None:
    """`ValueError` where the method that was loaded from `place` is not the one of this run's settings.

    With APT, `modules_to_save` comes from the file, which must contain the task's head.
    """
    if isinstance(config, APTConfig):
        new = {"method": "apt", **resolve_config(model, config).to_dict()}
        del new["modules_to_save"]
    else:
        new = config.to_dict()
    old: dict[str, Any] = {"method": method_of(model)}
    old |= (
        ModelAdapters.of(model).configs["default"].to_dict()
        if old["method"] == "apt"
        else model.method_config.to_dict()
    )
    differing = [
        f"{name} {old.get(name)} there, {value} here" for name, value in new.items() if old.get(name) != value
    ]
    if differing:
        raise ValueError(f"{place} was trained with other settings: {'; '.join(differing)}.")
    trained = {name.split(".")[0] for name in trained_parameters(model)}
    heads = [name for name, _ in model.named_children() if name in TASK_HEADS]
    if not trained.issuperset(heads):
        raise ValueError(f"{place} has no weights for {heads}: a new head would stay untrained. Leave --adapter out.")


def answers_of(file: Path) -> list[str] | None:
    """The answers that a question answering head was trained to choose from, where the file says so."""
    header = read_header(file)
    return json.loads(header["answers"]) if "answers" in header else None


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a file, which are not read themselves."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            return {key: tuple(content.get_slice(key).get_shape()) for key in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from error


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by full name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _settings() -> dict[str, dict[str, Setting[Any]]]:
    """`{name of a setting: {name of a method that has it: the setting}}`."""
    found: dict[str, dict[str, Setting[Any]]] = {}
    for method in method_names():
        for setting in get_method(method).settings:
            found.setdefault(setting.name, {})[method] = setting
    return found


def _defaults(users: dict[str, Setting[Any]]) -> list[str]:
    values = {setting.default for setting in users.values()}
    if len(values) == 1:
        return [str(value) for value in values]
    return [f"{setting.default} for {method}" for method, setting in users.items()]


def _parser_of(setting: Setting[Any]) -> Callable[[str], Any]:
    """Reads a value from a command line; argparse shows the reason where it cannot be."""

    def parse(text: str) -> Any:
        try:
            value = _TRUTH[text.lower()] if setting.type is bool else setting.type(text)
            setting.check(value)
        except (ValueError, KeyError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    return parse


_TRUTH = {"true": True, "false": False}
