"""The pre-trained ViLT, METER or CLIP of a run, with a head for the task."""

import argparse
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, ViltModel
from transformers.utils import logging as logging_of_transformers

import apt_diffusion.models.meter.configuration_meter  # noqa: F401 (makes its type known to AutoConfig)

from ...baselines import find_method_file
from ...miniature import MODELS, resolve_model
from ...models.meter import MeterModel
from ...models.retrieval import load_matching_head, start_from_matching_head
from ...models.vilt import add_classifier_token, use_text_epsilon
from ..methods import tensor_shapes

logger = logging.getLogger(__name__)


class Defaults(Protocol):
    """A recipe: it fills in what the command line left open."""

    def fill_in(self, args: argparse.Namespace, num_processes: int, config: PreTrainedConfig) -> None:
        """Sets the flags that are `None`; `ValueError` for one that is not for this model."""


@dataclass(frozen=True)
class BaseModel:
    """Where the pre-trained model is, and what it is; its weights are not loaded yet."""

    name: str  # as the user wrote it
    path: str  # of a folder, or a hub id
    revision: str | None
    config: PreTrainedConfig

    @property
    def model_type(self) -> str:
        """`"vilt"`, `"meter"` or `"clip"`."""
        return self.config.model_type


def find_base(args: argparse.Namespace, recipes: dict[str, Any], num_processes: int) -> BaseModel:
    """The model of `--model_name_or_path`, with the flags that depend on it filled in from its recipe.

    Args:
        args: the script's.
        recipes: `Defaults` by type of model; `miniature` is for the embedded ones, where their type's is not.
        num_processes: that share a batch.

    Raises:
        ValueError: for a model of another type, or a flag that is not for this model.
        OSError: for a model that is not there.
    """
    path = resolve_model(args.model_name_or_path)
    config = AutoConfig.from_pretrained(path, revision=args.revision)
    if config.model_type not in recipes:
        known = " or ".join(kind.upper() for kind in recipes if kind != "miniature")
        raise ValueError(f"{args.model_name_or_path} is a {config.model_type!r} model: this script trains {known}.")
    embedded = args.model_name_or_path in MODELS and "miniature" in recipes
    recipe: Defaults = recipes["miniature" if embedded else config.model_type]
    recipe.fill_in(args, num_processes, config)
    return BaseModel(args.model_name_or_path, path, args.revision, config)


def load_model(
    args: argparse.Namespace, base: BaseModel, seed: int, model_class: type[PreTrainedModel], **settings: Any
) -> PreTrainedModel:
    """The pre-trained model with a head for the task, new where its file has none, or one for other labels.

    Args:
        args: says its dropout, and whether it has a classifier token.
        base: the model.
        seed: new heads follow from it.
        model_class: with the head.
        settings: of the model's config.

    Raises:
        ValueError: where the weights do not fit the model, but for the head and the table of modalities.
    """
    torch.manual_seed(seed)
    settings |= {"hidden_dropout_prob": args.hidden_dropout_prob}
    if base.model_type == "vilt":
        settings["max_image_length"] = -1  # all patches of a picture, as in the released fine-tuning code
    else:
        settings["attention_probs_dropout_prob"] = args.hidden_dropout_prob  # the official drop_rate sets both
        if args.use_classifier_token is not None:
            settings["use_classifier_token"] = args.use_classifier_token
    with _without_load_report():
        model, report = model_class.from_pretrained(
            base.path,
            revision=base.revision,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **settings,
        )
    other_size = {key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]}
    tables = {key for key in other_size if key.endswith("token_type_embeddings.weight")}
    wrong = sorted(key for key in other_size - tables if not key.startswith("classifier."))
    if wrong:
        raise ValueError(f"{base.name} does not fit {model_class.__name__}: {wrong[:3]}.")
    heads = sorted({key.split(".")[0] for key in {*other_size - tables, *report["missing_keys"]}} - {base.model_type})
    if heads:
        logger.info("Not in the base model, so it starts anew: %s.", ", ".join(heads))
    if tables:
        _take_over_modalities(base, model)
    if any(key.endswith("classifier_token") for key in report["missing_keys"]):
        _start_classifier_token(model.base_model)
    if base.model_type == "vilt":
        _finish_vilt(args, base, model)
    if any(key.startswith("rank_output.") for key in report["missing_keys"]):
        _start_ranking(base, model)
    return model


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers lists every weight of a new head as missing; `load_model` checks the same keys itself."""
    before = logging_of_transformers.get_verbosity()
    logging_of_transformers.set_verbosity_error()
    try:
        yield
    finally:
        logging_of_transformers.set_verbosity(before)


def take_over_classifier_token(args: argparse.Namespace, source: Any) -> None:
    """Where the flag is not set, the model gets a classifier token if the adapter that is loaded was trained with one.

    Args:
        args: whose `use_classifier_token` is filled in.
        source: of the adapter, as for `find_method_file`; or `None`.
    """
    if source is not None and args.use_classifier_token is None:
        has_one = any(name.endswith("classifier_token") for name in tensor_shapes(find_method_file(source)))
        args.use_classifier_token = True if has_one else None


def _finish_vilt(args: argparse.Namespace, base: BaseModel, model: PreTrainedModel) -> None:
    """Settings of ViLT that transformers does not read from its config."""
    text_epsilon = getattr(base.config, "text_layer_norm_eps", None)  # written by the conversion
    if text_epsilon is not None:
        use_text_epsilon(model, text_epsilon)
    if args.use_classifier_token:
        tokenizer = AutoTokenizer.from_pretrained(base.path, revision=base.revision)
        add_classifier_token(model, tokenizer.cls_token_id)


def _start_ranking(base: BaseModel, model: PreTrainedModel) -> None:
    head = load_matching_head(base.path, revision=base.revision)
    if head is None:
        logger.warning("%s has neither a ranking head nor a matching one: it starts anew.", base.name)
    else:
        start_from_matching_head(model, head)


@torch.no_grad()
def _take_over_modalities(base: BaseModel, model: PreTrainedModel) -> None:
    """Text and image keep their rows; a second image starts as the first, as in the released code."""
    kind = ViltModel if base.model_type == "vilt" else MeterModel
    before = _modalities(kind.from_pretrained(base.path, revision=base.revision, dtype=torch.float32)).weight
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
