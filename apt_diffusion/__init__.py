"""Approximated Prompt Tuning for diffusion and vision-language models.

Names are imported when they are first used: `import apt_diffusion` loads neither torch nor diffusers nor transformers.
"""

import importlib
from typing import Any

from .version import __version__

_MODULES = {
    "config": ["APTConfig"],
    "equation": ["ApproximatedPrompt"],
    "processor": ["APTAttnProcessor", "APTProcessorCore"],
    "attach": [
        "add_apt",
        "delete_apt_adapters",
        "disable_apt",
        "enable_apt",
        "freeze_base",
        "get_active_apt_adapters",
        "get_list_apt_adapters",
        "prepared_apt",
        "remove_apt",
        "set_apt_adapters",
        "set_apt_scale",
    ],
    "baselines": ["register_method"],
    "io.weights": ["enable_apt_hotswap", "load_apt_weights", "save_apt_weights"],
    "serving.store": ["AdapterStore"],
    "pipelines.mixin": ["APTLoaderMixin"],
    "models.meter": [
        "MeterConfig",
        "MeterForImageAndTextRetrieval",
        "MeterForImagesAndTextClassification",
        "MeterForQuestionAnswering",
        "MeterModel",
        "MeterProcessor",
    ],
    "pipelines.stable_diffusion_apt": ["StableDiffusionAPTPipeline"],
    "pipelines.stable_diffusion_apt_img2img": ["StableDiffusionAPTImg2ImgPipeline"],
    "pipelines.stable_diffusion_apt_inpaint": ["StableDiffusionAPTInpaintPipeline"],
    "pipelines.stable_diffusion_xl_apt": ["StableDiffusionXLAPTPipeline"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
