"""Joins the calls that several pictures make to one denoiser into a single call, and shares out its output."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]

# Positions of tokens: one table for the whole batch, whatever its length happens to be.
_SHARED = {"img_ids", "txt_ids"}
_TIMES = {"timestep", "timesteps"}


def arguments_of(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Arguments:
    """The arguments of a call by name; those that the function takes as `**kwargs` stand among them."""
    signature = inspect.signature(function)
    bound = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound = bound | bound.pop(name, {})
    return dict(bound)


def batch_size(arguments: Arguments) -> int:
    """Rows of a denoiser's call: the first axis of its first tensor of at least two axes; 0 where there is none."""
    tensors = (value for value in arguments.values() if isinstance(value, Tensor) and value.ndim > 1)
    first = next(tensors, None)
    return 0 if first is None else first.shape[0]


def can_join(first: Arguments, other: Arguments) -> bool:
    """Whether two calls of one function can share a pass: they differ in their rows only."""
    sizes = batch_size(first), batch_size(other)
    return all(sizes) and _alike("", first, other, sizes)


def _alike(name: str, first: Any, other: Any, sizes: tuple[int, int]) -> bool:
    if name in _TIMES and _is_time(first) and _is_time(other):
        return all(_time_fits(time, size) for time, size in zip((first, other), sizes, strict=True))
    if type(first) is not type(other):
        return False
    if isinstance(first, Tensor):
        batched = [_is_batched(name, tensor, size) for tensor, size in zip((first, other), sizes, strict=True)]
        if first.dtype != other.dtype or first.device != other.device or batched[0] != batched[1]:
            return False
        return first.shape[1:] == other.shape[1:] if batched[0] else first is other or torch.equal(first, other)
    if isinstance(first, dict):
        return set(first) == set(other) and all(_alike(key, first[key], other[key], sizes) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(other) and all(_alike(name, a, b, sizes) for a, b in zip(first, other, strict=True))
    return bool(first is other or first == other)


def _is_batched(name: str, tensor: Tensor, size: int) -> bool:
    return name not in _SHARED and tensor.ndim > 0 and tensor.shape[0] == size


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim < 2)


def _time_fits(time: Any, size: int) -> bool:
    return not isinstance(time, Tensor) or time.ndim == 0 or len(time) in (1, size)


class Joiner:
    """Joins calls. A tensor that comes from the same parts as in the last pass is the same tensor as there.

    Cores keep what they compute for the same text states over the steps of a picture, so these must stay one object.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[list[Tensor], list[int], Tensor]] = {}
        self._now: dict[str, tuple[list[Tensor], list[int], Tensor]] = {}

    def join(self, calls: Sequence[Arguments]) -> Arguments:
        """One call with the rows of all calls, in their order.

        Args:
            calls: such that the first can join with each of the others.
        """
        if len(calls) == 1:
            return calls[0]
        sizes = [batch_size(call) for call in calls]
        self._last, self._now = self._now, {}
        return {name: self._joined(name, name, [call[name] for call in calls], sizes) for name in calls[0]}

    def _joined(self, path: str, name: str, values: list[Any], sizes: list[int]) -> Any:
        first = values[0]
        if name in _TIMES and _is_time(first):
            times = [
                torch.as_tensor(value).reshape(-1).expand(size) for value, size in zip(values, sizes, strict=True)
            ]
            return torch.cat(times)
        if isinstance(first, Tensor):
            return self._rows(path, values) if _is_batched(name, first, sizes[0]) else first
        if isinstance(first, dict):
            return {key: self._joined(f"{path}.{key}", key, [v[key] for v in values], sizes) for key in first}
        if isinstance(first, list | tuple):
            parts = [self._joined(f"{path}.{i}", name, [v[i] for v in values], sizes) for i in range(len(first))]
            return type(first)(parts)
        return first

    def _rows(self, path: str, values: list[Tensor]) -> Tensor:
        versions = [value._version for value in values]
        before = self._last.get(path)
        unchanged = (
            before is not None
            and before[1] == versions
            and all(former is value for former, value in zip(before[0], values, strict=True))
        )
        self._now[path] = before if before is not None and unchanged else (values, versions, torch.cat(values))
        return self._now[path][2]


def share_out(output: Any, sizes: Sequence[int]) -> list[Any]:
    """The output of a joint call, cut into those of its parts."""
    if len(sizes) == 1:
        return [output]
    if isinstance(output, Tensor):
        return list(output.split(list(sizes)))
    if isinstance(output, dict):  # diffusers' and transformers' outputs, too
        parts = {key: share_out(value, sizes) for key, value in output.items()}
        return [type(output)(**{key: value[i] for key, value in parts.items()}) for i in range(len(sizes))]
    if isinstance(output, list | tuple):
        shared = [share_out(value, sizes) for value in output]
        return [type(output)([value[i] for value in shared]) for i in range(len(sizes))]
    return [output] * len(sizes)
