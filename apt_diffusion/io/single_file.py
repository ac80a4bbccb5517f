"""A base model in one file, as its first authors publish them: what the file holds, told from its header alone.

The layout is called LDM's: all parts of a model next to each other, by the names of the code that trained it.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .names import is_adapter_tensor

SUFFIXES = (".safetensors", ".ckpt")
# More than any base has; a stranger's file must not cost more than that to look at.
MOST_HEADER_BYTES = 2**24
MOST_TENSORS = 100_000
DENOISER = "model.diffusion_model."
UNET = f"{DENOISER}input_blocks."
VAE = ("first_stage_model.", "vae.")
STABLE_DIFFUSION, STABLE_DIFFUSION_2 = "Stable Diffusion 1", "Stable Diffusion 2"
STABLE_DIFFUSION_XL, STABLE_DIFFUSION_3, FLUX = "Stable Diffusion XL", "Stable Diffusion 3", "Flux"
# The prefixes of each text encoder in turn, by kind of model.
TEXT_ENCODERS: dict[str, dict[str, str]] = {
    STABLE_DIFFUSION: {"text_encoder": "cond_stage_model.transformer."},
    STABLE_DIFFUSION_2: {"text_encoder": "cond_stage_model.model."},
    STABLE_DIFFUSION_XL: {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    STABLE_DIFFUSION_3: {
        "text_encoder": "text_encoders.clip_l.",
        "text_encoder_2": "text_encoders.clip_g.",
        "text_encoder_3": "text_encoders.t5xxl.",
    },
    FLUX: {"text_encoder": "text_encoders.clip_l.", "text_encoder_2": "text_encoders.t5xxl."},
}


@dataclass(frozen=True)
class Checkpoint:
    """A base model in one file.

    Args:
        file: where it is.
        kind: of model, one of `TEXT_ENCODERS`.
        shapes: of all tensors, by name.
        dtypes: torch's names of the types of numbers, of all tensors.
        metadata: strings of a safetensors header.
    """

    file: Path
    kind: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]

    @property
    def parts(self) -> set[str]:
        """Components that the file has, by the pipeline's names."""
        prefixes = {part: (prefix,) for part, prefix in TEXT_ENCODERS[self.kind].items()} | {"vae": VAE}
        denoiser = "unet" if self.kind not in (STABLE_DIFFUSION_3, FLUX) else "transformer"
        found = {part for part, starts in prefixes.items() if any(name.startswith(starts) for name in self.shapes)}
        return found | {denoiser}

    @property
    def dtype(self) -> str:
        """The type that holds all weights without loss."""
        kinds = {kind for name, kind in self.dtypes.items() if name.startswith((DENOISER, *VAE, "double_blocks"))}
        narrow = {"float16", "bfloat16"} & kinds
        if "float32" in kinds or len(narrow) > 1:
            return "float32"
        return narrow.pop() if narrow else "bfloat16" if any("float8" in kind for kind in kinds) else "float32"


def is_single_file(name_or_path: str | Path) -> bool:
    """Whether this names a file rather than a folder or a model of the hub."""
    path = Path(name_or_path).expanduser()
    return path.is_file() or (str(name_or_path).endswith(SUFFIXES) and not path.is_dir())


def read_checkpoint(file: str | Path) -> Checkpoint:
    """Recognises a base model; reads the header of the file only, never its weights.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a file that is no base model of a kind that can be converted, or cannot be read; with what it
            seems to be.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    if file.suffix == ".safetensors":
        shapes, dtypes, metadata = _safetensors_header(file)
    elif file.suffix == ".ckpt":
        shapes, dtypes, metadata = *_ckpt_header(file), {}
    else:
        raise ValueError(
            f"{file} is no base model: give a folder in diffusers' layout, a hub id, or one file of a whole model, "
            f"which ends in {' or '.join(SUFFIXES)}."
        )
    return Checkpoint(file, _kind_of(file, shapes), shapes, dtypes, metadata)


def _safetensors_header(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
    if MOST_HEADER_BYTES < length <= file.stat().st_size:
        raise ValueError(f"{file} has a header of {length / 2**20:.0f} MiB, more than any base model needs: not read.")
    try:
        with safe_open(file, framework="pt", device="cpu") as content:
            names = list(content.keys())
            _check_count(file, len(names))
            slices = {name: content.get_slice(name) for name in names}
            shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
            dtypes = {name: _TYPES.get(one.get_dtype(), one.get_dtype()) for name, one in slices.items()}
            return shapes, dtypes, content.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as safetensors ({error}): it is cut off, damaged or of another format. Copy or "
            "download it again."
        ) from error


_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def _ckpt_header(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Read by torch as tensors and plain values only; nothing that a file names is run."""
    import torch

    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{file} is no checkpoint that can be read: it is cut off, of another format, or older than torch 1.6. "
            "Take the model as .safetensors."
        ) from error
    _check_count(file, len(entries))
    pickled = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    if pickled > MOST_HEADER_BYTES or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"{file} is packed as no base model is: it is not read. Take the model as .safetensors.")
    try:
        state: Any = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # of a damaged file torch's reader raises anything from KeyError to struct.error
        raise ValueError(
            f"{file} holds more than weights, which could run as a program, or is damaged: it is not loaded. Take the "
            "model as .safetensors."
        ) from error
    for _ in range(4):  # the weights may stand under "state_dict", as Lightning writes them
        if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
            state = state["state_dict"]
    tensors = {
        name: value
        for name, value in (state.items() if isinstance(state, Mapping) else ())
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    return shapes, {name: str(value.dtype).removeprefix("torch.") for name, value in tensors.items()}


def _check_count(file: Path, count: int) -> None:
    if count > MOST_TENSORS:
        raise ValueError(f"{file} has {count} entries, more than any base model: it is not read.")


def _kind_of(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The kind of model; `ValueError` that says what the file is instead."""

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in shapes)

    if any(map(is_adapter_tensor, shapes)):
        raise ValueError(f"{file} is an APT adapter, no base model: name the model that it was made for.")
    if any("lora" in name.lower() for name in shapes):
        raise ValueError(f"{file} is a LoRA, no base model: name the model that it was made for.")
    if has("control_model.", "controlnet_"):
        raise ValueError(f"{file} is a ControlNet, no base model.")
    if has(f"{DENOISER}joint_blocks.", "joint_blocks."):
        return STABLE_DIFFUSION_3
    if has(f"{DENOISER}double_blocks.", "double_blocks."):
        return FLUX
    if not has(UNET):
        kind = "a part of a model in diffusers' layout" if has("down_blocks.", "transformer_blocks.") else None
        kind = "a VAE" if has("first_stage_model.", "encoder.", "decoder.") else kind
        kind = kind or f"something else: none of its {len(shapes)} tensors belongs to a denoiser that is known here"
        raise ValueError(
            f"{file} is no base model but {kind}. A base in one file is a whole Stable Diffusion 1, 2, XL or 3, or a "
            "Flux, in the layout in which these are published."
        )
    ins, outs = shapes.get(f"{UNET}0.0.weight"), shapes.get(f"{DENOISER}out.2.weight")
    if not ins or not outs or len(ins) < 2 or ins[1] != outs[0]:
        raise ValueError(
            f"{file} is no text-to-image model: its UNet has {ins[1] if ins and len(ins) > 1 else 'no'} input and "
            f"{outs[0] if outs else 'no'} output channels, as models for inpainting or editing have."
        )
    for kind in (STABLE_DIFFUSION_XL, STABLE_DIFFUSION_2, STABLE_DIFFUSION):
        if has(list(TEXT_ENCODERS[kind].values())[-1]):
            return kind
    if has("conditioner.embedders.0.model."):
        raise ValueError(f"{file} is SDXL's refiner, no base model.")
    raise ValueError(f"{file} has a UNet but no text encoder that is known here: give a whole model.")
