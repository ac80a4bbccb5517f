"""Processors of ViLT, METER and CLIP that read pictures with PIL: the same numbers with and without torchvision.

transformers chooses torchvision where it is installed, whose bicubic resize differs from PIL's in the last bits, and
ViLT's image processor refuses gray pictures unless `do_convert_rgb` is set.
"""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPProcessor, ViltImageProcessorPil, ViltProcessor
from transformers.processing_utils import ProcessorMixin

from ..models.meter import MeterProcessor

# Model type: (processor, image processor, the names that files may give it).
_CLIP_NAMES = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_VILT_NAMES = ("ViltImageProcessor", "ViltImageProcessorFast", "ViltImageProcessorPil", "ViltFeatureExtractor")
_CLASSES = {
    "vilt": (ViltProcessor, ViltImageProcessorPil, _VILT_NAMES),
    "meter": (MeterProcessor, CLIPImageProcessorPil, _CLIP_NAMES),
    "clip": (CLIPProcessor, CLIPImageProcessorPil, _CLIP_NAMES),
}


def load_processor(
    model_type: str, name_or_path: str | Path, image_size: int | None = None, **hub: Any
) -> ProcessorMixin:
    """The processor of a folder or hub repository.

    - `vilt`: shorter side to 384, longer to at most 639, both down to a multiple of 32, bicubic, mean and standard
      deviation 0.5; `pixel_mask` says which pixels are picture and which padding.
    - `meter` and `clip`: shorter side to S, bicubic, S × S from the middle, CLIP's mean and standard deviation. Where
      the margins cannot be equal, the crop lies half a pixel left of the middle; torchvision, which the official code
      uses, chooses a side by rounding to even.

    Args:
        model_type: `config.model_type` of the model: `"vilt"`, `"meter"` or `"clip"`.
        name_or_path: where `preprocessor_config.json` or `processor_config.json`, and the tokenizer, are.
        image_size: another S than the file's.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`.

    Raises:
        ValueError: for another model type, or a processor of another kind of model.
        OSError: where there is no such folder, repository or file.
    """
    if model_type not in _CLASSES:
        raise ValueError(f"No processor is known for {model_type!r}, only for {sorted(_CLASSES)}.")
    processor_class, image_processor_class, names = _CLASSES[model_type]
    settings, _ = image_processor_class.get_image_processor_dict(name_or_path, **hub)
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or names[0]
    if kind not in names:
        raise ValueError(f"{name_or_path} holds a {kind}: a {model_type} model needs {names[0]}.")
    changes = {"do_convert_rgb": True} | ({} if image_size is None else sizes(model_type, image_size))
    image_processor = image_processor_class.from_dict(settings, **changes)
    return processor_class(image_processor, AutoTokenizer.from_pretrained(name_or_path, **hub))


def sizes(model_type: str, image_size: int) -> dict[str, Any]:
    """The image processor's settings for pictures of S pixels: the shorter side, and for METER and CLIP the crop."""
    crop = {} if model_type == "vilt" else {"crop_size": {"height": image_size, "width": image_size}}
    return {"size": {"shortest_edge": image_size}, **crop}
