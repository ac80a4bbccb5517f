"""Attaching one of the compared methods to a model, and freezing, saving, loading and removing it.

One method at a time: this is for comparisons. APT itself is attached with `add_apt`, of which `add_method` is a
front for `method="apt"`, so that one loop can run them all.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..attach import adapter_parameters, add_apt, remove_apt, state_of
from ..config import APTConfig
from ..io.files import write_safetensors
from .modules import Bottleneck, MeterShallowPrompt, Prefix
from .sites import Family, family_of, trained_beside

METHODS = ("apt", "shallow_prompt", "deep_prompt", "adapter", "scaled_pa", "lora", "full", "classifier_only")
CHILD = "compared_method"
FILE_KIND = "apt_diffusion_method"


@dataclass(frozen=True)
class MethodConfig:
    """A method and its size; the defaults are those of the published tables.

    Args:
        method: one of `METHODS`.
        num_prompts: of `apt`, `shallow_prompt`, `deep_prompt`.
        rank: of `apt` and `lora`.
        bottleneck: of `adapter` and `scaled_pa`.
        trained: name suffixes of modules and parameters that are trained beside the method; the family's heads if
            `None`.
    """

    method: str
    num_prompts: int = 200
    rank: int = 4
    bottleneck: int = 96
    trained: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"Unknown method {self.method!r}, expected one of {METHODS}.")
        for name in ("num_prompts", "rank", "bottleneck"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")


def add_method(model: nn.Module, config: MethodConfig) -> list[str]:
    """Attaches a method to a ViLT, METER or CLIP model; freezes nothing.

    Returns:
        Names of the modules that it acts on; none for `full` and `classifier_only`.

    Raises:
        ValueError: where a method is attached already, or for a model of another family.
    """
    family = family_of(model)
    if getattr(model, "method_config", None) is not None:
        raise ValueError(f"{model.method_config.method!r} is attached already: call remove_method first.")
    if state_of(model).configs:
        raise ValueError("APT is attached already: call remove_apt first.")
    match config.method:
        case "apt":
            names = add_apt(model, APTConfig(num_prompts=config.num_prompts, rank=config.rank))
        case "adapter":
            names = _add_adapters(model, family, config.bottleneck)
        case "scaled_pa":
            names = _add_parallel_adapters(model, family, config.bottleneck)
        case "deep_prompt":
            names = _add_deep_prompts(model, family, config.num_prompts)
        case "shallow_prompt":
            names = _add_shallow_prompts(model, family, config.num_prompts)
        case "lora":
            names = _add_lora(model, family, config.rank)
        case _:
            names = []
    model.method_config = config
    return names


def freeze_for_method(model: nn.Module) -> tuple[int, int]:
    """Only the method's own parameters, and what is trained beside it, stay trainable; `full` trains everything.

    Returns:
        `(trainable, total)` numbers of parameters.
    """
    config = _config(model)
    model.requires_grad_(config.method == "full")
    for _, parameter in method_parameters(model):
        parameter.requires_grad_(True)
    for _, parameter in _beside(model, config):
        parameter.requires_grad_(True)
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def method_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that the method added."""
    config = _config(model)
    if config.method == "apt":
        own = {id(parameter) for parameter in adapter_parameters(model)}
        return [(name, p) for name, p in model.named_parameters() if id(p) in own]
    marks = (f"{CHILD}.", "lora_")
    return [(name, p) for name, p in model.named_parameters() if any(mark in name for mark in marks)]


def save_method(model: nn.Module, path: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """The trained parameters as one safetensors file, with the config, and `metadata`, in its header."""
    config = _config(model)
    tensors = {name: p.detach().to("cpu", copy=True).contiguous() for name, p in _stored(model, config)}
    header = {"format": "pt", FILE_KIND: json.dumps(asdict(config))}
    return write_safetensors(tensors, Path(path), header | (metadata or {}))


def load_method(model: nn.Module, path: str | Path) -> MethodConfig:
    """Attaches the method of a file and gives it its values; a file that does not fit leaves the model as it was.

    Raises:
        ValueError: for another kind of file, or one made for another model.
    """
    tensors, metadata = read_file(Path(path))
    if FILE_KIND not in metadata:
        raise ValueError(f"{path} holds none of the compared methods: it was not written by save_method.")
    try:
        values = json.loads(metadata[FILE_KIND])
        config = MethodConfig(**values | {"trained": None if values["trained"] is None else tuple(values["trained"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} describes no method that this version knows: {error}") from error
    add_method(model, config)
    targets = dict(_stored(model, config))
    wrong = {name for name in targets.keys() & tensors.keys() if targets[name].shape != tensors[name].shape}
    if targets.keys() != tensors.keys() or wrong:
        some = sorted(wrong | (targets.keys() ^ tensors.keys()))[:3]
        remove_method(model)
        raise ValueError(f"{path} does not fit {type(model).__name__}: {some} are missing, unexpected or mis-shaped.")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])
    return config


def remove_method(model: nn.Module) -> None:
    """Takes the method away; what was trained beside it keeps its values."""
    config = _config(model)
    if config.method == "apt":
        remove_apt(model)
    elif config.method == "lora":
        _remove_lora(model)
    for module in list(model.modules()):
        child = module._modules.pop(CHILD, None)
        if child is not None:
            _remove_hooks(model, child)
    del model.method_config


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file; `ValueError` where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def _config(model: nn.Module) -> MethodConfig:
    config = getattr(model, "method_config", None)
    if config is None:
        raise ValueError("No method is attached to this model: call add_method first.")
    return config


def _beside(model: nn.Module, config: MethodConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """What is trained beside the method: parameters in modules of these names, or of these names themselves."""
    beside = trained_beside(model)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if config.trained is None:
            chosen = any(name == place or name.startswith(f"{place}.") for place in beside)
        else:
            chosen = bool(set(parts) & set(config.trained))
        if chosen:
            yield name, parameter


def _stored(model: nn.Module, config: MethodConfig) -> list[tuple[str, nn.Parameter]]:
    if config.method == "full":
        return list(model.named_parameters())
    return list(dict(method_parameters(model) + list(_beside(model, config))).items())


def _layers(model: nn.Module, family: Family) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if re.fullmatch(family.layers, name)]


def _width(linear: nn.Module) -> int:
    return linear.in_features


def _like(new: nn.Module, beside: nn.Module) -> nn.Module:
    weight = next(beside.parameters())
    return new.to(weight.device, weight.dtype)


def _add_adapters(model: nn.Module, family: Family, bottleneck: int) -> list[str]:
    names = []
    for name, layer in _layers(model, family):
        for output in family.outputs:
            linear = layer.get_submodule(output)
            adapter = _like(Bottleneck(linear.out_features, bottleneck), linear)
            linear.add_module(CHILD, adapter)
            linear.register_forward_hook(adapter.after)
            names.append(f"{name}.{output}")
    return names


def _add_parallel_adapters(model: nn.Module, family: Family, bottleneck: int) -> list[str]:
    names = []
    for name, layer in _layers(model, family):
        for branch in family.parallel:
            attention = layer.get_submodule(branch.attention)
            width = _width(layer.get_submodule(branch.key))
            adapter = _like(Bottleneck(width, bottleneck, scaled=True), attention)
            attention.add_module(CHILD, adapter)
            if branch.later_norm is None:
                attention.register_forward_hook(adapter.beside, with_kwargs=True)
            else:
                attention.register_forward_pre_hook(adapter.remember, with_kwargs=True)
                layer.get_submodule(branch.later_norm).register_forward_hook(adapter.after_norm)
            names.append(f"{name}.{branch.attention}")
    return names


def _add_deep_prompts(model: nn.Module, family: Family, num_prompts: int) -> list[str]:
    names = []
    for name, layer in _layers(model, family):
        for branch in family.prompted:
            norm = layer.get_submodule(branch.prompt_norm) if branch.prompt_norm else None
            width = _width(layer.get_submodule(branch.key))
            _add_prefix(layer.get_submodule(branch.attention), Prefix(num_prompts, width, norm), branch.reads_others)
            names.append(f"{name}.{branch.attention}")
    return names


def _add_shallow_prompts(model: nn.Module, family: Family, num_prompts: int) -> list[str]:
    layers = _layers(model, family)
    if family.encoders is None:
        return _add_meter_shallow_prompt(model, layers, num_prompts)
    encoders = {name: module for name, module in model.named_modules() if re.fullmatch(family.encoders, name)}
    for name, encoder in encoders.items():
        first = next(layer for layer_name, layer in layers if layer_name.startswith(f"{name}."))
        width = _width(first.get_submodule(family.prompted[0].key))
        _add_prefix(encoder, Prefix(num_prompts, width))
    return list(encoders)


def _add_prefix(module: nn.Module, prefix: Prefix, reads_others: bool = False) -> None:
    module.add_module(CHILD, _like(prefix, module))
    module.register_forward_pre_hook(prefix.enter, with_kwargs=True)
    if not reads_others:  # else the prompts were never among the module's own tokens
        module.register_forward_hook(prefix.leave)


def _add_meter_shallow_prompt(model: nn.Module, layers: list[tuple[str, nn.Module]], num_prompts: int) -> list[str]:
    stacks = {kind: [layer for name, layer in layers if f"_{kind}_" in name] for kind in ("text", "image")}
    prompt = _like(MeterShallowPrompt(num_prompts, stacks["text"][0].attention.hidden_size), stacks["text"][0])
    model.add_module(CHILD, prompt)
    stacks["text"][0].register_forward_pre_hook(prompt.enter_text)
    stacks["image"][0].register_forward_pre_hook(prompt.enter_image)
    for stack in stacks.values():
        for layer in stack:
            layer.register_forward_pre_hook(prompt.open_masks)
        stack[-1].register_forward_hook(prompt.leave)
    return [name for name, _ in layers]


def _add_lora(model: nn.Module, family: Family, rank: int) -> list[str]:
    """PEFT's, with its scale at 1 as in the released code."""
    from peft import LoraConfig, inject_adapter_in_model

    names = [f"{name}.{path}" for name, _ in _layers(model, family) for path in family.lora]
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model)
    for parameter in model.parameters():  # PEFT has frozen the base, which is for `freeze_for_method` to do
        parameter.requires_grad_(id(parameter) not in frozen)
    return names


def _remove_lora(model: nn.Module) -> None:
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _remove_hooks(model: nn.Module, owner: nn.Module) -> None:
    """All hooks of `owner`; by owner, not by handle, which a deep copy does not have."""
    for module in model.modules():
        for hooks, extras in (
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        ):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
                del hooks[key]
                for extra in extras:
                    extra.pop(key, None)
