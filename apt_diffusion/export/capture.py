"""What a pipeline gives its denoiser: the arguments of one real call, which the graph is traced with."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

PROMPTS = ["a picture", "another picture"]  # two: an axis of size 1 would be traced as a constant
Path = tuple[Any, ...]


class _Captured(Exception):
    """Ends the pipeline's call at the denoiser."""


def capture_call(pipe: Any, component: str, **call: Any) -> dict[str, Any]:
    """Arguments of the first call of `pipe.<component>`, by the names of its forward; the denoiser is not run.

    Args:
        pipe: a diffusers pipeline.
        component: the denoiser's name.
        call: arguments of the pipeline besides `prompt`, such as `height`.

    Raises:
        ValueError: where a prompt does not lead to a call of the denoiser.
    """
    model: nn.Module = getattr(pipe, component)
    seen: dict[str, Any] = {}

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.update(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
        raise _Captured

    handle = model.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    settings = {"prompt": PROMPTS, "num_inference_steps": 1, "output_type": "latent"} | call
    try:
        with torch.no_grad():
            pipe(**settings)
    except _Captured:
        return _prepared(model, seen)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{type(pipe).__name__} could not be called to see what its {component} takes: {error}"
        ) from error
    finally:
        handle.remove()
    raise ValueError(f"{type(pipe).__name__} drew a picture without calling its {component}: nothing can be traced.")


def _prepared(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    if "return_dict" in inspect.signature(model.forward).parameters:
        arguments = arguments | {"return_dict": False}
    step = arguments.get("timestep")
    if isinstance(step, Tensor) and not step.is_floating_point():  # one graph for schedulers of both kinds
        arguments = arguments | {"timestep": step.float()}
    return arguments


def tensors_in(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """`(path, tensor)` of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors_in(inner, (*path, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from tensors_in(inner, (*path, index))


def with_tensors(value: Any, tensors: dict[Path, Tensor], path: Path = ()) -> Any:
    """`value` with other tensors at those paths."""
    if isinstance(value, Tensor):
        return tensors[path]
    if isinstance(value, dict):
        return {key: with_tensors(inner, tensors, (*path, key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([with_tensors(inner, tensors, (*path, index)) for index, inner in enumerate(value)])
    return value


def input_names(paths: list[Path]) -> list[str]:
    """A name for each tensor: the last string of its path, with an index in a list; the whole path where two agree."""

    def short(path: Path) -> str:
        last = max(index for index, step in enumerate(path) if isinstance(step, str))
        return "_".join(map(str, path[last:]))

    names = [short(path) for path in paths]
    return [
        name if names.count(name) == 1 else "_".join(map(str, path)) for name, path in zip(names, paths, strict=True)
    ]
