"""Converts between the file of `save_apt_weights` and the folder of PEFT's `save_pretrained`.

A PEFT folder describes one model, so an adapter of a pipeline becomes a folder with one subfolder per component.
"""

import json
from pathlib import Path

from torch import Tensor

from ..architectures import CHILDREN, COMPONENTS
from ..config import APTConfig
from ..io.files import WEIGHTS_NAME, AdapterFile, read_adapter_file, resolve_adapter_file, write_safetensors
from ..io.names import join, parse, split_component
from ..peft import ATTRIBUTES, PEFT_PREFIX, APTTunerConfig
from ..version import __version__

PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_CHILD_OF = {ATTRIBUTES[child]: child for child in CHILDREN}
_SHARED = (
    "num_prompts",
    "rank",
    "activation",
    "dropout",
    "init",
    "query_source",
    "num_prompts_pattern",
    "rank_pattern",
)


def apt_to_peft(source: str | Path, folder: str | Path) -> list[Path]:
    """Writes an adapter as PEFT saves it.

    Args:
        source: an adapter's file, or the folder that holds it.
        folder: a new folder; of a pipeline's adapter, one folder per component in it.

    Returns:
        The folders for `PeftModel.from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: where `source` is no APT adapter, or has no header to tell its settings.
        FileExistsError: where the folder already holds something.
    """
    file = read_adapter_file(resolve_adapter_file(source))
    configs = file.configs
    if configs is None:
        raise ValueError(f"{file.name} has no header with its settings: save it again with save_apt_weights.")
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: give a new folder.")
    base_model = file.metadata.get("base_model")
    return [
        _write_peft(config, base_model, _tensors_of(file, part), folder / part) for part, config in configs.items()
    ]


def _tensors_of(file: AdapterFile, component: str) -> dict[str, Tensor]:
    if not component:
        return file.tensors
    split = {key: split_component(key) for key in file.tensors}
    return {rest: file.tensors[key] for key, (part, rest) in split.items() if part == component}


def _write_peft(config: APTConfig, base_model: str | None, tensors: dict[str, Tensor], folder: Path) -> Path:
    parsed = {key: parse(key) for key in tensors}
    values = config.to_dict()
    peft_config = APTTunerConfig(
        base_model_name_or_path=base_model,
        target_modules=sorted({name.module for name in parsed.values() if name}),
        streams=values["streams"],
        modules_to_save=values["modules_to_save"],
        inference_mode=True,
        **{name: values[name] for name in _SHARED},
    )
    renamed = {
        PEFT_PREFIX + (join(name.module, ATTRIBUTES[name.child], name.parameter) if name else key): tensors[key]
        for key, name in parsed.items()
    }
    write_safetensors(renamed, folder / PEFT_WEIGHTS_NAME, {"format": "pt"})
    peft_config.save_pretrained(folder)
    return folder


def peft_to_apt(source: str | Path, path: str | Path) -> Path:
    """Writes an adapter that PEFT saved as the file that `load_apt_weights` takes.

    Args:
        source: PEFT's folder; or one with such folders by component (`unet`, `text_encoder`, ...), for a pipeline.
        path: a folder (made if needed), or a file name that ends in `.safetensors`.

    Returns:
        The file.

    Raises:
        FileNotFoundError: where there is no PEFT adapter with safetensors.
        ValueError: where it is an adapter of another method, or has tensors of no APT adapter.
    """
    source, path = Path(source), Path(path)
    if (source / PEFT_CONFIG_NAME).is_file():
        folders = {"": source}
    else:
        folders = {part: source / part for part in COMPONENTS if (source / part / PEFT_CONFIG_NAME).is_file()}
    if not folders:
        raise FileNotFoundError(f"There is no {PEFT_CONFIG_NAME} in {source}, nor in a folder per component in it.")
    read = {part: _read_peft(folder) for part, folder in folders.items()}
    tensors = {join(part, key): tensor for part, (_, own, _) in read.items() for key, tensor in own.items()}
    places = {part: len({name[:2] for name in map(parse, own) if name}) for part, (_, own, _) in read.items()}
    header = {
        "format": "pt",
        "apt_diffusion_version": __version__,
        "apt_config": json.dumps({part: config.to_dict() for part, (config, _, _) in read.items()}),
        "apt_places": json.dumps(places),
    }
    base_model = next((base for _, _, base in read.values() if base), None)
    file = path if path.suffix == ".safetensors" else path / WEIGHTS_NAME
    return write_safetensors(tensors, file, header | ({"base_model": base_model} if base_model else {}))


def _read_peft(folder: Path) -> tuple[APTConfig, dict[str, Tensor], str | None]:
    from safetensors.torch import load_file

    values = json.loads((folder / PEFT_CONFIG_NAME).read_text(encoding="utf-8"))
    if values.get("peft_type") != "APT":
        raise ValueError(f"{folder} holds an adapter of {values.get('peft_type')}, not of APT.")
    if not (folder / PEFT_WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"There is no {PEFT_WEIGHTS_NAME} in {folder}; pickled files are never loaded.")
    tensors = {_own_name(folder, key): tensor for key, tensor in load_file(folder / PEFT_WEIGHTS_NAME).items()}
    config = APTConfig(
        target_modules=tuple(sorted({name.module for name in map(parse, tensors) if name})),
        streams=tuple(values["streams"]),
        modules_to_save=values.get("modules_to_save"),
        **{name: values[name] for name in _SHARED if values.get(name) is not None},
    )
    return config, tensors, values.get("base_model_name_or_path")


def _own_name(folder: Path, key: str) -> str:
    module, _, rest = key.removeprefix(PEFT_PREFIX).rpartition(".")
    place, _, attribute = module.rpartition(".")
    name = join(place, _CHILD_OF.get(attribute, attribute), rest)
    if not key.startswith(PEFT_PREFIX):
        raise ValueError(f"{folder}: the tensor {key!r} has not the name that PEFT gives to one of an adapter.")
    return name
