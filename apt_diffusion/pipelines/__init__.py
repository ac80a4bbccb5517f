"""diffusers pipelines with APT adapters: `StableDiffusionAPTPipeline`, and one of that kind for every stock class.

The class for a stock `FluxPipeline` is `FluxAPTPipeline`, for a `StableDiffusionXLImg2ImgPipeline` it is
`StableDiffusionXLAPTImg2ImgPipeline`, for a `FluxModularPipeline` `FluxAPTModularPipeline`; each is made when it is
first imported. `apt_pipeline` makes one of any class.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if "APT" in name and name.endswith("Pipeline"):
        import diffusers

        from ..quiet import hide_torchvision_notices
        from .factory import apt_pipeline

        hide_torchvision_notices()
        stock = getattr(diffusers, name.replace("APT", "", 1), None)
        if stock is not None:
            return apt_pipeline(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
