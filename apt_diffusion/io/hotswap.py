"""Hot swapping: the weights of a loaded adapter are overwritten in place, so that nothing is compiled again."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..components import components_of
from ..config import APTConfig
from ..equation import ApproximatedPrompt
from ..model import ModelAdapters
from ..offloading import keep_off_disk
from ..wrappers import check_is_whole
from .names import Groups


def enable_apt_hotswap(model: Any, max_num_prompts: int, max_rank: int | None = None) -> None:
    """Gives adapters that are loaded from now on room for others, so that these can be swapped in, in place.

    Args:
        model: a model, a pipeline, or a dict of components.
        max_num_prompts: the most prompts that any of them has. Unused ones are zero, which is exact for `relu`.
        max_rank: their largest rank; the rank of the first that is loaded if `None`.

    Raises:
        ValueError: after an adapter was attached: its size is fixed then.
    """
    components = [ModelAdapters.of(component) for component in components_of(model).values()]
    if any(adapters.configs for adapters in components):
        raise ValueError("Call enable_apt_hotswap before the first adapter is attached: its size is fixed then.")
    sizes = APTConfig(num_prompts=max_num_prompts, rank=1 if max_rank is None else max_rank)
    for adapters in components:
        adapters.set_hotswap_room((sizes.num_prompts, None if max_rank is None else sizes.rank))


def with_room(config: APTConfig, room: tuple[int, int | None]) -> APTConfig:
    """The sizes that an adapter of `config` is made with; `ValueError` where it is larger than the room."""
    max_prompts, max_rank = room[0], room[1] or config.rank
    if config.num_prompts > max_prompts or config.rank > max_rank:
        raise ValueError(
            f"The adapter has {config.num_prompts} prompts of rank {config.rank}; "
            f"enable_apt_hotswap allows {max_prompts} prompts of rank {max_rank}."
        )
    padded = config.num_prompts if config.activation == "softmax" else max_prompts
    return dataclasses.replace(config, num_prompts=padded, rank=max_rank, init="identity")


def check_components(models: dict[str, nn.Module], adapter_name: str, parts: set[str]) -> None:
    """`ValueError` where the new weights are not for exactly the components that have the adapter."""
    having = {part for part, component in models.items() if adapter_name in ModelAdapters.of(component).configs}
    if having != parts:
        raise ValueError(
            f"Cannot hotswap: {adapter_name!r} sits in {sorted(having)}, the new weights are for {sorted(parts)}."
        )


def check(
    adapters: ModelAdapters,
    adapter_name: str,
    config: APTConfig,
    groups: Groups,
    present: dict[tuple[str, str], ApproximatedPrompt],
) -> None:
    """`ValueError` where the new weights cannot stand where the old ones are."""
    if adapter_name not in adapters.configs:
        raise ValueError(
            f"Cannot hotswap: there is no adapter {adapter_name!r}; present are {sorted(adapters.configs)}. "
            "Load the first one without hotswap."
        )
    if any(p.device.type == "meta" for adapter in present.values() for p in adapter.parameters()):
        raise ValueError(
            "Cannot hotswap: accelerate has taken the adapter's weights away. Load adapters after the offloading is "
            "enabled, or use an APT pipeline's enable_sequential_cpu_offload."
        )
    for (name, _), adapter in present.items():
        parameters = dict(adapter.named_parameters())
        check_is_whole(name, parameters.get("prompts"), parameters.get("low_rank_down"))
    old = adapters.configs[adapter_name]
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


def write(swaps: list[tuple[ModelAdapters, APTConfig, Groups, dict[str, Tensor]]], adapter_name: str) -> None:
    """Writes checked weights over the old ones; a failure puts the old ones back."""
    undo = []
    try:
        for adapters, config, groups, heads in swaps:
            present = adapters.at_places(adapter_name)
            parameters = [p for adapter in present.values() for p in adapter.parameters()]
            keep_off_disk(adapters.model, parameters)
            undo.append((adapters, adapters.configs[adapter_name], [(p, p.detach().clone()) for p in parameters]))
            for place, values in groups.items():
                write_parameters(present[place], values)
            adapters.configs[adapter_name] = config
            if heads:
                adapters.heads.write(adapters.model, adapter_name, heads)
    except BaseException:
        with torch.no_grad():
            for adapters, config, before in undo:
                adapters.configs[adapter_name] = config
                for parameter, values in before:
                    parameter.copy_(values)
        raise


@torch.no_grad()
def write_parameters(adapter: ApproximatedPrompt, parameters: dict[str, Tensor]) -> None:
    """In place, smaller tensors into the leading corner of zeros; an adapter without gate is one with gate 1."""
    for name, target in adapter.named_parameters():
        source = parameters.get(name)
        if source is None:
            target.fill_(1.0)
            continue
        if source.shape != target.shape:
            padded = source.new_zeros(target.shape)
            padded[tuple(slice(size) for size in source.shape)] = source
            source = padded
        target.copy_(_placed_like(source, target))


def _placed_like(source: Tensor, target: Tensor) -> Tensor:
    """The part of `source` that belongs to this process where FSDP's second version shards `target`."""
    if not hasattr(target, "device_mesh"):
        return source
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(source.to(target.device, target.dtype), target.device_mesh, target.placements)
