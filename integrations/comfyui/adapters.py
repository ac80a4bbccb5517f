"""Reads adapter files for the ComfyUI nodes: adapter modules by the attention of the model that they correct."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_diffusion.architectures import STREAMS
from apt_diffusion.config import APTConfig
from apt_diffusion.equation import ApproximatedPrompt
from apt_diffusion.io.files import AdapterFile, read_adapter_file
from apt_diffusion.io.names import parse, split_component

QUERY, CONTEXT = STREAMS["query"].child, STREAMS["context"].child
# Our components, and where ComfyUI keeps the encoder within its text model.
TEXT_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


@dataclass
class Component:
    """The adapter of one component: its settings, and a module per attention and stream."""

    config: APTConfig
    modules: dict[tuple[str, str], ApproximatedPrompt]  # by (module name in diffusers or transformers, child)


def read_components(path: str | Path) -> tuple[AdapterFile, dict[str, Component]]:
    """An adapter's file, and its components by name.

    Raises:
        ValueError: for a file that is no APT adapter of a pipeline, or is damaged; naming cause and remedy.
    """
    file = read_adapter_file(Path(path))
    if not file.configs:
        raise ValueError(f"{file.name} has no header with its settings: save it again with save_apt_weights.")
    if "" in file.configs:
        raise ValueError(
            f"{file.name} is an adapter for one single model: save it from a pipeline, or a dict of models."
        )
    foreign = sorted(set(file.configs) - {"unet", *TEXT_ENCODERS})
    if foreign:
        raise ValueError(
            f"{file.name} adapts {foreign}: ComfyUI's patches reach attention in UNets and CLIP only. {file.made_for}"
        )
    grouped: dict[str, dict[tuple[str, str], dict[str, Any]]] = {part: {} for part in file.configs}
    for key, tensor in file.tensors.items():
        part, rest = split_component(key)
        name = parse(rest)
        if part not in grouped or name is None:
            raise ValueError(
                f"{file.name} holds the unexpected tensor {key!r}: it is damaged, or adapts more than attention."
            )
        grouped[part].setdefault((name.module, name.child), {})[name.parameter] = tensor
    return file, {
        part: Component(config, {place: _build(file, config, place, grouped[part][place]) for place in grouped[part]})
        for part, config in file.configs.items()
    }


def _build(
    file: AdapterFile, config: APTConfig, place: tuple[str, str], tensors: dict[str, Any]
) -> ApproximatedPrompt:
    name, child = place
    own = config.at(name)
    try:
        width = tensors["prompts"].shape[1]
        module = ApproximatedPrompt(width, own.num_prompts, own.rank, own.activation, 0.0, own.init or "paper")
        module.load_state_dict(tensors)
    except (KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"{file.name} is damaged at {name}.{child}: {error}") from error
    return module.eval().requires_grad_(False)
