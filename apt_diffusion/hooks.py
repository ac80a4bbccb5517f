"""The one attachment mechanism: module-level hooks that call the processor cores of an attention module.

A hook that closes over the core would share the original's weights after `copy.deepcopy`, and could not be pickled, so
these functions read the core from the module's children. Attaching finds the argument X once, by forward's signature.
"""

import inspect
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .architectures import CHILDREN, STREAMS, Stream
from .processor import APTProcessorCore

_OUTPUT_CHILDREN = tuple(stream.child for stream in STREAMS.values() if stream.output is not None)
_CONTEXT = STREAMS["context"].child


@dataclass(frozen=True)
class Binding:
    """Where a stream's X and O are in the calls of one attention module.

    Args:
        argument: the parameter's name.
        position: its position, `None` for one that is given by name only.
        output: which output is O, `None` where the argument itself is corrected.
        batch_dim: 0, or 1 for modules that take `(N, B, d)`; `None`: unknown.
    """

    argument: str
    position: int | None
    output: int | None
    batch_dim: int | None = 0

    def get(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """X in one call; `None` where it was not given."""
        if self.position is not None and len(args) > self.position:
            return args[self.position]
        return kwargs.get(self.argument)

    def replace(self, args: tuple, kwargs: dict[str, Any], states: Any) -> tuple[tuple, dict[str, Any]]:
        """The call with other states in place of X."""
        if self.position is not None and len(args) > self.position:
            return (*args[: self.position], states, *args[self.position + 1 :]), kwargs
        return args, {**kwargs, self.argument: states}


def bind(name: str, module: nn.Module, stream: Stream) -> Binding:
    """The binding of a stream to the forward of `module`; `ValueError` naming the module where there is none."""
    parameters = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    by_name = {parameter.name: position for position, parameter in enumerate(parameters)}
    argument = stream.argument
    if argument not in by_name and stream.position is not None and len(parameters) > stream.position:
        argument = parameters[stream.position].name
    if argument not in by_name:
        raise ValueError(
            f"{name} ({type(module).__name__}) cannot be adapted: its forward{inspect.signature(module.forward)} has "
            f"no parameter {stream.argument!r}. Name the parameters, or choose other target_modules."
        )
    by_keyword = parameters[by_name[argument]].kind is inspect.Parameter.KEYWORD_ONLY
    return Binding(
        argument,
        None if by_keyword else by_name[argument],
        stream.output,
        _batch_dim(module) if stream.per_sample else None,
    )


def _batch_dim(module: nn.Module) -> int | None:
    batch_first = getattr(module, "batch_first", None)
    if batch_first is not None:
        return 0 if batch_first else 1
    inner = [child for child in module.modules() if getattr(child, "batch_first", True) is False]
    return None if inner else 0  # a wrapper around such a module may turn the axes, or not


def register(module: nn.Module, child: str, core: APTProcessorCore) -> None:
    """Adds a core as `child` of an attention module, and the hook that calls it."""
    _set_tables(module, OrderedDict)
    module.add_module(child, core)
    _renew_hooks(module)


def unregister(module: nn.Module, child: str) -> None:
    """Undoes `register`."""
    delattr(module, child)
    if not any(other in module._modules for other in CHILDREN):
        _set_tables(module, dict)
    _renew_hooks(module)


# A graph of `torch.compile` does not check that a module has no hooks, but it checks the types of the tables in which
# the module keeps its children and parameters, and the numbers of the hooks that were there. Other tables and numbers
# make graphs of before invalid for this module, and for no other; with the tables of before they are valid again.


def _set_tables(module: nn.Module, kind: type[dict]) -> None:
    for table in ("_modules", "_parameters"):
        if type(vars(module)[table]) is not kind:
            vars(module)[table] = kind(vars(module)[table])


def _renew_hooks(module: nn.Module) -> None:
    _remove_hook(module._forward_hooks, module._forward_hooks_with_kwargs, apply_apt)
    _remove_hook(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, apply_apt_context)
    if any(child in module._modules for child in _OUTPUT_CHILDREN):
        module.register_forward_hook(apply_apt, with_kwargs=True)
    if _CONTEXT in module._modules:
        module.register_forward_pre_hook(apply_apt_context, with_kwargs=True)


def accept_base_states(model: nn.Module) -> None:
    """Lets an adapted model load the state of its base, which has no adapters in it: they keep their values."""
    if not any(hook is _forgive_missing_adapters for hook in model._load_state_dict_post_hooks.values()):
        model.register_load_state_dict_post_hook(_forgive_missing_adapters)


def refuse_base_states(model: nn.Module) -> None:
    """Undoes `accept_base_states`."""
    _remove_hook(model._load_state_dict_post_hooks, {}, _forgive_missing_adapters)


def _forgive_missing_adapters(model: nn.Module, incompatible: Any) -> None:
    """After loading: only where all adapters are missing was it the base's state; else some were lost."""
    missing = incompatible.missing_keys
    ours = {key for key in missing if set(CHILDREN) & set(key.split("."))}
    count = sum(len(module.state_dict()) for module in model.modules() if isinstance(module, APTProcessorCore))
    if ours and len(ours) == count:
        missing[:] = [key for key in missing if key not in ours]


def _remove_hook(hooks: dict, with_kwargs: dict, function: Any) -> None:
    # By function, not by handle: a handle does not survive deepcopy and pickle, the hook does.
    for key in [key for key, hook in hooks.items() if hook is function]:
        del hooks[key]
        with_kwargs.pop(key, None)


def apply_apt(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook: corrects the attention's output, and in joint attention the text output, too."""
    for child in _OUTPUT_CHILDREN:
        core = module._modules.get(child)
        if core is not None:
            output = _corrected(core, args, kwargs, output)
    return output


def _corrected(core: APTProcessorCore, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    binding = core.binding
    states = binding.get(args, kwargs)
    outputs = output if isinstance(output, tuple) else (output,)
    if states is None or len(outputs) <= binding.output or outputs[binding.output] is None:
        return output  # a joint attention that is called without text, or whose last block drops it
    corrected = _batch_first(core, outputs[binding.output], states)
    if not isinstance(output, tuple):
        return corrected
    return (*output[: binding.output], corrected, *output[binding.output + 1 :])


def _batch_first(core: APTProcessorCore, attn_output: Tensor, states: Tensor) -> Tensor:
    if core.adapters_per_sample is None:
        return core(attn_output, states)
    if attn_output.ndim < 3:
        raise ValueError(
            "One adapter per sample needs a batch axis; this attention has the tokens of all samples in one row, "
            "whose parts APT does not know. Use one adapter for the whole batch."
        )
    if core.binding.batch_dim == 0:
        return core(attn_output, states)
    if core.binding.batch_dim is None:
        raise ValueError(
            "One adapter per sample needs the batch as first axis; this attention wraps a module with "
            "batch_first=False, and APT cannot tell which axis it gives out first."
        )
    return core(attn_output.transpose(0, 1), states.transpose(0, 1)).transpose(0, 1)


def apply_apt_context(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook: corrects the encoder states c (O := c, X := c) before they become keys and values."""
    core = module._modules[_CONTEXT]
    context = core.binding.get(args, kwargs)
    return (args, kwargs) if context is None else core.binding.replace(args, kwargs, _correct_context(core, context))


def _correct_context(core: APTProcessorCore, context: Any) -> Any:
    if isinstance(context, tuple):  # IP-Adapter: (text states, image states)
        return (_correct_context(core, context[0]), *context[1:])
    return core.once(context)
