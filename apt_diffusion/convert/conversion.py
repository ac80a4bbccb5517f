"""Converts an official checkpoint to a folder: model, adapter, matching head, processor, and a report of every key."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..api import add_apt
from ..baselines.families import trained_beside
from ..config import APTConfig
from ..io.atomic import new_folder
from ..io.save import save_apt_weights
from ..model import named_cores
from ..models.retrieval import MATCHING_HEAD_NAME
from . import meter, vilt
from .checkpoint import read_checkpoint
from .rules import APT_NAMES, Account, Rule, rename

TASKS = ("base", "mlm", "vqa", "nlvr2", "retrieval")
ACCOUNT_NAME = "conversion.txt"
# The official head of a task: pattern, and name here.
HEADS = {
    "vqa": (r"vqa_classifier\.(\d\.\w+)", r"classifier.\1"),
    "nlvr2": (r"nlvr2_classifier\.(\d\.\w+)", r"classifier.\1"),
    "retrieval": (r"rank_output\.(\w+)", r"rank_output.\1"),
}


@dataclass
class Converted:
    """A model of transformers' kind with the checkpoint's weights, and the rest of the checkpoint."""

    model: nn.Module
    task: str
    account: Account
    adapter: dict[str, dict[str, Tensor]]  # of each attention module, where the checkpoint has APT
    classifier_token: Tensor | None  # of ViLT, whose classes have no place for it
    matching_head: dict[str, Tensor]


def convert(
    checkpoint: str | Path,
    output: str | Path | None = None,
    task: str | None = None,
    image_size: int | None = None,
    tokenizer: str | None = None,
) -> Account:
    """Converts a file of the official METER, ViLT or APT code into a folder that `from_pretrained` loads.

    Args:
        checkpoint: a Lightning checkpoint.
        output: a new folder, with `pytorch_apt_weights.safetensors` where the checkpoint has APT and
            `matching_head.safetensors` where it has the head of image-text matching; `None` writes nothing.
        task: one of `TASKS`; that of the checkpoint's head, or `base`, if `None`.
        image_size: METER's image size, to which its image positions are resized; the checkpoint's if `None`. ViLT
            resizes its own for every picture.
        tokenizer: a folder or hub repository (`roberta-base`, `bert-base-uncased`), to write a processor too.

    Returns:
        The fate of each key.

    Raises:
        FileNotFoundError: where there is no such checkpoint.
        FileExistsError: where the output exists.
        ValueError: for a file that cannot be read safely, keys that are not known or do not fit together, a task that
            the checkpoint has no head for, or an image size that makes no sense.
        OSError: where the disk is full, or the tokenizer cannot be found.
    """
    if output is not None and Path(output).exists():
        raise FileExistsError(f"{output} exists: choose a new folder.")
    processor = None
    state = read_checkpoint(checkpoint)
    if tokenizer is not None:  # before the work, for it may fail
        processor = _make_processor(state, tokenizer, image_size)
    converted = convert_state(state, task, image_size)
    if output is not None:
        _write(converted, Path(output), Path(checkpoint).name, processor)
    return converted.account


def convert_state(state: dict[str, Tensor], task: str | None = None, image_size: int | None = None) -> Converted:
    """`convert` in memory: from the official tensors to a model."""
    model_type, account = _model_type(state), Account()
    task = _task(state, model_type, task)
    renamed = rename(state, _rules(model_type, task), account)
    official_adapter = {key: renamed.pop(key) for key in list(renamed) if ".apt." in key}
    matching_head = {
        name: renamed.pop(key) for name in ("weight", "bias") if (key := f"matching_head.{name}") in renamed
    }
    if task == "retrieval" and "rank_output.weight" not in renamed:
        for name, tensor in matching_head.items():
            renamed[f"rank_output.{name}"] = tensor[1:].clone()
            account.made.append((f"rank_output.{name}", "row 1 (they match) of itm_score.fc"))
    settings = meter.settings(state, image_size) if model_type == "meter" else vilt.settings(state)
    settings |= {"modality_type_vocab_size": len(state["token_type_embeddings.weight"])}
    if task in ("vqa", "nlvr2"):
        settings["num_labels"] = len(renamed["classifier.3.weight"])
    if model_type == "meter":
        _resize_image_positions(renamed, settings["vision_config"], account)
    token = renamed.pop("embeddings.text_embeddings.classifier_token", None)
    if token is not None and not official_adapter:
        raise ValueError(
            "The checkpoint has token4classifier but no APT: it is of one of the compared methods, which are not "
            "converted (transformers' ViLT has no place for this token)."
        )
    model = _build(model_type, task, settings)
    prefix = "" if task == "base" else f"{model_type}."
    heads = ("classifier.", "rank_output.", "mlm_score.")
    _fill(model, {key if key.startswith(heads) else prefix + key: tensor for key, tensor in renamed.items()})
    return Converted(model, task, account, _adapter(official_adapter, prefix), token, matching_head)


def attach_adapter(converted: Converted) -> None:
    """Attaches the checkpoint's APT to the converted model, with the heads that the official code trains with it.

    Raises:
        ValueError: where its parts do not fit the model.
    """
    model, adapter = converted.model, converted.adapter
    if converted.classifier_token is not None:
        from ..models.vilt import add_classifier_token

        with torch.no_grad():
            add_classifier_token(model, cls_token_id=0).copy_(converted.classifier_token)
    first = next(iter(adapter.values()))
    missing = sorted(set(APT_NAMES.values()) - first.keys())
    if missing:
        raise ValueError(f"The checkpoint's APT is not whole: it lacks {missing}.")
    num_prompts, rank = len(first["prompts"]), len(first["low_rank_down"])
    names = add_apt(model, APTConfig(num_prompts=num_prompts, rank=rank, modules_to_save=trained_beside(model)))
    if set(names) != set(adapter):
        odd = sorted(set(names) ^ set(adapter))[:3]
        raise ValueError(f"The checkpoint's APT sits elsewhere than in {len(names)} attentions of the model: {odd}.")
    for name, core in named_cores(model):
        values = adapter[name.removesuffix(".apt")]
        for key, parameter in core.adapters["default"].named_parameters():
            if key not in values or parameter.shape != values[key].shape:
                found = tuple(values[key].shape) if key in values else "missing"
                raise ValueError(f"{name}.{key} is {found}, and should be {tuple(parameter.shape)}.")
            parameter.data.copy_(values[key])


def _model_type(state: dict[str, Tensor]) -> str:
    for model_type, mark in (("meter", "cross_modal_text_transform.weight"), ("vilt", "transformer.pos_embed")):
        if mark in state:
            return model_type
    some = ", ".join(list(state)[:3])
    raise ValueError(f"This is neither METER nor ViLT as their official code writes them; it holds {some}, ...")


def _task(state: dict[str, Tensor], model_type: str, task: str | None) -> str:
    present = [name for name, (pattern, _) in HEADS.items() if any(re.fullmatch(pattern, key) for key in state)]
    if task is None:
        return present[0] if present else "base"
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}, expected one of {TASKS}.")
    possible = {"base", *present}
    if "itm_score.fc.weight" in state:
        possible.add("retrieval")
    if model_type == "vilt" and "mlm_score.bias" in state:
        possible.add("mlm")
    if task not in possible:
        raise ValueError(
            f"The checkpoint has no head for {task!r}, only for {sorted(possible)}. To fine-tune on another task, "
            "convert it as 'base': the trainers make the head."
        )
    return task


def _rules(model_type: str, task: str) -> tuple[Rule, ...]:
    """The family's rules, and those for heads: kept where they are the task's."""
    heads = [
        Rule(pattern, target if name == task else None, "" if name == task else f"head of another task, {name}")
        for name, (pattern, target) in HEADS.items()
    ]
    masked_words = (
        (Rule(r"mlm_score\.bias", "mlm_score.decoder.bias"), Rule(r"(mlm_score\..*)", r"\1"))
        if task == "mlm"
        else (Rule(r"mlm_score\..*", None, "head of masked words, of pre-training"),)
    )
    others = (
        Rule(r"itm_score\.fc\.(\w+)", r"matching_head.\1", "own file"),
        Rule(r"mpp_score\..*", None, "head of masked patches, of pre-training"),
        Rule(r"snli_classifier\..*", None, "head of SNLI, which no class here has"),
    )
    return (*(meter.RULES if model_type == "meter" else vilt.RULES), *heads, *masked_words, *others)


def _resize_image_positions(renamed: dict[str, Tensor], vision: dict[str, Any], account: Account) -> None:
    key = "vision_model.embeddings.position_embedding.weight"
    if vision["image_size"] % vision["patch_size"] or vision["image_size"] < vision["patch_size"]:
        raise ValueError(f"image_size {vision['image_size']} is no multiple of the patch size {vision['patch_size']}.")
    before = len(renamed[key])
    renamed[key] = meter.resize_positions(renamed[key], vision["image_size"] // vision["patch_size"])
    if len(renamed[key]) != before:
        account.made.append((key, f"{before} positions resized to {len(renamed[key])}, bicubic"))


def _build(model_type: str, task: str, settings: dict[str, Any]) -> nn.Module:
    import transformers

    from ..models import meter as our_meter
    from ..models.vilt import use_text_epsilon

    names = {"vqa": "QuestionAnswering", "nlvr2": "ImagesAndTextClassification", "retrieval": "ImageAndTextRetrieval"}
    kind = {"base": "Model", "mlm": "ForMaskedLM"}.get(task) or f"For{names[task]}"
    if model_type == "meter":
        return getattr(our_meter, f"Meter{kind}")(our_meter.MeterConfig(**settings)).eval()
    settings |= {"tie_word_embeddings": False}  # the official head of masked words has its own table
    config = transformers.ViltConfig(**settings, **({"num_images": 2} if task == "nlvr2" else {}))
    model = getattr(transformers, f"Vilt{kind}")(config).eval()
    use_text_epsilon(model, config.text_layer_norm_eps)
    return model


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """All of the model's weights, no more and no less."""
    own = model.state_dict()
    for what, keys in (("lacks", own.keys() - tensors.keys()), ("holds too much:", tensors.keys() - own.keys())):
        if keys:
            some = ", ".join(sorted(keys)[:3])
            raise ValueError(f"The checkpoint {what} {len(keys)} tensors of {type(model).__name__} ({some}).")
    wrong = [key for key in own if own[key].shape != tensors[key].shape]
    if wrong:
        sizes = f"{tuple(tensors[wrong[0]].shape)}, not {tuple(own[wrong[0]].shape)}"
        raise ValueError(f"The checkpoint does not fit {type(model).__name__}: {wrong[0]} is {sizes}.")
    model.load_state_dict(tensors)


def _adapter(official: dict[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    adapter: dict[str, dict[str, Tensor]] = {}
    for key, tensor in official.items():
        module, _, name = key.partition(".apt.")
        tensor = tensor.flatten() if name == "log_scale" else tensor.reshape(tensor.shape[-2:])
        adapter.setdefault(prefix + module, {})[name] = tensor
    return adapter


def _make_processor(state: dict[str, Tensor], tokenizer: str | Path, image_size: int | None) -> Any:
    from transformers import AutoTokenizer, CLIPImageProcessorPil, ViltImageProcessorPil, ViltProcessor

    from ..data.processors import sizes
    from ..models.meter import MeterProcessor

    model_type = _model_type(state)
    words = AutoTokenizer.from_pretrained(tokenizer)
    size = sizes(model_type, image_size or 384)
    if model_type == "meter":
        return MeterProcessor(CLIPImageProcessorPil(**size), words)
    patch = vilt.settings(state)["patch_size"]
    return ViltProcessor(ViltImageProcessorPil(**size, size_divisor=patch, do_convert_rgb=True), words)


def _write(converted: Converted, output: Path, source: str, processor: Any) -> None:
    """Into a temporary folder, then renamed: the output is whole or not there."""
    from safetensors.torch import save_file

    output.parent.mkdir(parents=True, exist_ok=True)
    needed = 2**20 + sum(tensor.nbytes for tensor in converted.model.state_dict().values())
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise OSError(f"No space for {output}: it needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free.")
    with new_folder(output) as folder:
        converted.model.save_pretrained(folder)
        if converted.matching_head:
            save_file(converted.matching_head, folder / MATCHING_HEAD_NAME, {"format": "pt"})
        if converted.adapter:
            attach_adapter(converted)
            save_apt_weights(converted.model, folder, metadata={"converted_from": source})
        if processor is not None:
            processor.save_pretrained(folder)
        (folder / ACCOUNT_NAME).write_text(
            f"From {source}, official keys and what became of them:\n\n{converted.account}\n"
        )
