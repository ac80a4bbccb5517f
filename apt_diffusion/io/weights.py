"""Saving and loading adapters: one safetensors file that explains itself. Nothing pickled is written or read.

Keys are `<component>.<module path>.apt.<parameter>`; the component is absent for a single model. The header holds the
library's version, the `APTConfig` of each component and what is known of base model and training.
Loading is all or nothing: everything is read and checked before the first module of the model is touched.
"""

import dataclasses
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import find_modules, resolve_config
from ..attach import APTState, attach, components_of, named_cores, new_adapter, state_of, stream_widths
from ..config import APTConfig
from ..equation import ApproximatedPrompt
from ..heads import head_tensors
from ..offloading import keep_off_disk, onloaded
from ..processor import check_name
from ..version import __version__
from .files import (
    WEIGHTS_NAME,
    AdapterFile,
    read_adapter_dict,
    read_adapter_file,
    resolve_adapter_file,
    write_safetensors,
)
from .names import Groups, group_tensors, neutral_names


@dataclasses.dataclass
class _Plan:
    """A checked load into one component: nothing that follows can fail."""

    config: APTConfig
    groups: Groups
    adapters: dict[str, dict[str, ApproximatedPrompt]]  # new ones to attach; none for a swap
    present: dict[tuple[str, str], ApproximatedPrompt]  # those that a swap writes into
    heads: dict[str, Tensor]


def save_apt_weights(
    model_or_pipeline: Any, path: str | Path, adapter_name: str = "default", metadata: dict[str, str] | None = None
) -> Path:
    """Writes one adapter; to a temporary name first, so that no half-written file is ever seen.

    Args:
        model_or_pipeline: a model, a pipeline, or a dict of components.
        path: a folder (made if needed), or a file name that ends in `.safetensors`.
        adapter_name: which adapter.
        metadata: more strings for the header, such as `base_model`, `instance_prompt`, `training`.

    Returns:
        The file.

    Raises:
        ValueError: where no component has this adapter.
        OSError: where the disk is full or the place cannot be written.
    """
    components = components_of(model_or_pipeline)
    parts = {p: c for p, c in components.items() if adapter_name in state_of(c).configs}
    if not parts:
        present = sorted({name for c in components.values() for name in state_of(c).configs})
        raise ValueError(f"Adapter {adapter_name!r} is not here to be saved; present adapters: {present}.")
    tensors = {
        f"{part}.{key}".strip("."): tensor
        for part, component in parts.items()
        for key, tensor in apt_state_dict(component, adapter_name).items()
    }
    configs = {part: state_of(component).configs[adapter_name].to_dict() for part, component in parts.items()}
    header = {"format": "pt", "apt_diffusion_version": __version__, "apt_config": json.dumps(configs)}
    base_model = getattr(getattr(model_or_pipeline, "config", None), "_name_or_path", None)
    if base_model:
        header["base_model"] = str(base_model)
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / WEIGHTS_NAME
    return write_safetensors(tensors, file, header | (metadata or {}))


def apt_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """One component's adapter under the keys of the file format, on the CPU."""
    config = state_of(model).configs[adapter_name]
    tensors = {}
    neutral = neutral_names(model)
    adapters = _present_adapters(model, adapter_name)
    keep_off_disk(model, [p for adapter in adapters.values() for p in adapter.parameters()])
    for (module_name, child), adapter in adapters.items():
        with onloaded(adapter):
            for key, tensor in _unpadded(adapter, config).items():
                tensors[f"{neutral.get(module_name, module_name)}.{child}.{key}"] = _copied(tensor)
    if config.modules_to_save:
        heads = state_of(model).heads.state(model, adapter_name)
        tensors |= {key: _copied(tensor) for key, tensor in heads.items()}
    return tensors


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


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
) -> list[str]:
    """Loads an adapter and makes it the active one. A failed load leaves the model exactly as it was.

    Args:
        model_or_pipeline: a model, a pipeline, or a dict of components.
        path_or_repo_id_or_dict: a folder, a `.safetensors` file, a hub repository, tensors by key, or a file that was
            read before (`AdapterStore.get`).
        adapter_name: a new name, or with `hotswap` the name of the adapter to overwrite.
        weight_name: the file's name in the folder or repository.
        subfolder: a folder inside it.
        revision, token, cache_dir, force_download, local_files_only: as in `huggingface_hub.hf_hub_download`.
        hotswap: overwrite the weights of a loaded adapter in place, so that a compiled model is not compiled again.

    Returns:
        The names of the adapted modules.

    Raises:
        FileNotFoundError: where there is no such file, folder or repository.
        TypeError: for what is neither a path nor a dict of tensors.
        ValueError: for a file that is no APT adapter or does not fit this model; the message says what and why.
    """
    check_name(adapter_name)
    components = components_of(model_or_pipeline)
    if isinstance(path_or_repo_id_or_dict, AdapterFile):
        file = path_or_repo_id_or_dict
    elif isinstance(path_or_repo_id_or_dict, dict):
        file = read_adapter_dict(path_or_repo_id_or_dict)
    else:
        hub = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": bool(local_files_only),
        }
        file = read_adapter_file(resolve_adapter_file(path_or_repo_id_or_dict, weight_name, subfolder, **hub))
    plans = {
        part: _plan_component(components[part], file, config, keys, adapter_name, hotswap)
        for part, (config, keys) in _split_components(file, components).items()
    }
    if hotswap:
        _check_hotswap_components(components, adapter_name, set(plans))
    for part, plan in plans.items():
        (_swap if hotswap else _attach)(components[part], adapter_name, plan)
    return [
        f"{part}.{name}".strip(".")
        for part, plan in plans.items()
        for name in dict.fromkeys(n for n, _ in plan.groups)
    ]


def enable_apt_hotswap(model: Any, max_num_prompts: int, max_rank: int | None = None) -> None:
    """Gives adapters that are loaded from now on room for others, so that these can be swapped in, in place.

    Args:
        model: a model, a pipeline, or a dict of components.
        max_num_prompts: the most prompts that any of them has. Unused ones are zero, which is exact for `relu`.
        max_rank: their largest rank; the rank of the first that is loaded if `None`.

    Raises:
        ValueError: after an adapter was attached: its size is fixed then.
    """
    components = components_of(model)
    if any(state_of(component).configs for component in components.values()):
        raise ValueError("Call enable_apt_hotswap before the first adapter is attached: its size is fixed then.")
    APTConfig(num_prompts=max_num_prompts, rank=1 if max_rank is None else max_rank)
    for component in components.values():
        component.apt_state = APTState(hotswap_room=(max_num_prompts, max_rank))


def _split_components(
    file: AdapterFile, components: dict[str, nn.Module]
) -> dict[str, tuple[APTConfig | None, dict[str, Tensor]]]:
    """`{component: (config of the header, its tensors)}`, having checked that the model has these components."""
    configs = file.configs
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in file.tensors.items():
        part, _, rest = key.partition(".")
        single = "" in components if configs is None else "" in configs
        found["" if single else part][key if single else rest] = tensor
    names = set(found) | set(configs or {})
    unknown = sorted(names - set(components))
    if unknown:
        have = "a single model" if "" in components else f"a pipeline with {sorted(components)}"
        holds = "one single model" if "" in names else f"the components {sorted(names)} of a pipeline"
        raise ValueError(f"{file.name} holds an adapter for {holds}, but is loaded into {have}. {file.made_for}")
    return {part: ((configs or {}).get(part), found[part]) for part in sorted(names)}


def _plan_component(
    model: nn.Module,
    file: AdapterFile,
    config: APTConfig | None,
    tensors: dict[str, Tensor],
    adapter_name: str,
    hotswap: bool,
) -> _Plan:
    state = state_of(model)
    if not hotswap and adapter_name in state.configs:
        raise ValueError(
            f"Adapter name {adapter_name!r} is already in use: choose another, or pass hotswap=True to overwrite it."
        )
    present = _present_adapters(model, adapter_name) if hotswap else {}
    groups, heads = group_tensors(model, tensors, {name for name, _ in present})
    config = _inferred_config(model, groups) if config is None else resolve_config(model, config)
    if present and _same_places(state.configs[adapter_name], config):
        # Walking through a UNet takes longer than writing an adapter: what was found once is not searched again.
        expected = {place: adapter.prompts.shape[1] for place, adapter in present.items()}
    else:
        expected = _expected_groups(model, file, config)
    _check_keys(file, config, expected, groups, _expected_heads(model, file, config), heads)
    for (name, child), parameters in groups.items():
        _check_shapes(file, config, f"{name}.{child}", parameters, expected[name, child])
    adapters: dict[str, dict[str, ApproximatedPrompt]] = defaultdict(dict)
    if hotswap:
        _check_swap(state, adapter_name, config, groups, present)
    else:
        modules = dict(model.named_modules())
        for (name, child), parameters in groups.items():
            adapters[name][child] = _build(config, parameters, modules[name], state.hotswap_room)
    return _Plan(config, groups, dict(adapters), present, heads)


def _present_adapters(model: nn.Module, adapter_name: str) -> dict[tuple[str, str], ApproximatedPrompt]:
    return {
        tuple(name.rsplit(".", 1)): core.adapters[adapter_name]
        for name, core in named_cores(model)
        if adapter_name in core.adapters
    }


def _same_places(old: APTConfig, new: APTConfig) -> bool:
    return (old.target_modules, old.streams) == (new.target_modules, new.streams)


def _inferred_config(model: nn.Module, groups: Groups) -> APTConfig:
    """Without a header: sizes and places from the tensors, everything else the architecture's default."""
    first = next(iter(groups.values()), {})
    prompts, down = first.get("prompts"), first.get("low_rank_down")
    children = {child for _, child in groups}
    streams = tuple(s for s, child in (("query", "apt"), ("context", "apt_context")) if child in children)
    config = APTConfig(
        num_prompts=1 if prompts is None or not prompts.ndim else max(1, len(prompts)),
        rank=1 if down is None or not down.ndim else max(1, len(down)),
        init="identity" if "gate" in first else "paper",
        streams=streams or None,
        target_modules=tuple(dict.fromkeys(name for name, _ in groups)) or None,
    )
    return resolve_config(model, config)


def _expected_groups(model: nn.Module, file: AdapterFile, config: APTConfig) -> dict[tuple[str, str], int]:
    """The width of every adapter that `config` attaches to `model`."""
    try:
        modules = find_modules(model, config.target_modules, "target_modules")
        return {
            (name, child): width
            for name, module in modules.items()
            for child, width in stream_widths(name, module, config)
        }
    except ValueError as error:
        raise ValueError(f"{file.name} does not fit {type(model).__name__}: {error} {file.made_for}") from error


def _expected_heads(model: nn.Module, file: AdapterFile, config: APTConfig) -> dict[str, Tensor]:
    try:
        return head_tensors(model, config.modules_to_save) if config.modules_to_save else {}
    except ValueError as error:
        raise ValueError(f"{file.name} does not fit {type(model).__name__}: {error} {file.made_for}") from error


def _check_keys(
    file: AdapterFile,
    config: APTConfig,
    expected: dict[tuple[str, str], int],
    groups: Groups,
    expected_heads: dict[str, Tensor],
    heads: dict[str, Tensor],
) -> None:
    names = {"prompts", "low_rank_down", "low_rank_up", "log_scale"} | (
        {"gate"} if config.init == "identity" else set()
    )
    wanted = {f"{name}.{child}.{p}" for name, child in expected for p in names} | set(expected_heads)
    given = {f"{name}.{child}.{p}" for (name, child), group in groups.items() for p in group} | set(heads)
    for what, keys in (("lacks", wanted - given), ("holds unexpected", given - wanted)):
        if keys:
            some = ", ".join(sorted(keys)[:3]) + (" ..." if len(keys) > 3 else "")
            raise ValueError(
                f"{file.name} {what} {len(keys)} tensors ({some}): it is damaged, or made for another base model. "
                f"{file.made_for}"
            )
    wrong = [key for key, tensor in expected_heads.items() if heads[key].shape != tensor.shape]
    if wrong:
        sizes = f"{tuple(heads[wrong[0]].shape)} in the file, {tuple(expected_heads[wrong[0]].shape)} in the model"
        raise ValueError(f"{file.name} does not fit: {wrong[0]} is {sizes}. {file.made_for}")


def _check_shapes(file: AdapterFile, config: APTConfig, name: str, group: dict[str, Tensor], width: int) -> None:
    # Sizes may differ between modules only where no header fixes them.
    p, r = (config.num_prompts, config.rank) if file.configs else (len(group["prompts"]), len(group["low_rank_down"]))
    shapes = {"prompts": (p, width), "low_rank_down": (r, width), "low_rank_up": (width, r), "log_scale": (1,)}
    for key, tensor in group.items():
        shape = shapes.get(key, (1,))
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{file.name} does not fit: {name}.{key} has shape {tuple(tensor.shape)}, this model needs {shape}. "
                f"Is this the right base model? {file.made_for}"
            )
        if not tensor.is_floating_point() or not _is_finite(tensor):
            raise ValueError(f"{file.name} is damaged: {name}.{key} holds values that are not finite numbers.")


def _is_finite(tensor: Tensor) -> bool:
    if tensor.element_size() == 1:  # eight bits are for storage: there is no arithmetic on them
        tensor = tensor.float()
    # A sum is finite where all numbers are, unless they are huge; it costs a fraction of asking each.
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def _build(
    config: APTConfig,
    parameters: dict[str, Tensor],
    beside: nn.Module,
    hotswap_room: tuple[int, int | None] | None,
) -> ApproximatedPrompt:
    num_prompts, rank = len(parameters["prompts"]), len(parameters["low_rank_down"])
    sizes = dataclasses.replace(config, num_prompts=num_prompts, rank=rank)
    if hotswap_room is not None:
        max_prompts, max_rank = hotswap_room[0], hotswap_room[1] or rank
        if num_prompts > max_prompts or rank > max_rank:
            raise ValueError(
                f"The adapter has {num_prompts} prompts of rank {rank}; "
                f"enable_apt_hotswap allows {max_prompts} prompts of rank {max_rank}."
            )
        padded = num_prompts if config.activation == "softmax" else max_prompts
        sizes = dataclasses.replace(sizes, num_prompts=padded, rank=max_rank, init="identity")
    with torch.random.fork_rng(devices=[]):  # loading must not move the random numbers of what follows
        adapter = new_adapter(sizes, parameters["prompts"].shape[1], beside)
    _write(adapter, parameters)
    return adapter


@torch.no_grad()
def _write(adapter: ApproximatedPrompt, parameters: dict[str, Tensor]) -> None:
    """In place, smaller tensors into the leading corner of zeros; an adapter without gate is one with gate 1."""
    for name, target in adapter.named_parameters():
        source = parameters.get(name)
        if source is None:
            target.fill_(1.0)
        elif source.shape == target.shape:
            target.copy_(source)
        else:
            target.zero_()[tuple(slice(size) for size in source.shape)].copy_(source)


def _unpadded(adapter: ApproximatedPrompt, config: APTConfig) -> dict[str, Tensor]:
    """The adapter's tensors without the room that `enable_apt_hotswap` gave them."""
    tensors = dict(adapter.named_parameters())
    if len(adapter.prompts) > config.num_prompts:
        tensors["prompts"] = adapter.prompts[: config.num_prompts]
    if len(adapter.low_rank_down) > config.rank:
        tensors["low_rank_down"] = adapter.low_rank_down[: config.rank]
        tensors["low_rank_up"] = adapter.low_rank_up[:, : config.rank]
    if config.init != "identity":
        tensors.pop("gate", None)
    return tensors


def _attach(model: nn.Module, adapter_name: str, plan: _Plan) -> None:
    attach(model, adapter_name, plan.config, plan.adapters)
    if plan.heads:
        state_of(model).heads.write(model, adapter_name, plan.heads)


def _swap(model: nn.Module, adapter_name: str, plan: _Plan) -> None:
    keep_off_disk(model, [p for adapter in plan.present.values() for p in adapter.parameters()])
    for place, parameters in plan.groups.items():
        _write(plan.present[place], parameters)
    state = state_of(model)
    state.configs[adapter_name] = plan.config
    if plan.heads:
        state.heads.write(model, adapter_name, plan.heads)


def _check_hotswap_components(components: dict[str, nn.Module], adapter_name: str, parts: set[str]) -> None:
    having = {part for part, component in components.items() if adapter_name in state_of(component).configs}
    if having != parts:
        raise ValueError(
            f"Cannot hotswap: {adapter_name!r} sits in {sorted(having)}, the new weights are for {sorted(parts)}."
        )


def _check_swap(
    state: APTState,
    adapter_name: str,
    config: APTConfig,
    groups: Groups,
    present: dict[tuple[str, str], ApproximatedPrompt],
) -> None:
    if adapter_name not in state.configs:
        raise ValueError(
            f"Cannot hotswap: there is no adapter {adapter_name!r}; present are {sorted(state.configs)}. "
            "Load the first one without hotswap."
        )
    if any(p.device.type == "meta" for adapter in present.values() for p in adapter.parameters()):
        raise ValueError(
            "Cannot hotswap: accelerate has taken the adapter's weights away. Load adapters after the offloading is "
            "enabled, or use an APT pipeline's enable_sequential_cpu_offload."
        )
    old = state.configs[adapter_name]
    for setting in ("activation", "query_source", "modules_to_save"):
        if getattr(old, setting) != getattr(config, setting):
            raise ValueError(f"Cannot hotswap: the adapters differ in {setting}.")
    if set(present) != set(groups):
        raise ValueError("Cannot hotswap: the adapters sit at different modules.")
    for place, parameters in groups.items():
        _check_room(".".join(place), present[place], parameters)


def _check_room(name: str, target: ApproximatedPrompt, parameters: dict[str, Tensor]) -> None:
    room = len(target.prompts), len(target.low_rank_down)
    size = len(parameters["prompts"]), len(parameters["low_rank_down"])
    exact = target.activation == "softmax" and room[0] != size[0]  # zero prompts would take part in a softmax
    if size[0] > room[0] or size[1] > room[1] or exact or (target.gate is None and "gate" in parameters):
        raise ValueError(
            f"Cannot hotswap: {name} has room for {room[0]} prompts of rank {room[1]}"
            f"{'' if target.gate is not None else ' without a gate'}, the new one has {size[0]} of rank {size[1]}. "
            "Call enable_apt_hotswap(max_num_prompts, max_rank) before loading the first adapter."
        )
