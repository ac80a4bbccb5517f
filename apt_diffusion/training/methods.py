"""APT and the methods it is compared with behind one face: attached to be trained, saved, loaded."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from torch import nn

from ..architectures import resolve_config
from ..attach import add_apt, freeze_base, state_of
from ..baselines.attach import (
    FILE_KIND,
    MethodConfig,
    add_method,
    freeze_for_method,
    load_method,
    read_file,
    save_method,
)
from ..baselines.sites import trained_beside
from ..config import APTConfig
from ..io.files import WEIGHTS_NAME, resolve_adapter_file
from ..io.weights import load_apt_weights, save_apt_weights

logger = logging.getLogger(__name__)

METHOD_WEIGHTS_NAME = "pytorch_method_weights.safetensors"


def attach_method(model: nn.Module, config: APTConfig | MethodConfig) -> None:
    """Attaches APT or another method and freezes the rest, but for what the released code trains beside every method.

    Args:
        model: ViLT, METER or CLIP, in float32.
        config: whose class says which.
    """
    is_apt = isinstance(config, APTConfig)
    places = add_apt(model, _with_heads(model, config)) if is_apt else add_method(model, config)
    trainable, total = _freeze(model)
    where = f" at {len(places)} places" if places else ""
    logger.info("%s%s: %s of %s parameters are trained.", method_of(model), where, f"{trainable:,}", f"{total:,}")


def save_trained(model: nn.Module, folder: str | Path, metadata: dict[str, str]) -> Path:
    """The method's parameters and the heads as one file in `folder`, with `metadata` in its header."""
    if method_of(model) == "apt":
        return save_apt_weights(model, folder, metadata=metadata)
    return save_method(model, Path(folder) / METHOD_WEIGHTS_NAME, metadata)


def load_trained(model: nn.Module, place: str | Path, **hub: Any) -> None:
    """Attaches what `save_trained` wrote to a model without a method, ready to be trained on.

    Args:
        model: the base model.
        place: a folder, a file or a hub repository.
        hub: as for `load_apt_weights`.

    Raises:
        FileNotFoundError, ValueError: where there is no such file, or it does not fit; the model stays as it was.
    """
    file = find_trained(place, **hub)
    if FILE_KIND in read_header(file):
        load_method(model, file)
    else:
        load_apt_weights(model, file)
    _freeze(model)


def check_same_method(model: nn.Module, config: APTConfig | MethodConfig, place: str | Path) -> None:
    """`ValueError` where the method that was loaded from `place` is not the one that this run asks for."""
    if isinstance(config, APTConfig):
        new = {"method": "apt", **_with_heads(model, resolve_config(model, config)).to_dict()}
    else:
        new = dataclasses.asdict(config)
    old = {"method": method_of(model)}
    old |= state_of(model).configs["default"].to_dict() if old["method"] == "apt" else vars(model.method_config)
    differing = [
        f"{name} {old.get(name)} there, {value} here" for name, value in new.items() if old.get(name) != value
    ]
    if differing:
        raise ValueError(f"{place} was trained with other settings: {'; '.join(differing)}.")


def method_of(model: nn.Module) -> str | None:
    """The name of the method that is attached; `None` for a base model."""
    if "default" in state_of(model).configs:
        return "apt"
    config = getattr(model, "method_config", None)
    return config.method if config is not None else None


def find_trained(place: str | Path, **hub: Any) -> Path:
    """The file of `save_trained`, whichever method it holds."""
    try:
        return resolve_adapter_file(place, WEIGHTS_NAME, **hub)
    except FileNotFoundError:
        try:
            return resolve_adapter_file(place, METHOD_WEIGHTS_NAME, **hub)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} Nor is there a {WEIGHTS_NAME}.") from error


def read_header(file: Path) -> dict[str, str]:
    """The strings in a file's header: `base_model`, `training`, `answers`, ..."""
    return read_file(file)[1]


def method_in(file: Path) -> str:
    """Which method a file of `save_trained` holds."""
    header = read_header(file)
    return json.loads(header[FILE_KIND])["method"] if FILE_KIND in header else "apt"


def answers_of(file: Path) -> list[str] | None:
    """The answers that a question answering head was trained to choose from, where the file says so."""
    header = read_header(file)
    return json.loads(header["answers"]) if "answers" in header else None


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _with_heads(model: nn.Module, config: APTConfig) -> APTConfig:
    return dataclasses.replace(config, modules_to_save=trained_beside(model) or None)


def _freeze(model: nn.Module) -> tuple[int, int]:
    return freeze_base(model) if method_of(model) == "apt" else freeze_for_method(model)
