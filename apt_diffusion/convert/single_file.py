"""A base model in one file becomes a folder in diffusers' layout, once; from then on it is a base like any other."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from ..io.atomic import new_folder, write_text
from ..io.single_file import (
    FLUX,
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_2,
    STABLE_DIFFUSION_3,
    STABLE_DIFFUSION_XL,
    Checkpoint,
    is_single_file,
    read_checkpoint,
)
from ..miniature import resolve_model

logger = logging.getLogger(__name__)

PIPELINES = {
    STABLE_DIFFUSION: ("StableDiffusionPipeline", "LatentConsistencyModelPipeline"),
    STABLE_DIFFUSION_2: ("StableDiffusionPipeline",),
    STABLE_DIFFUSION_XL: ("StableDiffusionXLPipeline",),
    STABLE_DIFFUSION_3: ("StableDiffusion3Pipeline",),
    FLUX: ("FluxPipeline",),
}
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")  # not in these files, and not needed
# Marks by which files say that their model predicts the velocity, as ComfyUI reads them; ModelSpec has a key for it.
VELOCITY, ZERO_SNR, EDM = "v_pred", "ztsnr", ("edm_mean", "edm_vpred.sigma_max")
CONFIGURATION = ["**/*.json", "*.json", "*.txt", "**/*.txt", "**/*.model"]


def base_folder(name_or_path: str, base_config: str | None = None) -> str:
    """The folder or hub id of a base. One file is converted at its first use and kept in the cache of the hub's files.

    Args:
        name_or_path: an embedded model's name, a hub id, a folder, or a file in LDM's layout.
        base_config: hub id, folder or embedded model with the settings and tokenizers of a file, which it lacks.

    Raises:
        FileNotFoundError: for a file that is not there, or settings that cannot be had.
        ValueError: for a file that is no base, or does not fit its settings.
        OSError: where the disk is full.
    """
    if not is_single_file(name_or_path):
        if base_config is not None:
            raise ValueError(f"--base_config is for a base in one file; {name_or_path} has its own configuration.")
        return name_or_path
    checkpoint = read_checkpoint(name_or_path)
    config = find_configuration(checkpoint, base_config)
    index = _index_of(checkpoint, config)
    absent = _absent_parts(checkpoint, config, index)
    folder = _cache() / f"{checkpoint.file.stem[:60]}-{_digest(checkpoint.file, config)}"
    if not folder.is_dir():
        _convert(checkpoint, config, index, absent, folder)
    return str(folder)


def find_configuration(checkpoint: Checkpoint, base_config: str | None = None) -> Path:
    """A folder with `model_index.json`, settings and tokenizers: that named, or the one diffusers knows for the kind.

    Raises:
        FileNotFoundError: where it is neither here nor to be had.
        ValueError: for a kind of which a file does not tell enough.
    """
    place = base_config
    if place is None:
        if checkpoint.kind == STABLE_DIFFUSION_2 and not marks_of(checkpoint):
            raise ValueError(
                f"{checkpoint.file} is a Stable Diffusion 2, and does not say whether it predicts noise or velocity: "
                "give --base_config stabilityai/stable-diffusion-2-base (noise, 512 pixels) or "
                "stabilityai/stable-diffusion-2-1 (velocity, 768), or a folder with its configuration."
            )
        place = _usual_configuration(checkpoint)
    place = resolve_model(place)
    if Path(place).is_dir():
        return Path(place)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(place, allow_patterns=CONFIGURATION))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{checkpoint.file} is a {checkpoint.kind} without configuration and tokenizer; those of {place} are "
            "neither in the local cache of the hub nor to be had: give --base_config FOLDER with any model of this "
            "family in diffusers' layout, of which the .json files and the tokenizer suffice."
        ) from error


def _usual_configuration(checkpoint: Checkpoint) -> str:
    """The model of the hub whose configuration diffusers takes for this file."""
    import torch
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    with torch.device("meta"):
        shapes = {name: torch.empty(shape) for name, shape in checkpoint.shapes.items()}
    try:
        return fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
    except (KeyError, UnboundLocalError) as error:
        raise ValueError(
            f"{checkpoint.file} is a {checkpoint.kind} of a size that diffusers does not know: give --base_config "
            "FOLDER with its configuration."
        ) from error


def _index_of(checkpoint: Checkpoint, config: Path) -> dict[str, Any]:
    file = config / "model_index.json"
    if not file.is_file():
        raise ValueError(f"{config} is no configuration of a base: there is no model_index.json in it.")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}.") from error
    if not isinstance(index, dict) or not (config / "scheduler" / "scheduler_config.json").is_file():
        raise ValueError(f"{config} is no configuration of a base: it needs model_index.json and a scheduler.")
    name = str(index.get("_class_name")).replace("APT", "")
    if name not in PIPELINES[checkpoint.kind]:
        raise ValueError(f"{checkpoint.file} is a {checkpoint.kind}, but {config} is the configuration of a {name}.")
    return index


def _absent_parts(checkpoint: Checkpoint, config: Path, index: dict[str, Any]) -> set[str]:
    """Models that the file lacks, which the configuration's folder has then."""
    models = {name for name in index if name in ("vae", "unet", "transformer") or name.startswith("text_encoder")}
    absent = {name for name in models - checkpoint.parts if index[name][0] is not None}
    missing = sorted(part for part in absent if not _has_weights(config / part))
    if checkpoint.kind == STABLE_DIFFUSION_3 and missing == ["text_encoder_3"]:  # which may be left out
        index.update({name: [None, None] for name in ("text_encoder_3", "tokenizer_3") if name in index})
        logger.warning("%s has no T5, nor has its configuration: the model is used without it.", checkpoint.file)
        return absent - {"text_encoder_3"}
    if missing:
        raise ValueError(
            f"{checkpoint.file} has no {' and no '.join(missing)}, and {config} has no weights for it: give "
            "--base_config FOLDER with a whole model of this family."
        )
    return absent


def _has_weights(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix == ".safetensors" for path in folder.iterdir())


def marks_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Settings of the scheduler that the file itself states."""
    stated = checkpoint.metadata.get("modelspec.prediction_type", "")
    if VELOCITY in checkpoint.shapes or stated in ("v", "v_prediction"):
        zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return {"prediction_type": "v_prediction"} | (zero if ZERO_SNR in checkpoint.shapes else {})
    return {"prediction_type": "epsilon"} if stated == "epsilon" else {}


def _cache() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME).expanduser() / "apt_diffusion" / "bases"


def _digest(file: Path, config: Path) -> str:
    """Of what decides the result: the file, by size, age and its ends, and the configuration."""
    import diffusers

    state = file.stat()
    digest = hashlib.sha256(f"{state.st_size} {state.st_mtime_ns} {diffusers.__version__}".encode())
    with file.open("rb") as content:
        digest.update(content.read(2**20))
        content.seek(max(0, state.st_size - 2**20))
        digest.update(content.read(2**20))
    for path in sorted(config.rglob("*")):
        if path.is_file():
            small = path.stat().st_size < 2**24 and path.suffix != ".safetensors"
            digest.update(f"{path.relative_to(config)} {path.stat().st_size}".encode())
            digest.update(path.read_bytes() if small else b"")
    return digest.hexdigest()[:16]


def _convert(checkpoint: Checkpoint, config: Path, index: dict[str, Any], absent: set[str], folder: Path) -> None:
    """Writes the parts of the file in diffusers' layout, whole or not at all; the rest are links to `config`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed, free = checkpoint.file.stat().st_size, shutil.disk_usage(folder.parent).free
    if free < 1.05 * needed:
        raise OSError(
            f"No space for {checkpoint.file} in diffusers' layout: {folder.parent} needs {needed / 2**30:.2f} GiB, "
            f"{free / 2**30:.2f} GiB are free. The variable HF_HOME names another disk."
        )
    logger.warning(
        "%s is a %s in one file: converting it once to diffusers' layout, %.2f GiB in %s.",
        checkpoint.file.name, checkpoint.kind, needed / 2**30, folder.parent,
    )  # fmt: skip
    index = {name: value for name, value in index.items() if name not in LEFT_OUT}
    own = sorted(checkpoint.parts & index.keys())
    try:
        with new_folder(folder) as temporary:
            for part, model in _read_parts(checkpoint, config, index, own).items():
                model.save_pretrained(temporary / part)
            for name, value in index.items():
                if isinstance(value, list) and name not in own and (config / name).is_dir():
                    shutil.copytree(config / name, temporary / name, copy_function=_link)
            _state_marks(checkpoint, temporary / "scheduler" / "scheduler_config.json")
            write_text(temporary / "model_index.json", json.dumps(index, indent=2))
    except OSError:
        if not folder.is_dir():  # another process was faster
            raise


def _read_parts(checkpoint: Checkpoint, config: Path, index: dict[str, Any], own: list[str]) -> dict[str, Any]:
    """The models that the file has, by diffusers' own conversion; `ValueError` where they do not fit the settings."""
    import diffusers
    import torch

    others = {name: None for name, value in index.items() if isinstance(value, list) and name not in own}
    pipeline_class: Any = getattr(diffusers, str(index["_class_name"]).replace("APT", ""))
    if checkpoint.kind in (STABLE_DIFFUSION, STABLE_DIFFUSION_2):
        others |= dict.fromkeys(LEFT_OUT) | {"requires_safety_checker": False}
    try:
        pipeline = pipeline_class.from_single_file(
            str(checkpoint.file), config=str(config), dtype=getattr(torch, checkpoint.dtype), **others
        )
    except (ValueError, KeyError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        reason = "weights of its models are not in the file" if "meta tensor" in reason else reason
        raise ValueError(_does_not_fit(checkpoint, config, reason)) from error
    parts = {name: getattr(pipeline, name) for name in own}
    for name, model in parts.items():
        empty = [key for key, value in model.state_dict().items() if value.is_meta]
        if empty:
            raise ValueError(_does_not_fit(checkpoint, config, f"the file has no {name}.{empty[0]}"))
    return parts


def _does_not_fit(checkpoint: Checkpoint, config: Path, reason: str) -> str:
    return f"{checkpoint.file} does not fit the configuration of {config} ({reason}): give that of its own model."


def _state_marks(checkpoint: Checkpoint, file: Path) -> None:
    settings = json.loads(file.read_text(encoding="utf-8"))
    if set(EDM) & checkpoint.shapes.keys() and not settings["_class_name"].startswith("EDM"):
        raise ValueError(
            f"{checkpoint.file} is an EDM model, but its configuration has a {settings['_class_name']}: give "
            "--base_config FOLDER whose scheduler is EDM's."
        )
    marks = marks_of(checkpoint)
    if marks.items() - settings.items():
        file.unlink()  # it may be a link
        write_text(file, json.dumps(settings | marks, indent=2))
    logger.warning("By its configuration the model predicts %r.", (settings | marks).get("prediction_type", "flow"))


def _link(source: str, target: str) -> None:
    """A second name of the same file, which costs no space; a copy on another disk."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
