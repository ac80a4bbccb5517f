"""METER (arXiv 2111.02387), clip16 + roberta: a vision-language model in the style of transformers' own."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_meter import MeterConfig
    from .modeling_meter import (
        MeterForImageAndTextRetrieval,
        MeterForImagesAndTextClassification,
        MeterForQuestionAnswering,
        MeterModel,
        MeterPreTrainedModel,
    )
    from .processing_meter import MeterProcessor

_HOMES = {
    "configuration_meter": ["MeterConfig"],
    "modeling_meter": [
        "MeterForImageAndTextRetrieval",
        "MeterForImagesAndTextClassification",
        "MeterForQuestionAnswering",
        "MeterModel",
        "MeterPreTrainedModel",
    ],
    "processing_meter": ["MeterProcessor"],
}
__all__ = [
    "MeterConfig",
    "MeterForImageAndTextRetrieval",
    "MeterForImagesAndTextClassification",
    "MeterForQuestionAnswering",
    "MeterModel",
    "MeterPreTrainedModel",
    "MeterProcessor",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
