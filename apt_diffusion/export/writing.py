"""Writes the denoiser of a pipeline, with its adapters, as a folder for another runtime: all of it or nothing."""

import contextlib
import dataclasses
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import DENOISERS
from ..components import components_of
from ..io.atomic import new_folder
from ..io.files import AdapterFile, read_adapter_file, resolve_adapter_file
from ..io.load import load_apt_weights
from ..model import AdapterWeight, ModelAdapters
from ..version import __version__
from .capture import capture_call, input_names, tensors_in
from .inputs import adapter_inputs, inputs_name, write_inputs
from .manifest import GRAPHS, MANIFEST_NAME, GraphInput, Manifest
from .running import ExportedModel
from .tracing import Graph, folded_cores, graph_places, quiet_torch, trace

LIBRARIES = {"onnx": ("onnx", "onnxscript"), "torch": ()}
# The largest difference from the model, as a share of its largest output.
TOLERANCES = {"float32": 1e-3, "float16": 2e-2}


def check_libraries(format: str, verify: bool = True) -> None:
    """`ValueError` for an unknown format, `ModuleNotFoundError` where a library that it needs is missing."""
    if format not in GRAPHS:
        raise ValueError(f"There is no format {format!r}: choose one of {', '.join(GRAPHS)}.")
    needed = LIBRARIES[format] + (("onnxruntime",) if format == "onnx" and verify else ())
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"Exporting to {format} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            'installed: pip install "apt-diffusion[export]".',
            name=missing[0],
        )


def check_free(folder: str | Path, overwrite: bool) -> None:
    """`FileExistsError` for a folder that would be lost, or that is no exported one."""
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MANIFEST_NAME).is_file():
        raise FileExistsError(f"{folder} is there, and is no exported folder: choose another one.")
    if not overwrite:
        raise FileExistsError(f"{folder} would be replaced: choose another folder, or say that it may be overwritten.")


def export_denoiser(
    pipe: Any,
    folder: str | Path,
    adapters: dict[str, float],
    format: str = "onnx",
    as_inputs: bool = False,
    base_model: str = "",
    overwrite: bool = False,
    verify: bool = True,
    **call: Any,
) -> Manifest:
    """Exports the denoiser of `pipe` with adapters.

    Args:
        pipe: a diffusers pipeline without adapters, on the CPU; it gets them for the export only.
        folder: a new folder: the graph, `export.json`, the model's `config.json`, and `adapters/` with inputs.
        adapters: folder, file or hub repository -> weight.
        format: `"onnx"`, or `"torch"` for a program of `torch.export`.
        as_inputs: the graph takes the adapter as input, and `adapters/` gets the inputs of each of `adapters`;
            otherwise they are constants of the graph, mixed by their weights.
        base_model: what the manifest says about the base.
        overwrite: replace an exported folder.
        verify: run the written graph, and compare it with the model.
        call: arguments of the pipeline for the call that is traced, such as `height`; the picture's size may differ
            later, where the model allows it.

    Returns:
        The manifest.

    Raises:
        ModuleNotFoundError: where the format needs a library that is missing.
        FileExistsError: where the folder is there.
        FileNotFoundError, ValueError: for adapters that cannot be loaded, and a model that cannot be exported.
    """
    check_libraries(format, verify)
    check_free(folder, overwrite)
    component, model = _denoiser(pipe)
    files = {place: read_adapter_file(resolve_adapter_file(place)) for place in adapters}
    names = _names(adapters)
    loaded = [(files[place], 1.0 if as_inputs else weight) for place, weight in adapters.items()]
    with _loaded(pipe, component, loaded, first_only=as_inputs), _evaluating(model):
        dtype = next(model.parameters()).dtype
        places = graph_places(model) if as_inputs else {}
        arguments = capture_call(pipe, component, **call)
        paths, tensors = map(list, zip(*tensors_in(arguments), strict=True))
        given = input_names(paths)
        described = [
            GraphInput(name, list(path), _name(tensor.dtype), list(tensor.shape))
            for name, path, tensor in zip(given, paths, tensors, strict=True)
        ]
        manifest = Manifest(
            format, component, type(model).__name__, base_model, _name(dtype), described, [],
            list(places.values()), {} if as_inputs else {names[place]: adapters[place] for place in adapters},
            __version__,
        )  # fmt: skip
        adapter = _example(files, manifest)
        with torch.no_grad():
            expected = tuple(tensor for _, tensor in tensors_in(model(**arguments))) if verify else None
        with folded_cores(model, dtype, places) as slots:
            graph = Graph(model, arguments, paths, [slots[name] for name in places])
            program = trace(graph, [*tensors, *adapter])
            manifest = _with_shapes(manifest, program)
            with new_folder(folder, replace=overwrite) as temporary:
                write_program(program, temporary / GRAPHS[format], manifest)
                manifest.write(temporary)
                model.save_config(temporary)
                for place, weight in adapters.items() if as_inputs else ():
                    write_inputs(temporary, place, weight, names[place])
                if expected is not None:
                    _verify(temporary, manifest, [*tensors, *adapter], expected)
    return manifest


def _denoiser(pipe: Any) -> tuple[str, nn.Module]:
    for name, model in components_of(pipe).items():
        if name in DENOISERS:
            if ModelAdapters.of(model).configs:
                raise ValueError(f"The {name} carries adapters: give a pipeline without, and name their files.")
            return name, model
    raise ValueError(f"{type(pipe).__name__} has no denoiser ({', '.join(DENOISERS)}) to export.")


def _names(adapters: dict[str, float]) -> dict[str, str]:
    if not adapters:
        raise ValueError("No adapter is given: name at least one.")
    names = {place: inputs_name(place) for place in adapters}
    twice = sorted({name for name in names.values() if list(names.values()).count(name) > 1})
    if twice:
        raise ValueError(f"Two adapters would be called {twice[0]!r}: rename one of the folders or files.")
    return names


@contextlib.contextmanager
def _loaded(pipe: Any, component: str, files: list[tuple[AdapterFile, float]], first_only: bool) -> Iterator[None]:
    """Context manager: the denoiser with these adapters loaded, and all of them or the first one active."""
    model = getattr(pipe, component)
    try:
        for index, (file, _) in enumerate(files):
            alone = file.configs is None or "" in file.configs  # a file without settings, or of one model
            target, parts = (model, None) if alone else (pipe, [component])
            load_apt_weights(target, file, f"exported{index}", components=parts)
        weights: dict[str, AdapterWeight] = {f"exported{index}": weight for index, (_, weight) in enumerate(files)}
        ModelAdapters.of(model).set_active(dict(list(weights.items())[:1]) if first_only else weights)
        yield
    finally:
        ModelAdapters.of(model).reset()


def _example(files: dict[str, Any], manifest: Manifest) -> list[Tensor]:
    """The adapter inputs of the first adapter, in the order of the graph."""
    if not manifest.places:
        return []
    first = adapter_inputs(next(iter(files.values())), manifest)
    return [first[name] for place in manifest.places for name in place.input_names()]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _with_shapes(manifest: Manifest, program: torch.export.ExportedProgram) -> Manifest:
    """The manifest with `None` for axes that the graph takes in any size, and the outputs' names."""
    inputs = []
    user = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in user]
    for one, node in zip(manifest.inputs, nodes, strict=False):
        sizes = map(str, node.meta["val"].shape)  # a symbol that turned out to be a constant prints as its number
        shape = [int(size) if size.isdigit() else None for size in sizes]
        inputs.append(dataclasses.replace(one, shape=shape))
    outputs = len(program.graph_signature.user_outputs)
    names = ["out_sample"] if outputs == 1 else [f"out_{index}" for index in range(outputs)]
    return dataclasses.replace(manifest, inputs=inputs, outputs=names)


def write_program(program: torch.export.ExportedProgram, file: Path, manifest: Manifest) -> None:
    """Writes a program in the manifest's format; `ValueError` where ONNX has no operators for it."""
    if manifest.format == "torch":
        torch.export.save(program, file)
        return
    from torch.onnx import export
    from torch.onnx.errors import OnnxExporterError

    try:
        with quiet_torch(), contextlib.redirect_stdout(io.StringIO()):
            converted = export(
                program, input_names=manifest.input_names, output_names=manifest.outputs, dynamo=True, verbose=False
            )
    except OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{manifest.model_class} cannot be written as ONNX, only as torch: {reason}") from error
    assert converted is not None
    converted.save(file)


def _verify(folder: Path, manifest: Manifest, tensors: list[Tensor], expected: tuple[Tensor, ...]) -> None:
    found = ExportedModel.load(folder).run(dict(zip(manifest.input_names, tensors, strict=True)))
    for name, one, other in zip(manifest.outputs, found, expected, strict=True):
        difference = (one.float() - other.float()).abs().max() / other.float().abs().max().clamp_min(1e-6)
        if not difference <= TOLERANCES[manifest.dtype]:
            raise ValueError(
                f"The exported graph does not do what the model does: {name} differs by {difference:.1g} of its "
                "largest value. Nothing was written."
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
