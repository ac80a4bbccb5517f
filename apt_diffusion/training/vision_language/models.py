"""ViLT and METER for a task, and what turns examples into their inputs."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, ViltModel

from ...data.image_text import Example, ModelInputs
from ...data.processors import load_processor
from ...data.reading import read_picture
from ...models.meter import MeterModel
from ...models.retrieval import load_matching_head, start_from_matching_head
from ...models.vilt import add_classifier_token
from .trainer import Run


def load_model(run: Run, model_class: type[PreTrainedModel], **settings: Any) -> PreTrainedModel:
    """The pre-trained model with a head for the task, new where its file has none, or one for other labels.

    Args:
        run: says which model, and its dropout.
        model_class: with the head.
        settings: of the model's config.

    Raises:
        ValueError: where the weights do not fit the model, but for the head and the table of modalities.
    """
    torch.manual_seed(run.seed)  # new heads follow from the seed
    settings |= {"hidden_dropout_prob": run.args.hidden_dropout_prob}
    if run.model_type == "vilt":
        settings["max_image_length"] = -1  # all patches of a picture, as in the released fine-tuning code
    if run.args.use_classifier_token is not None and run.model_type == "meter":
        settings["use_classifier_token"] = run.args.use_classifier_token
    model, report = model_class.from_pretrained(
        run.model_path,
        revision=run.args.revision,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **settings,
    )
    other_size = {key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]}
    tables = {key for key in other_size if key.endswith("token_type_embeddings.weight")}
    wrong = sorted(key for key in other_size - tables if not key.startswith("classifier."))
    if wrong:
        raise ValueError(f"{run.args.model_name_or_path} does not fit {model_class.__name__}: {wrong[:3]}.")
    if tables:
        _take_over_modalities(run, model)
    if any(key.endswith("classifier_token") for key in report["missing_keys"]):
        _start_classifier_token(model.base_model)
    if run.args.use_classifier_token and run.model_type == "vilt":
        tokenizer = AutoTokenizer.from_pretrained(run.model_path, revision=run.args.revision)
        add_classifier_token(model, tokenizer.cls_token_id)
    if any(key.startswith("rank_output.") for key in report["missing_keys"]):
        _start_ranking(run, model)
    return model


def _start_ranking(run: Run, model: PreTrainedModel) -> None:
    head = load_matching_head(run.model_path, revision=run.args.revision)
    if head is None:
        run.logger.warning("%s has neither a ranking head nor a matching one: it starts anew.", run.model_path)
    else:
        start_from_matching_head(model, head)


@torch.no_grad()
def _take_over_modalities(run: Run, model: PreTrainedModel) -> None:
    """Text and image keep their rows; a second image starts as the first, as in the released code."""
    kind = ViltModel if run.model_type == "vilt" else MeterModel
    before = _modalities(kind.from_pretrained(run.model_path, revision=run.args.revision, dtype=torch.float32)).weight
    after = _modalities(model.base_model).weight
    rows = [min(row, len(before) - 1) for row in range(len(after))]
    after.copy_(before[rows])


def _modalities(base: nn.Module) -> nn.Embedding:
    return base.embeddings.token_type_embeddings if hasattr(base, "embeddings") else base.token_type_embeddings


@torch.no_grad()
def _start_classifier_token(meter: MeterModel) -> None:
    """From RoBERTa's embedding of a text's first token, as in the released code, where the widths are the same."""
    if meter.config.text_config.hidden_size != meter.config.hidden_size:
        return
    meter.text_model.eval()
    first = torch.tensor([[meter.config.text_config.bos_token_id]])
    assert meter.classifier_token is not None  # METER's models have one
    meter.classifier_token.copy_(meter.text_model.embeddings(first))


def make_inputs(
    run: Run, model: PreTrainedModel, labels: Callable[[list[Any]], Tensor], parts: Sequence[Sequence[Example]]
) -> ModelInputs:
    """What collates examples. Where the flags ask for it, METER's encoders are run on all of them first.

    Args:
        run: with its flags.
        model: with its method.
        labels: targets of a batch to the model's `labels`.
        parts: all examples that will be seen, those of training and of evaluations.

    Raises:
        ValueError: for a cache where there is nothing to cache, or pictures that are no files.
        OSError: where the disk has no room.
    """
    args, accelerator = run.args, run.accelerator
    processor = load_processor(run.model_type, run.model_path, args.image_size, revision=args.revision)
    inputs = ModelInputs(processor, args.max_text_length, labels)
    if not args.cache_encoder_outputs:
        return inputs
    from ...models.meter.encoder_cache import EncoderCache

    examples = list(itertools.chain(*parts))
    pictures = list(dict.fromkeys(picture for example in examples for picture in example.pictures))
    texts = inputs.processor.tokenizer(
        list(dict.fromkeys(example.text for example in examples)), truncation=True, max_length=args.max_text_length
    )["input_ids"]
    if any(not isinstance(picture, Path) for picture in pictures):
        raise ValueError("--cache_encoder_outputs needs pictures in files; those of a hub data set are not.")
    model.to(accelerator.device)
    cache = EncoderCache(model, args.cache_encoder_outputs, processor.image_processor)
    share = (accelerator.process_index, accelerator.num_processes)
    cache.fill_images(model, pictures, args.eval_batch_size, args.dataloader_num_workers, read_picture, share)
    cache.fill_texts(model, texts, args.eval_batch_size, share)
    accelerator.wait_for_everyone()
    inputs.cache = cache
    return inputs
