"""Approximated Prompt Tuning for diffusion and vision-language models.

Names are imported when they are first used: `import apt_diffusion` loads neither torch nor diffusers nor transformers.
"""

import importlib
from typing import Any

from .old_names import install
from .version import __version__

_MODULES = {
    "config": ["APTConfig"],
    "equation": ["ApproximatedPrompt"],
    "processor": ["APTAttnProcessor", "APTProcessorCore"],
    "architectures": ["Architecture", "Stream", "register_architecture"],
    "calls": ["apt_call", "prepared_apt"],
    "api": [
        "add_apt",
        "delete_apt_adapters",
        "disable_apt",
        "enable_apt",
        "freeze_base",
        "get_active_apt_adapters",
        "get_list_apt_adapters",
        "remove_apt",
        "set_apt_adapters",
        "set_apt_scale",
        "warn_untrained",
    ],
    "baselines": ["register_method"],
    "io.hotswap": ["enable_apt_hotswap"],
    "io.load": ["load_apt_weights"],
    "io.save": ["save_apt_weights"],
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
    "pipelines.factory": ["apt_pipeline"],
    "pipelines": [
        "Flux2APTPipeline",
        "Flux2KleinAPTPipeline",
        "FluxAPTPipeline",
        "PixArtSigmaAPTPipeline",
        "QwenImageAPTPipeline",
        "SanaAPTPipeline",
        "StableDiffusion3APTPipeline",
        "StableDiffusionAPTImg2ImgPipeline",
        "StableDiffusionAPTInpaintPipeline",
        "StableDiffusionAPTPipeline",
        "StableDiffusionXLAPTPipeline",
        "ZImageAPTPipeline",
    ],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

install(__name__)

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
