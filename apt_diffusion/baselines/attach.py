"""Attaching one of the compared methods to a model, and freezing, saving, loading and removing it.

A model carries one method at a time. APT itself is attached with `add_apt` and saved with `save_apt_weights`; the
functions here also accept models with APT and APT's files, so that one loop can compare all methods.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..api import add_apt, freeze_base, get_list_apt_adapters
from ..config import APTConfig
from ..heads import head_tensors
from ..io.files import WEIGHTS_NAME, resolve_adapter_file, write_safetensors
from ..io.former import METHOD_HEADER, method_in_header
from ..io.load import load_apt_weights
from ..io.save import save_apt_weights
from ..model import ModelAdapters
from .apt import ADAPTER
from .families import trained_beside
from .registry import Method, MethodConfig, get_method

METHOD_WEIGHTS_NAME = "pytorch_method_weights.safetensors"
# Headers of version 0.1 name these for every method, whether it has them or not.
_FORMER_SETTINGS = ("num_prompts", "rank", "bottleneck")
# Of ViLT; files of version 0.1 do not have it: it was not trained then, and stays the base model's.
_SEGMENTS = "text_embeddings.token_type_embeddings.weight"


def add_method(model: nn.Module, config: MethodConfig | APTConfig) -> list[str]:
    """Attaches a method to a model; freezes nothing.

    An `APTConfig` goes to `add_apt`, with the heads of the model's family as `modules_to_save` where it names none:
    they are trained with every method.

    Returns:
        Names of the modules that it acts on; none for `full` and `classifier_only`.

    Raises:
        ValueError: where a method is attached already, or for a model that the method is not made for.
    """
    attached = method_of(model)
    if attached is not None:
        remedy = "remove_apt" if attached == "apt" else "remove_method"
        raise ValueError(f"{attached!r} is attached already: call {remedy} first.")
    if isinstance(config, APTConfig):
        return add_apt(model, with_heads(model, config))
    method = get_method(config.method)
    method.check_model(model)
    with _undone_on_error(model, method):
        names = method.attach(model, **config.settings)
    model.method_config = config
    return names


def with_heads(model: nn.Module, config: APTConfig) -> APTConfig:
    """`config`, with what the released code trains with every method as `modules_to_save` if that is `None`."""
    if config.modules_to_save is not None:
        return config
    places = trained_beside(model)
    parameters = tuple(name for name, _ in model.named_parameters() if _is_inside(name, places))
    if places and not set(head_tensors(model, places)) <= set(parameters):
        places = parameters  # as suffixes, the modules' names would reach into a frozen encoder
    return dataclasses.replace(config, modules_to_save=places or None)


def method_of(model: nn.Module) -> str | None:
    """The name of the method that is attached; `None` for a base model."""
    if get_list_apt_adapters(model):
        return "apt"
    config = getattr(model, "method_config", None)
    return config.method if config is not None else None


def freeze_for_method(model: nn.Module) -> tuple[int, int]:
    """Only the method's own parameters, and the heads trained with it, stay trainable; `full` trains everything.

    Returns:
        `(trainable, total)` numbers of parameters.
    """
    method = _attached(model)
    if method.name == "apt":
        return freeze_base(model)
    model.requires_grad_(method.trains_base)
    for _, parameter in (*method.parameters(model), *_heads(model)):
        parameter.requires_grad_(True)
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def method_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Full names and values of the parameters that the method added, without the heads."""
    return _attached(model).parameters(model)


def save_method(model: nn.Module, path: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """Writes the trained parameters as one safetensors file, with the config, and `metadata`, in its header.

    APT is written by `save_apt_weights`, in its own format.

    Args:
        model: a model with a method.
        path: a folder (made if needed), or a file name that ends in `.safetensors`.
        metadata: more strings for the header, such as `base_model`.

    Returns:
        The file.

    Raises:
        ValueError: where no method is attached.
    """
    if _attached(model).name == "apt":
        return save_apt_weights(model, path, ADAPTER, metadata)
    config: MethodConfig = model.method_config
    tensors = {name: p.detach().to("cpu", copy=True).contiguous() for name, p in _stored(model)}
    header = {"format": "pt", METHOD_HEADER: json.dumps(config.to_dict())}
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / METHOD_WEIGHTS_NAME
    return write_safetensors(tensors, file, header | (metadata or {}))


def load_method(model: nn.Module, path: str | Path, **hub: Any) -> MethodConfig | APTConfig:
    """Attaches the method of a file and gives it its values; a file that does not fit leaves the model as it was.

    Args:
        model: a model without a method.
        path: a folder, a file, or a hub repository; of `save_method` or `save_apt_weights`.
        hub: `revision`, `token`, `cache_dir`, ... as for `load_apt_weights`.

    Returns:
        What `add_method` was given, or would be given, for it.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for another kind of file, one made for another model, or a model that has a method already.
    """
    file = find_method_file(path, **hub)
    attached = method_of(model)
    if attached is not None:
        raise ValueError(f"{attached!r} is attached already: remove it before {file} is loaded.")
    metadata = read_header(file)
    if method_in_header(str(file), metadata) == "apt":
        load_apt_weights(model, file)
        return ModelAdapters.of(model).configs[ADAPTER]
    tensors = _read_tensors(file)
    config = _read_config(file, metadata, tensors)
    add_method(model, config)
    method = get_method(config.method)
    with _undone_on_error(model, method):
        _write(model, file, tensors)
    return config


def remove_method(model: nn.Module) -> None:
    """Takes the method away. Heads trained with it keep their values; APT's come and go with the adapter."""
    _attached(model).detach(model)
    if hasattr(model, "method_config"):
        del model.method_config


def find_method_file(place: str | Path, **hub: Any) -> Path:
    """The file that `save_method` wrote, whichever method it holds.

    Args:
        place: a folder, a file, or a hub repository.
        hub: as for `load_apt_weights`.

    Raises:
        FileNotFoundError: naming both files that it may be.
    """
    try:
        return resolve_adapter_file(place, WEIGHTS_NAME, **hub)
    except FileNotFoundError:
        try:
            return resolve_adapter_file(place, METHOD_WEIGHTS_NAME, **hub)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} Nor is there a {WEIGHTS_NAME}.") from error


def read_header(file: Path) -> dict[str, str]:
    """The strings in a file's header (`base_model`, `training`, `answers`, ...); its tensors are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as content:
            return content.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from error


def method_in(file: Path) -> str:
    """The name of the method that a file holds; `ValueError` where its header cannot be used."""
    return method_in_header(str(file), read_header(file))


def _attached(model: nn.Module) -> Method:
    name = method_of(model)
    if name is None:
        raise ValueError("No method is attached to this model: call add_method first.")
    return get_method(name)


@contextlib.contextmanager
def _undone_on_error(model: nn.Module, method: Method) -> Iterator[None]:
    try:
        yield
    except BaseException:
        method.detach(model)
        if hasattr(model, "method_config"):
            del model.method_config
        raise


def _heads(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that are trained with the method: in the modules that its config names, or of these names."""
    trained = model.method_config.trained
    beside = trained_beside(model) if trained is None else ()
    for name, parameter in model.named_parameters():
        if _is_inside(name, beside) or set(name.split(".")) & set(trained or ()):
            yield name, parameter


def _is_inside(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def _stored(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    method = _attached(model)
    if method.trains_base:
        return list(model.named_parameters())
    return list(dict([*method.parameters(model), *_heads(model)]).items())


def _read_config(file: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> MethodConfig:
    """Of the header; its sizes are compared with the tensors, which bounds what attaching the method can take."""
    name = method_in_header(str(file), metadata)
    try:
        values = json.loads(metadata[METHOD_HEADER])
        own = get_method(name).defaults()
        settings = {
            key: value for key, value in values.items()
            if key not in ("method", "trained") and (key in own or key not in _FORMER_SETTINGS)
        }  # fmt: skip
        config = MethodConfig(name, trained=values.get("trained"), **settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} describes no method that this version knows: {error}") from error
    dimensions = {size for tensor in tensors.values() for size in tensor.shape}
    for setting in get_method(name).settings:
        if setting.is_size and config.settings[setting.name] not in dimensions:
            raise ValueError(
                f"{file} is damaged: its header says {setting.name}={config.settings[setting.name]}, but none of its "
                "tensors has such a dimension."
            )
    return config


def _read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def _write(model: nn.Module, file: Path, tensors: dict[str, Tensor]) -> None:
    """Everything is checked before the first value is written."""
    targets = {name: p for name, p in _stored(model) if name in tensors or not name.endswith(_SEGMENTS)}
    wrong = {name for name in targets.keys() & tensors.keys() if targets[name].shape != tensors[name].shape}
    if targets.keys() != tensors.keys() or wrong:
        some = sorted(wrong | (targets.keys() ^ tensors.keys()))[:3]
        raise ValueError(f"{file} does not fit {type(model).__name__}: {some} are missing, unexpected or mis-shaped.")
    broken = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if broken:
        raise ValueError(f"{file} is damaged: {broken[:3]} hold values that are not finite numbers.")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])
