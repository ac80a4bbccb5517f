"""Loading adapters, all or nothing: everything is read and checked before the first module is touched.

The tensor names say which modules to adapt. The settings come from the file's header. For tensors without a header the
caller gives them, because tensors show neither what queries the prompts nor the activation.
"""

import dataclasses
import functools
import logging
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..api import undo_on_failure
from ..architectures import DENOISERS, STREAMS, architecture_of, families_of, resolve_config
from ..components import check_has_models, components_of, wrapped_components
from ..config import APTConfig
from ..equation import ApproximatedPrompt
from ..heads import head_tensors
from ..model import ModelAdapters, Planned
from ..places import Place, named_modules, new_adapter, place_at
from ..words import add_to_pipeline, check_pipeline, has_words
from ..wrappers import check_can_grow
from . import hotswap as swap
from .files import AdapterFile, read_adapter_dict, read_adapter_file, resolve_adapter_file
from .names import PARAMETERS, Groups, group_tensors, join, split_component

logger = logging.getLogger(__name__)

# Settings that change a model's output and that no tensor shows.
_UNSEEN = ("activation", "query_source")


@dataclasses.dataclass
class _Plan:
    """A checked load into one component."""

    adapters: ModelAdapters
    config: APTConfig
    groups: Groups
    heads: dict[str, Tensor]
    planned: Planned  # new adapters by place; none for a swap


def load_apt_weights(
    model_or_pipeline: Any,
    path_or_repo_id_or_dict: str | Path | dict[str, Tensor] | AdapterFile,
    adapter_name: str = "default",
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool | None = None,
    hotswap: bool = False,
    components: list[str] | tuple[str, ...] | None = None,
    config: APTConfig | dict[str, APTConfig] | None = None,
    activate: bool = True,
) -> list[str]:
    """Loads an adapter and makes it the active one. A failed load leaves the model exactly as it was.

    New words of the file are taught to the tokenizers of the pipeline, and taken away with the adapter.

    Args:
        model_or_pipeline: a model, a pipeline, or a dict of components.
        path_or_repo_id_or_dict: a folder, a `.safetensors` file, a hub repository, tensors by name, or a file that was
            read before (`AdapterStore.get`).
        adapter_name: a new name, or with `hotswap` the name of the adapter to overwrite.
        weight_name: the file's name in the folder or repository.
        subfolder: a folder inside it.
        revision, token, cache_dir, force_download, local_files_only: as in `huggingface_hub.hf_hub_download`.
        hotswap: overwrite the weights of a loaded adapter in place, so that a compiled model is not compiled again.
        components: which components of the file to load; `None`: those that the pipeline has. What is left out because
            the pipeline was opened without it (`text_encoder=None`) is logged once.
        config: the settings of tensors that carry none (a dict, or a file without our header), for all components or
            by component; sizes and places are taken from the tensors.
        activate: `False` leaves the active adapters as they are.

    Returns:
        The names of the adapted modules.

    Raises:
        FileNotFoundError: where there is no such file, folder or repository.
        TypeError: for what is neither a path nor a dict of tensors.
        ValueError: for a file that is no APT adapter or does not fit this model, or tensors without settings; the
            message says what and why.
    """
    wrapped = wrapped_components(model_or_pipeline)
    models = components_of(model_or_pipeline)
    check_has_models(model_or_pipeline, models)
    source = path_or_repo_id_or_dict
    is_folder = isinstance(source, str | Path) and not Path(source).expanduser().is_file()
    if not is_folder and (weight_name or subfolder):
        raise ValueError(
            f"weight_name={weight_name!r} and subfolder={subfolder!r} name a file inside a folder or repository; what "
            "is loaded is one file, or its tensors. Leave them out."
        )
    if isinstance(source, AdapterFile):
        file = source
    elif isinstance(source, dict):
        file = read_adapter_dict(source)
    else:
        hub = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": bool(local_files_only),
        }
        file = read_adapter_file(resolve_adapter_file(source, weight_name, subfolder, **hub), with_words=True)
    tensors = _by_component(file, single="" in models)
    parts = _chosen_components(file, model_or_pipeline, models, set(tensors), components)
    rows = {part: value for part, value in file.word_rows.items() if components is None or part in components}
    _check_words(file, model_or_pipeline, rows, adapter_name, hotswap)
    settings = _settings(file, parts, config)
    plans = {}
    for part in parts:
        if not hotswap:
            check_can_grow(wrapped[part])
        plans[part] = _plan(models[part], file, part, settings[part], tensors[part], adapter_name, hotswap)
    if hotswap:
        swap.check_components(models, adapter_name, set(plans))
        swap.write([(plan.adapters, plan.config, plan.groups, plan.heads) for plan in plans.values()], adapter_name)
    else:
        with undo_on_failure() as done:
            for plan in plans.values():
                before = dict(plan.adapters.active)
                plan.adapters.attach(adapter_name, plan.config, plan.planned, activate)
                done.append((plan.adapters, adapter_name, before))
                if plan.heads:
                    plan.adapters.heads.write(plan.adapters.model, adapter_name, plan.heads)
            if rows:
                add_to_pipeline(model_or_pipeline, adapter_name, rows, file.words)
    return [join(part, name) for part, plan in plans.items() for name in dict.fromkeys(n for n, _ in plan.groups)]


def check_words_fit(file: AdapterFile, pipeline: Any, rows: dict[str, Tensor]) -> None:
    """`ValueError` where a file's new words, with these embeddings by component, cannot be given to a pipeline."""
    if rows:
        try:
            check_pipeline(pipeline, rows, file.words)
        except ValueError as error:
            raise ValueError(f"{file.name}: {error} {file.made_for}") from error


def _check_words(file: AdapterFile, model: Any, rows: dict[str, Tensor], adapter_name: str, hotswap: bool) -> None:
    if hotswap and (rows or has_words(model, adapter_name)):
        raise ValueError(f"{file.name}: adapters with new words cannot be swapped in place; load and unload them.")
    check_words_fit(file, model, rows)


# Which components


def _by_component(file: AdapterFile, single: bool) -> dict[str, dict[str, Tensor]]:
    """The file's tensors by component; all under `""` for a single model."""
    configs = file.configs
    single = single if configs is None else "" in configs
    found: dict[str, dict[str, Tensor]] = {part: {} for part in configs or ()}
    for key, tensor in file.tensors.items():
        part, rest = ("", key) if single else split_component(key)
        found.setdefault(part, {})[rest] = tensor
    return found


def _chosen_components(
    file: AdapterFile, model: Any, models: dict[str, nn.Module], in_file: set[str], wanted: Any
) -> list[str]:
    if wanted is not None:
        if isinstance(wanted, str) or not set(wanted) <= in_file or not wanted:
            raise ValueError(f"components={wanted!r} must name some of the file's components, {sorted(in_file)}.")
        missing = sorted(set(wanted) - set(models))
        if missing:
            raise ValueError(f"There is no component {missing} here to load into; there are {sorted(models)}.")
        return sorted(wanted)
    slots = model if isinstance(model, dict) else getattr(model, "components", {})
    absent = {part for part in in_file - set(models) if part in slots and slots[part] is None}
    left_out, unknown = sorted(absent), sorted(in_file - set(models) - absent)
    chosen = sorted(in_file & set(models))
    other_denoiser = set(DENOISERS) & set(models) and set(DENOISERS) & in_file and not set(DENOISERS) & set(chosen)
    if unknown or not chosen or other_denoiser:
        have = "a single model" if "" in models else f"a pipeline with {sorted(models)}"
        holds = "one single model" if "" in in_file else f"the components {sorted(in_file)} of a pipeline"
        raise ValueError(f"{file.name} holds an adapter for {holds}, but is loaded into {have}. {file.made_for}")
    if left_out:
        _warn_once(f"{file.name}: the adapter of {left_out} is left out, the pipeline has no such component.")
    return chosen


@functools.lru_cache(maxsize=1024)
def _warn_once(message: str) -> None:
    logger.warning(message)


def _settings(
    file: AdapterFile, parts: list[str], given: APTConfig | dict[str, APTConfig] | None
) -> dict[str, tuple[APTConfig, bool]]:
    """`(settings, whether they are the header's)` for each component."""
    in_header = file.configs
    if in_header is None and given is None:
        raise ValueError(
            f"{file.name} holds tensors without settings: what queries the prompts and the activation do not show in "
            "them, and another value gives other results. Pass config=APTConfig(...) as the adapter was made, or load "
            "the file itself: its header has them."
        )
    settings: dict[str, tuple[APTConfig, bool]] = {}
    for part in parts:
        config = given.get(part) if isinstance(given, dict) else given
        header = (in_header or {}).get(part)
        if header is not None:
            for name in _UNSEEN if config is not None else ():
                if getattr(config, name) not in (None, getattr(header, name)):
                    raise ValueError(
                        f"config says {name}={getattr(config, name)!r}, the header of {file.name} "
                        f"{getattr(header, name)!r}: leave config out for a file with its own settings."
                    )
            settings[part] = (header, True)
            continue
        if config is None:
            source = "config" if in_header is None else "its header"
            raise ValueError(f"{source} has no settings for component {part!r}, which {file.name} holds.")
        if part not in ("", *DENOISERS) and not isinstance(given, dict):
            config = dataclasses.replace(config, query_source=None, streams=None)  # as `add_apt` gives text encoders
        settings[part] = (config, False)
    return settings


# What is put where


def _plan(
    model: nn.Module,
    file: AdapterFile,
    part: str,
    settings: tuple[APTConfig, bool],
    tensors: dict[str, Tensor],
    adapter_name: str,
    hotswap: bool,
) -> _Plan:
    adapters = ModelAdapters.of(model)
    present = adapters.at_places(adapter_name) if hotswap else {}
    if not hotswap:
        adapters.check_free(adapter_name)
    groups, heads = group_tensors(model, tensors, {name for name, _ in present})
    config, from_header = settings
    config = config if from_header else _with_sizes_of(config, groups)
    try:
        config = resolve_config(model, config)
        if hotswap and set(present) == set(groups):
            widths = {place: adapter.prompts.shape[1] for place, adapter in present.items()}
            places: dict[tuple[str, str], Place] = {}
        else:
            places = _places(model, groups)
            widths = {key: place.width for key, place in places.items()}
        expected_heads = head_tensors(model, config.modules_to_save) if config.modules_to_save else {}
    except ValueError as error:
        raise ValueError(f"{file.name} does not fit {type(model).__name__}: {error} {file.made_for}") from error
    _check_names(file, config, groups, file.places.get(part), expected_heads, heads)
    for key, parameters in groups.items():
        _check_shapes(file, config, key, parameters, widths[key])
    _check_family(file, part, model)
    if hotswap:
        swap.check(adapters, adapter_name, config, groups, present)
        return _Plan(adapters, config, groups, heads, [])
    planned = [(place, _build(config, groups[key], place, adapters.hotswap_room)) for key, place in places.items()]
    return _Plan(adapters, config, groups, heads, planned)


def _check_family(file: AdapterFile, part: str, model: nn.Module) -> None:
    # Names and widths of attentions are the same in some families, such as Flux.1 and a small Flux.2.
    made, here = file.families.get(part, []), families_of(model)
    if made and here and not set(made) & set(here):
        raise ValueError(
            f"{file.name} does not fit {type(model).__name__}: it holds an adapter of {made[0]}. Load it into the "
            f"family that it was trained on. {file.made_for}"
        )


def _with_sizes_of(config: APTConfig, groups: Groups) -> APTConfig:
    """The given settings with sizes, streams and places of the tensors."""

    def length(group: dict[str, Tensor], name: str) -> int:
        tensor = group.get(name)
        return max(1, len(tensor)) if tensor is not None and tensor.ndim else 1

    sizes: dict[str, dict[str, int]] = {"prompts": {}, "low_rank_down": {}}
    for (name, _), group in groups.items():
        for tensor_name, found in sizes.items():
            found[re.escape(name)] = length(group, tensor_name)
    first = {name: next(iter(found.values()), 1) for name, found in sizes.items()}
    other = {name: {key: size for key, size in found.items() if size != first[name]} for name, found in sizes.items()}
    children = {child for _, child in groups}
    with_gate = any("gate" in group for group in groups.values())
    return dataclasses.replace(
        config,
        num_prompts=first["prompts"],
        rank=first["low_rank_down"],
        num_prompts_pattern=other["prompts"],
        rank_pattern=other["low_rank_down"],
        init="identity" if with_gate else "paper" if config.init in (None, "identity") else config.init,
        streams=tuple(name for name, stream in STREAMS.items() if stream.child in children) or None,
        target_modules=tuple(dict.fromkeys(name for name, _ in groups)) or None,
    )


def _places(model: nn.Module, groups: Groups) -> dict[tuple[str, str], Place]:
    row = architecture_of(model)
    streams = {row.stream(name).child: row.stream(name) for name in STREAMS}
    modules = dict(named_modules(model))
    absent = sorted({name for name, _ in groups} - set(modules))
    if absent:
        more = f" and {len(absent) - 1} more" if absent[1:] else ""
        raise ValueError(f"{absent[0]!r}{more} matches no module of {type(model).__name__}.")
    return {(name, child): place_at(model, name, modules[name], streams[child]) for name, child in groups}


def _check_names(
    file: AdapterFile,
    config: APTConfig,
    groups: Groups,
    count: int | None,
    expected_heads: dict[str, Tensor],
    heads: dict[str, Tensor],
) -> None:
    names = set(PARAMETERS) - (set() if config.init == "identity" else {"gate"})
    children = {STREAMS[stream].child for stream in config.streams or ()}
    wanted = {join(name, child, p) for name, child in groups if child in children for p in names} | set(expected_heads)
    given = {join(name, child, p) for (name, child), group in groups.items() for p in group} | set(heads)
    for what, keys in (("lacks", wanted - given), ("holds unexpected", given - wanted)):
        if keys:
            some = ", ".join(sorted(keys)[:3]) + (" ..." if len(keys) > 3 else "")
            raise ValueError(
                f"{file.name} {what} {len(keys)} tensors ({some}): it is damaged, or made for another base model. "
                f"{file.made_for}"
            )
    if not groups or (count is not None and count != len(groups)):
        missing = (count or 1) - len(groups)
        what = f"lacks {missing * len(names)}" if missing > 0 else f"holds unexpected {-missing * len(names)}"
        raise ValueError(
            f"{file.name} {what} tensors: it has adapters at {len(groups)} modules, and was written with {count}. It "
            f"is damaged. {file.made_for}"
        )
    wrong = [key for key, tensor in expected_heads.items() if heads[key].shape != tensor.shape]
    if wrong:
        sizes = f"{tuple(heads[wrong[0]].shape)} in the file, {tuple(expected_heads[wrong[0]].shape)} in the model"
        raise ValueError(f"{file.name} does not fit: {wrong[0]} is {sizes}. {file.made_for}")


def _check_shapes(
    file: AdapterFile, config: APTConfig, key: tuple[str, str], group: dict[str, Tensor], width: int
) -> None:
    sizes = config.at(key[0])
    p, r = sizes.num_prompts, sizes.rank
    shapes = {"prompts": (p, width), "low_rank_down": (r, width), "low_rank_up": (width, r)}
    for name, tensor in group.items():
        shape = shapes.get(name, (1,))
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{file.name} does not fit: {join(*key, name)} has shape {tuple(tensor.shape)}, this model needs "
                f"{shape}. Is this the right base model? {file.made_for}"
            )
        if not tensor.is_floating_point() or not _is_finite(tensor):
            raise ValueError(f"{file.name} is damaged: {join(*key, name)} holds values that are not finite numbers.")


def _is_finite(tensor: Tensor) -> bool:
    if tensor.element_size() == 1:  # eight bits are for storage: there is no arithmetic on them
        tensor = tensor.float()
    # A sum is finite where all numbers are, unless they are huge; it costs a fraction of a look at each.
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def _build(
    config: APTConfig, parameters: dict[str, Tensor], place: Place, hotswap_room: tuple[int, int | None] | None
) -> ApproximatedPrompt:
    sizes = config.at(place.module_name)
    if hotswap_room is not None:
        sizes = swap.with_room(sizes, hotswap_room)
    with torch.random.fork_rng(devices=[]):  # loading must not move the random numbers of what follows
        adapter = new_adapter(sizes, place.width, place.module)
    swap.write_parameters(adapter, parameters)
    return adapter
