"""Adapters as inputs of a graph: an adapter's file becomes the tensors that the graph takes; no base is needed."""

import json
from pathlib import Path

import torch
from torch import Tensor

from ..config import APTConfig
from ..equation import ApproximatedPrompt
from ..io.files import AdapterFile, read_adapter_file, resolve_adapter_file, write_safetensors
from ..io.names import PARAMETERS, common_prefix, join, parse, split_component
from .manifest import INPUTS_FOLDER, GraphPlace, Manifest

Group = dict[str, Tensor]


def base_inputs(manifest: Manifest) -> dict[str, Tensor]:
    """Inputs with which the graph is the base model."""
    found: dict[str, Tensor] = {}
    for place in manifest.places:
        nothing = torch.zeros(1, place.width, dtype=getattr(torch, manifest.dtype))
        found |= zip(place.input_names(), (nothing, nothing.clone(), torch.ones(1)), strict=True)
    return found


@torch.no_grad()
def adapter_inputs(adapter: str | Path | AdapterFile, manifest: Manifest, weight: float = 1.0) -> dict[str, Tensor]:
    """The inputs of a graph for one adapter; places that it does not have get inputs that change nothing.

    Args:
        adapter: a folder, a file, a hub repository, or a file that was read.
        manifest: of the exported folder (`Manifest.read`).
        weight: λ, how strongly the adapter acts.

    Raises:
        FileNotFoundError: where there is no such adapter.
        ValueError: for a graph without adapter inputs, and an adapter that does not fit it.
    """
    _check_takes_adapters(manifest)
    file = adapter if isinstance(adapter, AdapterFile) else read_adapter_file(resolve_adapter_file(adapter))
    config = _config(file, manifest.component)
    groups = _groups(file, manifest)
    known = {place.name: place for place in manifest.places}
    absent = sorted(set(groups) - set(known))
    if absent:
        more = f" and {len(absent) - 1} more" if absent[1:] else ""
        raise ValueError(
            f"{file.name} does not fit this graph of {manifest.base_model!r}: the graph has no place for "
            f"{absent[0]!r}{more}. {file.made_for}"
        )
    found = base_inputs(manifest)
    for name, group in groups.items():
        place = known[name]
        _check_kind(file, config, place)
        if weight != 0:
            folded = _approximated_prompt(file, config, place, group).fold(getattr(torch, manifest.dtype), weight)
            found |= zip(place.input_names(), (tensor.contiguous() for tensor in folded), strict=True)
    return found


def write_inputs(
    folder: str | Path, adapter: str | Path, weight: float = 1.0, name: str | None = None, overwrite: bool = False
) -> Path:
    """Writes an adapter's inputs into an exported folder, as `adapters/<name>.safetensors`.

    Args:
        folder: the exported folder.
        adapter, weight: as of `adapter_inputs`.
        name: of the file; by default the adapter's (`inputs_name`).
        overwrite: replace a file of that name.

    Raises:
        FileExistsError: where the file is there.
        FileNotFoundError, ValueError: as of `adapter_inputs`.
    """
    manifest = Manifest.read(folder)
    _check_takes_adapters(manifest)
    file = Path(folder) / INPUTS_FOLDER / f"{name or inputs_name(adapter)}.safetensors"
    if file.exists() and not overwrite:
        raise FileExistsError(f"{file} is there already: give the adapter another name, or replace the file.")
    header = {"apt_inputs": json.dumps({"component": manifest.component, "weight": weight})}
    return write_safetensors(adapter_inputs(adapter, manifest, weight), file, header)


def inputs_name(adapter: str | Path) -> str:
    """The name of an adapter in an exported folder: that of its folder, file or repository."""
    path = Path(adapter).expanduser()
    stem = path.stem if path.is_file() else path.name
    if stem in ("", ".", ".."):
        stem = path.resolve().name
    return stem.removesuffix(".safetensors") or "adapter"


def _check_takes_adapters(manifest: Manifest) -> None:
    if not manifest.places:
        raise ValueError(
            "The adapters of this graph are constants of it: export with adapter inputs for a graph that takes others."
        )


def _config(file: AdapterFile, component: str) -> APTConfig:
    configs = file.configs
    if configs is None:
        raise ValueError(
            f"{file.name} holds tensors without settings, so how they act is not known: give the file that "
            "save_apt_weights or the trainer wrote."
        )
    config = configs.get(component, configs.get(""))
    if config is None:
        raise ValueError(f"{file.name} has no adapter of a {component}, only of {sorted(configs)}. {file.made_for}")
    if config.modules_to_save:
        raise ValueError(
            f"{file.name} holds heads ({', '.join(config.modules_to_save)}), which a graph has as constants: export "
            "it without adapter inputs."
        )
    return config


def _groups(file: AdapterFile, manifest: Manifest) -> dict[str, Group]:
    single = "" in (file.configs or {})
    names = {}
    for key in file.tensors:
        part, rest = (manifest.component, key) if single else split_component(key)
        name = parse(rest)
        if part == manifest.component and name is not None:
            names[key] = name
    prefix = common_prefix([name.module for name in names.values()])
    groups: dict[str, Group] = {}
    for key, (module, child, parameter) in names.items():
        groups.setdefault(join(module.removeprefix(prefix), child), {})[parameter] = file.tensors[key]
    return groups


def _check_kind(file: AdapterFile, config: APTConfig, place: GraphPlace) -> None:
    context = place.name.endswith(".apt_context")  # O and X are the same there
    for name in ("activation",) if context else ("activation", "query_source"):
        given, needed = getattr(config, name), getattr(place, name)
        if given not in (None, needed):
            raise ValueError(f"{file.name} has {name}={given!r}, the graph {needed!r}: it needs a graph of its own.")


def _approximated_prompt(file: AdapterFile, config: APTConfig, place: GraphPlace, group: Group) -> ApproximatedPrompt:
    """The adapter of one place; `ValueError` for tensors that are missing or of another width."""
    with_gate = config.init == "identity"
    expected = set(PARAMETERS) - (set() if with_gate else {"gate"})
    if set(group) != expected:
        raise ValueError(f"{file.name} is damaged: {place.name} has {sorted(group)}, not {sorted(expected)}.")
    width = group["prompts"].shape[-1]
    if width != place.width:
        raise ValueError(
            f"{file.name} does not fit this graph: {place.name} has width {width}, the graph {place.width}. "
            f"{file.made_for}"
        )
    p, rank = len(group["prompts"]), len(group["low_rank_down"])
    with torch.random.fork_rng(devices=[]):
        made = ApproximatedPrompt(width, p, rank, config.activation, init="identity" if with_gate else "paper")
    try:
        made.load_state_dict(group)
    except RuntimeError as error:
        raise ValueError(f"{file.name} is damaged: the shapes at {place.name} do not agree.") from error
    return made
