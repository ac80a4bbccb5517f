"""Saving adapters as one safetensors file with all settings in its header. Nothing pickled is written or read.

The header holds the library's version, the `APTConfig`, the number of adapted modules and the family of each
component, and the base model and training settings if they are known.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..architectures import families_of
from ..components import components_of
from ..config import APTConfig
from ..equation import ApproximatedPrompt
from ..model import ModelAdapters
from ..offloading import keep_off_disk, onloaded
from ..version import __version__
from ..words import words_of
from ..wrappers import check_is_whole
from .files import WEIGHTS_NAME, hash_tensors, write_safetensors
from .names import WORDS_KEY, join, neutral_names
from .public_names import public_name


def save_apt_weights(
    model_or_pipeline: Any, path: str | Path, adapter_name: str = "default", metadata: dict[str, str] | None = None
) -> Path:
    """Writes one adapter; to a temporary name first, so that no half-written file is ever seen.

    Args:
        model_or_pipeline: a model, a pipeline, or a dict of components.
        path: a folder (made if needed), or a file name that ends in `.safetensors`.
        adapter_name: which adapter.
        metadata: more strings for the header, such as `base_model`, `instance_prompt`, `training`. Among those of
            ModelSpec (`modelspec.sai_model_spec`, ...) it gets the hash of the tensors.

    Returns:
        The file.

    Raises:
        ValueError: where no component has this adapter, or a header value is not a string.
        OSError: where the disk is full or the place cannot be written.
    """
    components = components_of(model_or_pipeline)
    parts = {p: c for p, c in components.items() if adapter_name in ModelAdapters.of(c).configs}
    if not parts:
        present = sorted({name for c in components.values() for name in ModelAdapters.of(c).configs})
        raise ValueError(f"Adapter {adapter_name!r} is not here to be saved; present adapters: {present}.")
    tensors = {
        join(part, key): tensor
        for part, component in parts.items()
        for key, tensor in apt_state_dict(component, adapter_name).items()
    }
    words, rows = _words(components, adapter_name)
    tensors |= rows
    configs = {part: ModelAdapters.of(component).configs[adapter_name].to_dict() for part, component in parts.items()}
    places = {part: len(ModelAdapters.of(component).at_places(adapter_name)) for part, component in parts.items()}
    header = {
        "format": "pt",
        "apt_diffusion_version": __version__,
        "apt_config": json.dumps(configs),
        "apt_places": json.dumps(places),
    }
    families = {part: names for part, component in parts.items() if (names := families_of(component))}
    if families:
        header["apt_families"] = json.dumps(families)
    if words:
        header["apt_words"] = json.dumps(words, ensure_ascii=False)
    base_model = getattr(getattr(model_or_pipeline, "config", None), "_name_or_path", None)
    if base_model:
        header["base_model"] = public_name(str(base_model))
    header |= metadata or {}
    if "modelspec.sai_model_spec" in header:
        header["modelspec.hash_sha256"] = hash_tensors(tensors)
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / WEIGHTS_NAME
    return write_safetensors(tensors, file, header)


def _words(components: dict[str, nn.Module], adapter_name: str) -> tuple[list[str], dict[str, Tensor]]:
    """The new words of an adapter, and their embeddings by the names of the file format."""
    found = {part: own for part, component in components.items() if (own := words_of(component)) is not None}
    found = {part: own for part, own in found.items() if adapter_name in own.rows}
    if "" in found:
        raise ValueError("This adapter has new words: save the pipeline, whose tokenizers know them.")
    words = next((list(own.names[adapter_name]) for own in found.values()), [])
    return words, {join(part, WORDS_KEY): _copied(own.rows[adapter_name]) for part, own in found.items()}


def apt_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """One component's adapter under the names of the file format, on the CPU."""
    state = ModelAdapters.of(model)
    config = state.configs[adapter_name]
    tensors = {}
    neutral = neutral_names(model)
    adapters = state.at_places(adapter_name)
    keep_off_disk(model, [p for adapter in adapters.values() for p in adapter.parameters()])
    for (module_name, child), adapter in adapters.items():
        with onloaded(adapter):
            parameters = dict(adapter.named_parameters())
            check_is_whole(module_name, parameters.get("prompts"), parameters.get("low_rank_down"))
            for key, tensor in _unpadded(adapter, config.at(module_name)).items():
                tensors[join(neutral.get(module_name, module_name), child, key)] = _copied(tensor)
    if config.modules_to_save:
        heads = state.heads.state(model, adapter_name)
        tensors |= {key: _copied(tensor) for key, tensor in heads.items()}
    return tensors


def _unpadded(adapter: ApproximatedPrompt, config: APTConfig) -> dict[str, Tensor]:
    """The adapter's tensors without the room that `enable_apt_hotswap` gave them."""
    tensors = {name: _whole(parameter) for name, parameter in adapter.named_parameters()}
    if len(adapter.prompts) > config.num_prompts:
        tensors["prompts"] = tensors["prompts"][: config.num_prompts]
    if len(adapter.low_rank_down) > config.rank:
        tensors["low_rank_down"] = tensors["low_rank_down"][: config.rank]
        tensors["low_rank_up"] = tensors["low_rank_up"][:, : config.rank]
    if config.init != "identity":
        tensors.pop("gate", None)
    return tensors


def _whole(tensor: Tensor) -> Tensor:
    """A parameter that FSDP's second version has sharded, gathered from all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _copied(tensor: Tensor) -> Tensor:
    return _whole(tensor).detach().to("cpu", copy=True).contiguous()
