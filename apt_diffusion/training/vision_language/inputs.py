"""From examples to the inputs of ViLT and METER, with METER's encoder outputs computed once where that is wanted."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ...data.image_text import Example, ModelInputs
from ...data.processors import load_processor
from ...data.reading import read_picture
from ...data.text_length import warn_of_cut_texts
from ..session import Session
from .models import BaseModel


def make_inputs(
    session: Session,
    base: BaseModel,
    model: PreTrainedModel,
    labels: Callable[[list[Any]], Tensor],
    parts: Sequence[Sequence[Example]],
) -> ModelInputs:
    """The collate function of the run. Texts that will be cut are named; encoder outputs to be kept are computed.

    Args:
        session: with the flags.
        base: whose processor it is.
        model: with its method.
        labels: targets of a batch to the model's `labels`.
        parts: all examples that will be seen, those of training and of evaluations.

    Raises:
        ValueError: for a cache where there is nothing to cache, or pictures that are no files.
        OSError: where the disk has no room.
    """
    args = session.args
    processor = load_processor(base.model_type, base.path, args.image_size, revision=base.revision)
    inputs = ModelInputs(processor, args.max_text_length, labels)
    texts = list(dict.fromkeys(example.text for example in itertools.chain(*parts)))
    if session.is_main:
        warn_of_cut_texts([(repr(text), text) for text in texts], processor.tokenizer, args.max_text_length)
    if args.cache_encoder_outputs:
        pictures = dict.fromkeys(picture for example in itertools.chain(*parts) for picture in example.pictures)
        inputs.cache = _fill_cache(session, model, inputs, list(pictures), texts)
    return inputs


def _fill_cache(
    session: Session, model: PreTrainedModel, inputs: ModelInputs, pictures: list[Any], texts: list[str]
) -> Any:
    """METER's `EncoderCache` with the outputs for all of these; the processes share the work."""
    from ...models.meter.encoder_cache import EncoderCache

    args, accelerator, processor = session.args, session.accelerator, inputs.processor
    if any(not isinstance(picture, Path) for picture in pictures):
        raise ValueError("--cache_encoder_outputs needs pictures in files; those of a hub data set are not.")
    model.to(accelerator.device)
    cache = EncoderCache(model, args.cache_encoder_outputs, processor.image_processor)
    share = (accelerator.process_index, accelerator.num_processes)
    cache.fill_images(model, pictures, args.eval_batch_size, args.dataloader_num_workers, read_picture, share)
    ids = processor.tokenizer(texts, truncation=True, max_length=args.max_text_length)["input_ids"]
    cache.fill_texts(model, ids, args.eval_batch_size, share)
    accelerator.wait_for_everyone()
    return cache
