"""The nodes: load an adapter, read its card, let its strength follow the steps.

Nothing of ComfyUI is imported before a node is used, so that this folder can be read and tested without it.
"""

import json
from pathlib import Path
from typing import Any

import torch

from .adapters import CONTEXT, QUERY, TEXT_ENCODERS, Component, read_components
from .embedded import LoadEmbeddedModel
from .patches import CorrectedForward, Correction, CorrectOutput, KeepInput, Site, Strength

CATEGORY = "loaders/APT"
FOLDER = "apt"  # models/apt: adapters as the trainer writes them, in folders or as single files


def _folder_paths() -> Any:
    import folder_paths

    if FOLDER not in folder_paths.folder_names_and_paths:
        folder_paths.folder_names_and_paths[FOLDER] = ([str(Path(folder_paths.models_dir) / FOLDER)], {".safetensors"})
    return folder_paths


def _adapter_names() -> list[str]:
    """The adapters in the folder; a trainer's output also has checkpoints, with files of another kind beside them."""
    from apt_diffusion.training.checkpoints import OPTIMIZER_NAME, TRAINED_NAME

    try:
        names = _folder_paths().get_filename_list(FOLDER)
    except FileNotFoundError:  # no folder yet
        return []
    return [name for name in names if Path(name).name not in (OPTIMIZER_NAME, TRAINED_NAME)]


def _path_of(name: str) -> Path:
    path = _folder_paths().get_full_path(FOLDER, name)
    if path is None:
        raise ValueError(
            f"There is no adapter {name!r} in models/{FOLDER}: copy the trainer's folder there, and refresh."
        )
    return Path(path)


class LoadAPTAdapter:
    """Puts an adapter on a model and its CLIP; several of these nodes in a row add up."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node shows."""
        strength = ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01})
        return {
            "required": {
                "model": ("MODEL",), "adapter": (_adapter_names(),), "strength_model": strength,
                "strength_clip": strength,
            },
            "optional": {"clip": ("CLIP",), "schedule": ("APT_SCHEDULE",)},
        }  # fmt: skip

    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "load"
    CATEGORY = CATEGORY

    def load(
        self,
        model: Any,
        adapter: str,
        strength_model: float,
        strength_clip: float,
        clip: Any = None,
        schedule: list[tuple[float, float, float]] | None = None,
    ) -> tuple[Any, Any]:
        """Clones of `model` and `clip` with the adapter; what came in stays as it is.

        Raises:
            ValueError: for a file that is no adapter, or was made for another base.
        """
        file, components = read_components(_path_of(adapter))
        text = {part: components[part] for part in components if part in TEXT_ENCODERS}
        if text and clip is None and strength_clip != 0:
            raise ValueError(f"{adapter} adapts the text encoder, too: connect clip, or set strength_clip to 0.")
        try:
            patched = model.clone()
            if "unet" in components:
                sigmas = None if schedule is None else _to_sigmas(model, schedule)
                patch_unet(patched, components["unet"], Strength(strength_model, sigmas))
            if clip is not None:
                clip = patch_clip(clip, text, strength_clip)
        except KeyError as error:
            raise ValueError(
                f"{adapter} does not fit this model: there is no {error.args[0]}. {file.made_for}"
            ) from error
        return patched, clip


def _to_sigmas(model: Any, schedule: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    sampling = model.get_model_object("model_sampling")
    return [
        (sampling.percent_to_sigma(start), sampling.percent_to_sigma(end), factor) for start, end, factor in schedule
    ]


def patch_unet(model: Any, component: Component, strength: Strength) -> None:
    """Adds the patches of an adapter to a model patcher.

    Raises:
        KeyError: naming an attention that the UNet has not, or has in another width.
    """
    from comfy.utils import unet_to_diffusers

    names = unet_to_diffusers(model.model.model_config.unet_config)
    unet = model.model.diffusion_model
    corrections: dict[tuple[str, str], dict[Site, Correction]] = {}
    for (name, child), adapter in component.modules.items():
        key, attention_name = names.get(f"{name}.to_q.weight"), name.rpartition(".")[2]
        if key is None or child not in (QUERY, CONTEXT):
            raise KeyError(f"{name} whose {child} could be corrected")
        attention = unet.get_submodule(key.removesuffix(".to_q.weight"))
        width = (attention.to_q if child == QUERY else attention.to_k).in_features
        if adapter.prompts.shape[1] != width:
            raise KeyError(f"{name} of width {adapter.prompts.shape[1]} (it has {width})")
        site = _site_of(key)
        corrections.setdefault((attention_name, child), {})[site] = Correction(adapter, component.config.query_source)
    for kind in ("attn1", "attn2"):
        query, context = (corrections.get((kind, child), {}) for child in (QUERY, CONTEXT))
        if query or context:
            model.set_model_patch(KeepInput(context, strength), f"{kind}_patch")
            model.set_model_patch(CorrectOutput(query, strength), f"{kind}_output_patch")


def _site_of(key: str) -> Site:
    kind, number, *_ = key.split(
        "."
    )  # input_blocks.4.1.transformer_blocks.0..., middle_block.1.transformer_blocks.0...
    transformer = int(key.split(".transformer_blocks.")[1].split(".")[0])
    return kind.partition("_")[0], 0 if kind == "middle_block" else int(number), transformer


def patch_clip(clip: Any, components: dict[str, Component], weight: float) -> Any:
    """A clone of `clip` with the adapters of its text encoders.

    Raises:
        KeyError: naming a layer that the text encoder has not, or has in another width.
    """
    clip = clip.clone()
    for part, component in components.items():
        for (name, _), adapter in component.modules.items():
            path = _attention_path(clip.cond_stage_model, TEXT_ENCODERS[part], name)
            attention = clip.cond_stage_model.get_submodule(path)
            if attention.q_proj.in_features != adapter.prompts.shape[1]:
                raise KeyError(f"{name} of width {adapter.prompts.shape[1]} (it has {attention.q_proj.in_features})")
            forward = clip.patcher.get_model_object(f"{path}.forward")
            known = forward.corrections if isinstance(forward, CorrectedForward) else []
            original = forward.original if isinstance(forward, CorrectedForward) else forward
            added = [(Correction(adapter, component.config.query_source), weight)] if weight else []
            clip.patcher.add_object_patch(f"{path}.forward", CorrectedForward(original, [*known, *added]))
    return clip


def _attention_path(text_model: Any, encoder: str, name: str) -> str:
    path = f"{encoder}.transformer.text_model.{name}"
    try:
        text_model.get_submodule(path)
    except AttributeError as error:
        raise KeyError(f"{name} in the text encoder {encoder}") from error
    return path


class APTStrengthSchedule:
    """Lets an adapter act in a range of the steps; several in a row are several ranges, and it rests outside them."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node shows."""
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "start_percent": ("FLOAT", {"default": 0.0, **percent}),
                "end_percent": ("FLOAT", {"default": 1.0, **percent}),
                "strength": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01}),
            },
            "optional": {"schedule": ("APT_SCHEDULE",)},
        }

    RETURN_TYPES = ("APT_SCHEDULE",)
    FUNCTION = "add"
    CATEGORY = CATEGORY

    def add(
        self,
        start_percent: float,
        end_percent: float,
        strength: float,
        schedule: list[tuple[float, float, float]] | None = None,
    ) -> tuple[list[tuple[float, float, float]]]:
        """The ranges with one more; `ValueError` for one that is empty."""
        if not start_percent < end_percent:
            raise ValueError(f"The range {start_percent} to {end_percent} is empty: start_percent must be smaller.")
        return ([*(schedule or []), (start_percent, end_percent, strength)],)


class APTAdapterInfo:
    """The card of an adapter: trigger words, base model, settings, the trainer's samples."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node shows."""
        return {"required": {"adapter": (_adapter_names(),)}}

    RETURN_TYPES = ("STRING", "STRING", "IMAGE")
    RETURN_NAMES = ("card", "trigger", "samples")
    FUNCTION = "read"
    CATEGORY = CATEGORY
    OUTPUT_NODE = True

    def read(self, adapter: str) -> dict[str, Any]:
        """The card, the instance prompt, and the newest sample grid `(1, h, w, 3)`; grey where there is none."""
        path = _path_of(adapter)
        file, components = read_components(path)
        trigger = file.metadata.get("instance_prompt", "")
        lines = [f"adapter: {adapter}", f"trigger: {trigger or 'unknown'}"]
        lines.append(f"base model: {file.metadata.get('base_model', 'unknown')}")
        for part, component in components.items():
            settings = {name: value for name, value in component.config.to_dict().items() if value is not None}
            lines.append(f"{part}: {len(component.modules)} attentions, {json.dumps(settings, ensure_ascii=False)}")
        grids = sorted((path.parent / "samples").glob("*.png"))
        lines.append(f"samples: {len(grids)}")
        card = "\n".join(lines)
        return {"ui": {"text": [card]}, "result": (card, trigger, _picture(grids[-1]) if grids else _grey())}


def _picture(path: Path) -> torch.Tensor:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)[None]


def _grey() -> torch.Tensor:
    return torch.full((1, 64, 64, 3), 0.5)


NODE_CLASS_MAPPINGS = {
    "LoadAPTAdapter": LoadAPTAdapter,
    "APTAdapterInfo": APTAdapterInfo,
    "APTStrengthSchedule": APTStrengthSchedule,
    "LoadEmbeddedModel": LoadEmbeddedModel,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoadAPTAdapter": "Load APT Adapter",
    "APTAdapterInfo": "APT Adapter Info",
    "APTStrengthSchedule": "APT Strength Schedule",
    "LoadEmbeddedModel": "Load Embedded Model",
}
