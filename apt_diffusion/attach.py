"""Attaching APT to a model and steering it: names and meaning follow diffusers' LoRA functions.

Every function takes one model (UNet, CLIP, ViLT, METER, any `nn.Module` with `target_modules`), a diffusers pipeline
(its UNet and text encoders), or a dict of such components.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .architectures import context_width, find_modules, input_width, matches, resolve_config
from .block_weights import check_number, transformers_of, weight_of
from .config import APTConfig
from .equation import ApproximatedPrompt
from .heads import Heads, head_tensors
from .offloading import regroup_offloaded
from .processor import APTProcessorCore, apply_apt, apply_apt_context, check_name

PIPELINE_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

AdapterWeight = float | dict[str, Any]


@dataclass
class APTState:
    """What a model knows of its adapters, kept on the model as `apt_state`."""

    configs: dict[str, APTConfig] = field(default_factory=dict)
    active: dict[str, AdapterWeight] = field(default_factory=dict)
    enabled: bool = True
    heads: Heads = field(default_factory=Heads)
    hotswap_room: tuple[int, int | None] | None = None  # prompts and rank, see `enable_apt_hotswap`


def components_of(model: Any) -> dict[str, nn.Module]:
    """The parts that carry adapters: of a pipeline by name, of a single model under the name `""`."""
    if isinstance(model, nn.Module):
        return {"": _original(model)}
    parts = model if isinstance(model, dict) else getattr(model, "components", None)
    if not isinstance(parts, dict):
        raise TypeError(f"Expected a torch.nn.Module, a diffusers pipeline or a dict of models, got {type(model)}.")
    return {name: _original(parts[name]) for name in PIPELINE_COMPONENTS if parts.get(name) is not None}


def add_apt(
    model: Any, config: APTConfig | dict[str, APTConfig] | None = None, adapter_name: str = "default"
) -> list[str]:
    """Attaches a new adapter and makes it the active one. Freezes nothing.

    A compiled model sees it: what `torch.compile` has made so far is dropped, and made again at the next call.

    Args:
        model: see the module's docstring.
        config: settings; for a pipeline also a dict of them by component. One config for a whole pipeline gives its
            `query_source` and `streams` to the UNet; text encoders keep the defaults of theirs.
        adapter_name: a new name.

    Returns:
        The names of the attention modules that were adapted.

    Raises:
        ValueError: for a name in use, or places that do not exist.
    """
    components = components_of(model)
    configs = _config_per_component(components, config or APTConfig())
    plans = {part: plan_adapter(components[part], configs[part], adapter_name) for part in configs}
    for part, (resolved, adapters) in plans.items():
        attach(components[part], adapter_name, resolved, adapters)
    return [f"{part}.{name}".strip(".") for part, (_, adapters) in plans.items() for name in adapters]


def plan_adapter(
    model: nn.Module, config: APTConfig, adapter_name: str
) -> tuple[APTConfig, dict[str, dict[str, ApproximatedPrompt]]]:
    """Everything of an attachment that can fail: `(resolved config, {module name: {child name: new adapter}})`."""
    check_name(adapter_name)
    if adapter_name in state_of(model).configs:
        raise ValueError(f"Adapter name {adapter_name!r} is already in use: choose another, or remove that adapter.")
    resolved = resolve_config(model, config)
    adapters = {
        name: {child: new_adapter(resolved, width, module) for child, width in stream_widths(name, module, resolved)}
        for name, module in find_modules(model, resolved.target_modules, "target_modules").items()
    }
    if resolved.modules_to_save:
        head_tensors(model, resolved.modules_to_save)
    return resolved, adapters


def stream_widths(name: str, module: nn.Module, config: APTConfig) -> Iterator[tuple[str, int]]:
    """The child modules that `config.streams` asks for at one attention module, with their widths."""
    if getattr(module, "residual_connection", False):
        raise ValueError(f"{name} adds its residual inside: APT corrects an attention's output before the residual.")
    if "query" in config.streams:
        yield "apt", input_width(name, module)
    if "context" in config.streams:
        yield "apt_context", context_width(name, module)


def new_adapter(config: APTConfig, width: int, beside: nn.Module) -> ApproximatedPrompt:
    """A new adapter of `width`, on the device and in the dtype of the module that it stands beside."""
    adapter = ApproximatedPrompt(
        width, config.num_prompts, config.rank, config.activation, config.dropout, config.init
    )
    weight = next(beside.parameters(), None)
    if weight is None:
        return adapter
    full_size = weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # not quantised
    device = "cpu" if weight.device.type == "meta" else weight.device
    return adapter.to(device, weight.dtype if full_size else torch.float32)


def attach(
    model: nn.Module, adapter_name: str, config: APTConfig, adapters: dict[str, dict[str, ApproximatedPrompt]]
) -> None:
    """Registers what `plan_adapter` made and activates it. Nothing here can fail."""
    state = state_of(model)
    model.apt_state = state
    modules = dict(model.named_modules())
    new_hooks = False
    for name, children in adapters.items():
        for child, adapter in children.items():
            core = getattr(modules[name], child, None)
            if core is None:
                new_hooks = True
                core = APTProcessorCore(adapter.prompts.shape[1])
                core.enabled = state.enabled
                modules[name].add_module(child, core)
                _register_hook(modules[name], child)
            adapter.train(modules[name].training)
            # A context core has one input, so both sources are the same there.
            core.add(adapter_name, adapter, config.query_source if child == "apt" else "hidden_states")
    state.configs[adapter_name] = config
    if config.modules_to_save:
        state.heads.add(model, adapter_name, config.modules_to_save)
    _set_weights(model, {adapter_name: 1.0}, _core_weights(model, {adapter_name: 1.0}, ""))
    regroup_offloaded(model)
    if new_hooks and "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # a graph compiled before the hooks were there would go on without them


def remove_apt(model: Any, adapter_name: str | None = None) -> None:
    """Takes one adapter away, or all: the base model again, bit for bit, without hooks, children or state."""
    for component in check_present(model, [] if adapter_name is None else [adapter_name]).values():
        state = state_of(component)
        for name in list(state.configs) if adapter_name is None else [adapter_name]:
            if name in state.configs:
                _delete(component, state, name)
        # One that leaves does not take the room away that `enable_apt_hotswap` promised to the next.
        kept = adapter_name is not None and state.hotswap_room is not None
        if not state.configs and not kept and hasattr(component, "apt_state"):
            del component.apt_state


def delete_apt_adapters(model: Any, adapter_names: str | Sequence[str]) -> None:
    """Takes the named adapters away; `ValueError` for an unknown one, before any is deleted."""
    names = _as_list(adapter_names)
    check_present(model, names)
    for name in names:
        remove_apt(model, name)


def set_apt_adapters(
    model: Any, adapter_names: str | Sequence[str], weights: AdapterWeight | Sequence[AdapterWeight] | None = None
) -> None:
    """Activates exactly these adapters: `Y = O + Σ λ_i (Y_i − O)`.

    Args:
        model: see the module's docstring.
        adapter_names: one or several; each must be present in at least one component.
        weights: λ per adapter (one number for all, or a list): a number, or as in diffusers a dict by component and
            block, `{"unet": {"down": 1.0, "mid": 0.5, "up": {"block_0": [0.2, 0.4]}}, "text_encoder": 0.8}`.

    Raises:
        ValueError: for unknown names, a wrong number of weights, or a weight that is not a finite number.
    """
    names = _as_list(adapter_names)
    components = check_present(model, names)
    values = list(weights) if isinstance(weights, list | tuple) else [1.0 if weights is None else weights] * len(names)
    if len(values) != len(names):
        raise ValueError(
            f"Length of adapter names {len(names)} is not equal to the length of the weights {len(values)}."
        )
    # All weights are worked out before the first is set: an error leaves everything as it was.
    active = dict(zip(names, values, strict=True))
    plans = [(component, _core_weights(component, active, part)) for part, component in components.items()]
    for component, plan in plans:
        _set_weights(component, active, plan)


def get_active_apt_adapters(model: Any) -> list[str]:
    """Names of the active adapters, in the order of activation."""
    return list(dict.fromkeys(name for part in components_of(model).values() for name in state_of(part).active))


@contextlib.contextmanager
def kept_active(model: Any) -> Iterator[None]:
    """At its end those adapters are active, with those weights, that were at its beginning (and are still there)."""
    before = [
        (c, state_of(c).active, {core: core.weights for core in cores_of(c)}) for c in components_of(model).values()
    ]
    try:
        yield
    finally:
        for component, active, weights in before:
            plan = [
                (core, {name: w for name, w in weights.get(core, {}).items() if name in core.adapters})
                for core in cores_of(component)
            ]
            _set_weights(component, active, plan)


def get_list_apt_adapters(model: Any) -> list[str] | dict[str, list[str]]:
    """All adapters: a list of names, or for a pipeline one list per component that has any."""
    lists = {part: list(state_of(component).configs) for part, component in components_of(model).items()}
    return lists[""] if "" in lists else {part: names for part, names in lists.items() if names}


def set_apt_scale(model: Any, scale: float) -> None:
    """A factor on the weights of all adapters: 0 is the base model bit for bit, 1 the adapters as they are."""
    check_number("scale", scale)
    for core in cores_of(model):
        core.scale = float(scale)


def enable_apt(model: Any) -> None:
    """Undoes `disable_apt`."""
    for component in components_of(model).values():
        _set_enabled(component, True)


class disable_apt:
    """Switches all adapters (and their heads) off at once; as a context manager, until its end."""

    def __init__(self, model: Any) -> None:
        self.before = [(component, state_of(component).enabled) for component in components_of(model).values()]
        for component, _ in self.before:
            _set_enabled(component, False)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc_info: object) -> None:
        for component, enabled in self.before:
            _set_enabled(component, enabled)


@contextlib.contextmanager
def prepared_apt(model: Any) -> Iterator[None]:
    """Within it, and without gradients, keys and scales are computed once per adapter, not once per call.

    A change of weights is seen there too, unless it hides from PyTorch's version counter (`parameter.data.copy_`):
    that is why this is a context and not the rule. Pipelines enter it for every call; around several calls it serves
    them all.
    """
    before = [(core, core.keep_folded) for core in cores_of(model)]
    for core, _ in before:
        core.set_keep_folded(True)
    try:
        yield
    finally:
        for core, keep_folded in before:
            core.set_keep_folded(keep_folded)


def freeze_base(model: Any) -> tuple[int, int]:
    """Only the active adapters and their `modules_to_save` stay trainable. Call it last, after any LoRA was added.

    Returns:
        `(trainable, total)` numbers of parameters.
    """
    whole = components_of(model) if isinstance(model, nn.Module | dict) else model.components
    for module in whole.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False)
    for component in components_of(model).values():
        for parameter in adapter_parameters(component):
            parameter.requires_grad_(True)
    parameters = [p for module in whole.values() if isinstance(module, nn.Module) for p in module.parameters()]
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the active adapters and of their heads."""
    state = state_of(model)
    parameters = [
        p for core in cores_of(model) for name in state.active if name in core.adapters
        for p in core.adapters[name].parameters()
    ]  # fmt: skip
    if state.heads.in_use is not None:
        heads = head_tensors(model, state.configs[state.heads.in_use].modules_to_save)
        parameters += [tensor for tensor in heads.values() if isinstance(tensor, nn.Parameter)]
    return parameters


@contextlib.contextmanager
def hidden_apt(model: Any) -> Iterator[None]:
    """Within it the model looks like the base model: no APT children, base heads. For saving the base."""
    with disable_apt(model):
        hidden = [
            (module, child, module._modules.pop(child))
            for component in components_of(model).values()
            for module in list(component.modules())
            for child in ("apt", "apt_context")
            if isinstance(module._modules.get(child), APTProcessorCore)
        ]
        try:
            yield
        finally:
            for module, child, core in hidden:
                module._modules[child] = core


def named_cores(model: nn.Module) -> Iterator[tuple[str, APTProcessorCore]]:
    """`(name, core)` of all cores, hooked or inside an `APTAttnProcessor`; the name is the same for both."""
    for name, module in model.named_modules():
        if isinstance(module, APTProcessorCore):
            yield name.replace(".processor.apt", ".apt"), module


def cores_of(model: Any) -> Iterator[APTProcessorCore]:
    for component in components_of(model).values():
        yield from (core for _, core in named_cores(component))


def state_of(model: nn.Module) -> APTState:
    """The adapters' state of one component; a fresh, empty one where none is attached."""
    return getattr(model, "apt_state", None) or APTState()


def _original(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # of torch.compile's OptimizedModule


def _config_per_component(
    components: dict[str, nn.Module], config: APTConfig | dict[str, APTConfig]
) -> dict[str, APTConfig]:
    if isinstance(config, dict):
        unknown = sorted(set(config) - set(components))
        if unknown:
            raise ValueError(f"No component {unknown} here; there are {sorted(components)}.")
        return config
    if "" in components:
        return {"": config}
    chosen = {}
    for part, component in components.items():
        settings = config.to_dict() | ({} if part == "unet" else {"query_source": None, "streams": None})
        if config.target_modules is not None:  # each component takes the patterns that name something in it
            names = [name for name, _ in component.named_modules()]
            patterns = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
            used = [
                p for p in patterns
                if any(matches(name, p if isinstance(config.target_modules, str) else (p,)) for name in names)
            ]  # fmt: skip
            if not used:
                continue
            settings["target_modules"] = config.target_modules if isinstance(config.target_modules, str) else used
        chosen[part] = APTConfig.from_dict(settings)
    if not chosen:
        raise ValueError(f"target_modules={config.target_modules} matches no module of {sorted(components)}.")
    return chosen


def _register_hook(module: nn.Module, child: str) -> None:
    if child == "apt":
        module.register_forward_hook(apply_apt, with_kwargs=True)
    else:
        module.register_forward_pre_hook(apply_apt_context, with_kwargs=True)


def _remove_hook(module: nn.Module, child: str) -> None:
    # By function, not by handle: a handle does not survive deepcopy and pickle, the hook does.
    hooks, with_kwargs, function = (
        (module._forward_hooks, module._forward_hooks_with_kwargs, apply_apt)
        if child == "apt"
        else (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, apply_apt_context)
    )
    for key in [key for key, hook in hooks.items() if hook is function]:
        del hooks[key]
        with_kwargs.pop(key, None)


def _delete(model: nn.Module, state: APTState, adapter_name: str) -> None:
    state.heads.delete(model, adapter_name)
    del state.configs[adapter_name]
    state.active.pop(adapter_name, None)
    for module in list(model.modules()):
        for child in ("apt", "apt_context"):
            core = getattr(module, child, None)
            if isinstance(core, APTProcessorCore) and adapter_name in core.adapters:
                core.delete(adapter_name)
                if not core.adapters and not hasattr(module, "inner"):  # an APTAttnProcessor keeps its core
                    delattr(module, child)
                    _remove_hook(module, child)
    _sync_heads(model, state)


def check_present(model: Any, adapter_names: Sequence[str]) -> dict[str, nn.Module]:
    """The components, having checked that each adapter is in at least one of them."""
    components = components_of(model)
    present = {name for component in components.values() for name in state_of(component).configs}
    missing = set(adapter_names) - present
    if missing:
        raise ValueError(f"Adapter name(s) {sorted(missing)} not in the list of present adapters: {sorted(present)}.")
    return components


def _as_list(adapter_names: str | Sequence[str]) -> list[str]:
    return [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)


CoreWeights = list[tuple[APTProcessorCore, dict[str, float]]]


def _core_weights(model: nn.Module, active: dict[str, AdapterWeight], part: str) -> CoreWeights:
    transformers = transformers_of(model) if any(isinstance(w, dict) for w in active.values()) else []
    return [
        (core, {n: weight_of(w, part, module_name, transformers) for n, w in active.items() if n in core.adapters})
        for module_name, core in named_cores(model)
    ]


def _set_weights(model: nn.Module, active: dict[str, AdapterWeight], plan: CoreWeights) -> None:
    for core, weights in plan:
        core.weights = weights
    state = state_of(model)
    state.active = {name: weight for name, weight in active.items() if name in state.configs}
    _sync_heads(model, state)


def _set_enabled(model: nn.Module, enabled: bool) -> None:
    state = state_of(model)
    state.enabled = enabled
    for core in cores_of(model):
        core.enabled = enabled
    _sync_heads(model, state)


def _sync_heads(model: nn.Module, state: APTState) -> None:
    """The heads in use are those of the first active adapter that has any; the base's while switched off."""
    with_heads = [name for name in state.active if name in state.heads.stored] if state.enabled else []
    state.heads.use(model, with_heads[0] if with_heads else None)
