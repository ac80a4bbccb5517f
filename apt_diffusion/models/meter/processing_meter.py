"""Pictures and words as METER reads them."""

from typing import Any

from transformers.processing_utils import ProcessorMixin


class MeterProcessor(ProcessorMixin):
    """CLIP's image processor (shorter side to S, bicubic, S × S from the middle) and RoBERTa's tokenizer, as one.

    With PIL alone: `MeterProcessor(CLIPImageProcessorPil(size={"shortest_edge": 384}, crop_size=384), tokenizer)`.
    """

    attributes = ("image_processor", "tokenizer")

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)
