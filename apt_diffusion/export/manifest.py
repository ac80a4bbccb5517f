"""The file `export.json` of an exported folder: which graph it holds, its inputs and outputs, and its adapters."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..io.names import join

MANIFEST_NAME = "export.json"
INPUTS_FOLDER = "adapters"
GRAPHS = {"onnx": "model.onnx", "torch": "model.pt2"}
KEYS, VALUES, SCALE = "keys", "values", "scale"  # the inputs of one place, in the order of `FoldedPrompt`


@dataclass(frozen=True)
class GraphPlace:
    """One attention output (or context) that the graph corrects, with the adapter as input.

    Args:
        name: the module and its stream, as in adapter files: `mid_block.attentions.0.transformer_blocks.0.attn2.apt`.
        width: d.
        activation, query_source: as in `APTConfig`; they are part of the graph.
    """

    name: str
    width: int
    activation: str
    query_source: str

    def input_names(self) -> list[str]:
        """The graph's inputs for this place: K `(p, d)`, the values `(p, d)`, the scale `(1,)`."""
        return [join(self.name, tensor) for tensor in (KEYS, VALUES, SCALE)]


@dataclass(frozen=True)
class GraphInput:
    """One tensor that the graph takes.

    Args:
        name: in the graph.
        path: where the model's forward has it: the argument, and within an argument that is a dict, the key.
        dtype: such as `float32`.
        shape: sizes; `None` for an axis of any size.
    """

    name: str
    path: list[Any]
    dtype: str
    shape: list[int | None]


@dataclass(frozen=True)
class Manifest:
    """What an exported folder holds.

    Args:
        format: `"onnx"` or `"torch"`.
        component: the denoiser's name in its pipeline.
        model_class: its class.
        base_model: the base's hub id or folder, as it was given.
        dtype: of the weights.
        inputs: of the denoiser, in the order of the graph; the adapter's inputs follow.
        outputs: names.
        places: those whose adapter is an input, in the order of the graph; empty where adapters are constants.
        adapters: name -> weight of adapters that are constants of the graph.
        version: of apt-diffusion.
    """

    format: str
    component: str
    model_class: str
    base_model: str
    dtype: str
    inputs: list[GraphInput]
    outputs: list[str]
    places: list[GraphPlace] = field(default_factory=list)
    adapters: dict[str, float] = field(default_factory=dict)
    version: str = ""

    @property
    def input_names(self) -> list[str]:
        """All inputs of the graph, in its order."""
        return [one.name for one in self.inputs] + [name for place in self.places for name in place.input_names()]

    def write(self, folder: Path) -> None:
        """Writes `export.json`."""
        (folder / MANIFEST_NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """The manifest of an exported folder.

        Raises:
            FileNotFoundError: where there is none.
            ValueError: where it is damaged.
        """
        file = Path(folder) / MANIFEST_NAME
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no {MANIFEST_NAME}: it is no folder of apt-diffusion export.")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            inputs = [GraphInput(**one) for one in values.pop("inputs")]
            places = [GraphPlace(**one) for one in values.pop("places")]
            manifest = cls(inputs=inputs, places=places, **values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} cannot be used ({error}): export again.") from error
        if manifest.format not in GRAPHS:
            raise ValueError(f"{file} names the format {manifest.format!r}; there are {', '.join(GRAPHS)}.")
        return manifest
