"""Traces a denoiser whose processor cores are replaced by their folded form: `torch.export`'s program of it.

The keys K and the values of an adapter do not depend on the denoiser's input (`equation.py`). So the graph has them as
constants, or takes them as inputs; the rank, the gate and the strength are in them already.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..equation import FoldedPrompt, correct
from ..io.names import join, neutral_names
from ..model import ModelAdapters
from ..processor import APTProcessorCore
from .capture import Path, tensors_in, with_tensors
from .manifest import GraphPlace


class FoldedStep(NamedTuple):
    """One adapter at one place: its folded form, activation and source of the query."""

    folded: FoldedPrompt | None  # None: an input of the graph
    activation: str
    query_source: str


class Slot:
    """Holds the tensors of an adapter while the graph that has them as inputs runs."""

    def __init__(self) -> None:
        self.folded: FoldedPrompt | None = None


class FoldedCore(nn.Module):
    """Stands in for an `APTProcessorCore` in a graph: the same sum over adapters, with nothing left to fold."""

    adapters_per_sample = None  # a graph has one adapter for all rows

    def __init__(self, core: APTProcessorCore, steps: list[FoldedStep]) -> None:
        super().__init__()
        self.binding = core.binding
        self.slot = Slot()
        self.kinds = [(step.activation, step.query_source) for step in steps]
        for index, step in enumerate(steps):
            for name, tensor in (step.folded._asdict() if step.folded else {}).items():
                self.register_buffer(f"{name}_{index}", tensor.detach().clone())

    def forward(self, attn_output: Tensor, hidden_states: Tensor) -> Tensor:
        """`(O, X) -> Y`, all `(B, N, d)`."""
        corrected = attn_output
        for index, (activation, query_source) in enumerate(self.kinds):
            folded = self.slot.folded
            if folded is None:
                folded = FoldedPrompt(*(getattr(self, f"{name}_{index}") for name in FoldedPrompt._fields))
            query = hidden_states if query_source == "hidden_states" else attn_output
            output = correct(attn_output, query, folded, activation)
            corrected = output if corrected is attn_output else corrected + (output - attn_output)
        return corrected

    def once(self, states: Tensor) -> Tensor:
        """As of a core, for the context stream."""
        return self(states, states)


def graph_places(model: nn.Module) -> dict[str, GraphPlace]:
    """`{core's name in the model: place}` of a graph that takes the adapter as input.

    Raises:
        ValueError: where adapters of the model are of different kinds at one place: the kind is part of the graph.
    """
    neutral = neutral_names(model)
    places = {}
    for name, core in ModelAdapters.of(model).cores():
        module, _, child = name.rpartition(".")
        kinds = {(adapter.activation, core.query_sources[key]) for key, adapter in core.adapters.items()}
        if len(kinds) > 1:
            raise ValueError(
                f"The adapters differ in activation or query_source at {module}: {sorted(kinds)}. Both are part of "
                "the graph, so these adapters need a graph each."
            )
        ((activation, source),) = kinds
        places[name] = GraphPlace(join(neutral.get(module, module), child), core.hidden_size, activation, source)
    return places


def folded_steps(core: APTProcessorCore, dtype: torch.dtype) -> list[FoldedStep]:
    """The active adapters of a core as constants."""
    steps = []
    for name, weight in core.weights.items() if core.enabled else ():
        if weight * core.scale != 0:
            adapter = core.adapters[name]
            folded = adapter.fold(dtype, weight * core.scale)
            steps.append(FoldedStep(folded, adapter.activation, core.query_sources[name]))
    return steps


@contextlib.contextmanager
def folded_cores(model: nn.Module, dtype: torch.dtype, places: dict[str, GraphPlace]) -> Iterator[dict[str, Slot]]:
    """Context manager: the model with its cores folded; gives the slots of `places`, and puts the cores back."""
    replaced = []
    slots = {}
    try:
        for name, core in list(ModelAdapters.of(model).cores()):
            module_name, _, child = name.rpartition(".")
            place = places.get(name)
            steps = folded_steps(core, dtype)
            if place is not None:
                steps = [FoldedStep(None, place.activation, place.query_source)]
            folded = FoldedCore(core, steps)
            module = model.get_submodule(module_name)
            replaced.append((module, child, core))
            setattr(module, child, folded)
            if place is not None:
                slots[name] = folded.slot
        yield slots
    finally:
        for module, child, core in replaced:
            setattr(module, child, core)


class Graph(nn.Module):
    """The denoiser with tensors as its only arguments: its inputs first, then three for each place with an input."""

    def __init__(self, model: nn.Module, call: dict[str, Any], paths: list[Path], slots: list[Slot]) -> None:
        super().__init__()
        self.model = model
        self._given = call, paths, slots

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors that the model gives out."""
        call, paths, slots = self._given
        inputs, adapter = tensors[: len(paths)], tensors[len(paths) :]
        try:
            for index, slot in enumerate(slots):
                slot.folded = FoldedPrompt(*adapter[3 * index : 3 * index + 3])
            output = self.model(**with_tensors(call, dict(zip(paths, inputs, strict=True))))
        finally:
            for slot in slots:
                slot.folded = None
        return tuple(tensor for _, tensor in tensors_in(output))


def trace(graph: Graph, tensors: list[Tensor]) -> torch.export.ExportedProgram:
    """The program of `graph`, with every axis of any size that the model allows to be of any size.

    Raises:
        ValueError: where the model cannot be traced; with the reason of `torch.export`.
    """
    shapes = tuple(
        {axis: torch.export.Dim.AUTO for axis, size in enumerate(tensor.shape) if size > 1} for tensor in tensors
    )
    try:
        with torch.no_grad(), quiet_torch():
            return torch.export.export(graph, tuple(tensors), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:  # torch raises errors of its own, and whatever the model's code does
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{type(graph.model).__name__} cannot be exported, torch.export cannot trace it: {reason}"
        ) from error


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Context manager: no notices of torch, which are about itself."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
