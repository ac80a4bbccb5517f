"""Runs an exported denoiser in the place of the model: `pipe.unet = ExportedModel.load("exported")`."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import base_inputs
from .manifest import GRAPHS, INPUTS_FOLDER, KEYS, SCALE, Manifest


class ExportedModel(nn.Module):
    """The denoiser of a pipeline, run by onnxruntime or as a program of `torch.export`.

    Attributes:
        manifest: what the folder holds.
        config: the model's configuration, which pipelines read.
        dtype: of its floating inputs.
        device: where its inputs and outputs are.
    """

    def __init__(self, folder: Path, manifest: Manifest, session: Any) -> None:
        super().__init__()
        self.manifest = manifest
        self.folder = folder
        self.config = _config(folder)
        self.dtype = getattr(torch, manifest.dtype)
        self.device = torch.device("cpu")
        # Stable Diffusion XL's pipelines compare its width with what they give.
        width = self.config.get("projection_class_embeddings_input_dim")
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))
        self._session = session
        self._adapter = base_inputs(manifest)

    @classmethod
    def load(cls, folder: str | Path, providers: list[str] | None = None) -> "ExportedModel":
        """Opens an exported folder; a graph with adapter inputs is the base model at first.

        Args:
            folder: what `export_denoiser` wrote. Open only programs of `torch.export` that you trust.
            providers: of onnxruntime, such as `["CUDAExecutionProvider"]`.

        Raises:
            FileNotFoundError: where the folder holds no export.
            ModuleNotFoundError: where onnxruntime is missing.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        file = folder / GRAPHS[manifest.format]
        if not file.is_file():
            raise FileNotFoundError(f"{folder} lacks its graph {file.name}: export again.")
        if manifest.format == "torch":
            return cls(folder, manifest, torch.export.load(file).module())
        try:
            import onnxruntime
        except ImportError as error:
            raise ModuleNotFoundError(
                'An ONNX graph needs onnxruntime, which is not installed: pip install "apt-diffusion[export]".',
                name="onnxruntime",
            ) from error
        providers = providers or ["CPUExecutionProvider"]
        return cls(folder, manifest, onnxruntime.InferenceSession(str(file), providers=providers))

    @property
    def adapters(self) -> list[str]:
        """The adapters whose inputs are in the folder."""
        return sorted(file.stem for file in (self.folder / INPUTS_FOLDER).glob("*.safetensors"))

    def set_adapter(self, adapter: str | dict[str, Tensor] | None, weight: float = 1.0) -> None:
        """Chooses the adapter of the following calls.

        Args:
            adapter: a name of `adapters`, the tensors of `adapter_inputs`, or `None` for the base model.
            weight: factor on the strength that the inputs were made with.

        Raises:
            ValueError: for an unknown name, other tensors, or a graph whose adapters are constants.
        """
        if not self.manifest.places:
            raise ValueError("The adapters of this graph are constants of it: none can be set.")
        if isinstance(adapter, str):
            if adapter not in self.adapters:
                raise ValueError(f"There is no adapter {adapter!r} in {self.folder}; there are {self.adapters}.")
            from safetensors.torch import load_file

            tensors = load_file(self.folder / INPUTS_FOLDER / f"{adapter}.safetensors")
        else:
            tensors = base_inputs(self.manifest) if adapter is None else adapter
        self._check_fits(tensors)
        self._adapter = {name: _weighted(name, tensor, weight) for name, tensor in tensors.items()}

    def _check_fits(self, tensors: dict[str, Tensor]) -> None:
        names = [name for place in self.manifest.places for name in place.input_names()]
        if set(tensors) != set(names):
            wrong = sorted(set(tensors) ^ set(names))
            raise ValueError(f"These are not the adapter inputs of this graph: {wrong[0]} is missing or too much.")
        for place in self.manifest.places:
            keys, values, scale = (tensors[name] for name in place.input_names())
            if keys.shape != values.shape or keys.shape[1:] != (place.width,) or scale.shape != (1,):
                raise ValueError(f"The adapter inputs of {place.name} have other shapes than the graph takes.")

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """As the model's forward: `(output,)`, or an object with `sample`. Settings of the traced call are fixed."""
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        names = list(dict.fromkeys(one.path[0] for one in self.manifest.inputs))
        given = dict(zip(names, args, strict=False)) | kwargs
        outputs = self.run({one.name: _at(given, one.path) for one in self.manifest.inputs} | self._adapter)
        return Transformer2DModelOutput(sample=outputs[0]) if return_dict else outputs

    def run(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The graph's outputs for all of its inputs by name."""
        ready = [self._ready(name, tensors[name]) for name in self.manifest.input_names]
        if self.manifest.format == "torch":
            with torch.no_grad():
                return tuple(self._session(*ready))
        feed = {name: tensor.numpy() for name, tensor in zip(self.manifest.input_names, ready, strict=True)}
        return tuple(torch.from_numpy(one) for one in self._session.run(self.manifest.outputs, feed))

    def _ready(self, name: str, tensor: Any) -> Tensor:
        described = next((one for one in self.manifest.inputs if one.name == name), None)
        tensor = torch.as_tensor(tensor).detach().cpu()
        if described is None:
            return tensor.contiguous()
        fits = tensor.ndim == len(described.shape) and all(
            size in (None, given) for size, given in zip(described.shape, tensor.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; the graph was traced for {described.shape}, where None is "
                "any size. Export it for this size."
            )
        return tensor.to(getattr(torch, described.dtype)).contiguous()

    def cache_context(self, name: str) -> Any:
        """Pipelines of diffusion transformers enter it around a call; there is nothing to cache here."""
        return contextlib.nullcontext()


def _config(folder: Path) -> Any:
    from diffusers.configuration_utils import FrozenDict

    return FrozenDict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def _at(arguments: dict[str, Any], path: list[Any]) -> Any:
    value: Any = arguments
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"The graph takes {'.'.join(map(str, path))}, which this call does not give.") from error
    return value


def _weighted(name: str, tensor: Tensor, weight: float) -> Tensor:
    kind = name.rpartition(".")[2]
    if kind == KEYS or weight == 1:
        return tensor
    return 1 + weight * (tensor - 1) if kind == SCALE else weight * tensor
