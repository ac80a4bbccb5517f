"""What a run of the text-to-image trainer says of itself: in its card, and after ModelSpec in the file's header."""

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ...data.captions import TRIGGER
from ...io.single_file import is_single_file
from ...version import __version__
from ..model_card import base_in_code
from ..session import Session
from .arguments import build_parser
from .data_arguments import dataset_config
from .stable_diffusion import StableDiffusionBase

CARD_SETTINGS = ("num_prompts", "rank", "resolution", "train_batch_size", "max_train_steps", "learning_rate")
USAGE = """
from apt_diffusion import {pipeline}

pipe = {pipeline}.{load}({base_model!r})
pipe.load_apt_weights({place!r})
image = pipe(prompt={prompt!r}).images[0]
"""
MODEL_SPEC_VERSION = "1.0.1"
PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}  # diffusers' name: ModelSpec's


def make_card(
    session: Session,
    base: StableDiffusionBase,
    adapted: Collection[str],
    num_pictures: int,
    samples: Mapping[Path, str],
    contact_sheet: Path | None = None,
) -> dict[str, Any]:
    """What the model card says of this run: see `write_model_card`.

    Args:
        session: of the run.
        base: the base model.
        adapted: the parts with an adapter.
        num_pictures: of the subject.
        samples: the last pictures drawn, with their prompts.
        contact_sheet: the picture of the run's samples.
    """
    args = session.args
    triggers = trigger_prompts(args)
    # The sizes, and whatever differs from the defaults; the file's header has all.
    default = build_parser().get_default
    chosen = {key: value for key, value in vars(args).items() if value != default(key)}
    return {
        "base_model": args.pretrained_model_name_or_path,
        "summary": f"An adapter for {base.family}, trained with Approximated Prompt Tuning (arXiv 2306.15706) on "
        f"{num_pictures} pictures for {session.steps_done} steps. Adapted: {' and '.join(adapted)}.",
        "usage": USAGE.format(
            pipeline=base.pipeline_class.__name__,
            load="from_single_file" if is_single_file(args.pretrained_model_name_or_path) else "from_pretrained",
            base_model=base_in_code(args.pretrained_model_name_or_path),
            place=session.place,
            prompt=args.validation_prompt or triggers[0],
        ),
        "tags": ["text-to-image", "diffusers", base.tag, "apt", "approximated-prompt-tuning"],
        "settings": {key: getattr(args, key) for key in CARD_SETTINGS} | chosen | {"seed": session.seed},
        "triggers": triggers,
        "samples": samples,
        "contact_sheet": contact_sheet,
        "license": args.license,
        "pipeline_tag": "text-to-image",
    }


def trigger_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts that ask for what is taught: that of the command line, or those of the folders of `--dataset_config`."""
    prompts = [(args.instance_prompt, args.trigger_word.strip())]
    if args.dataset_config is not None:
        prompts = [(folder.prompt, folder.options.captions.trigger) for folder in dataset_config(args).folders]
    return list(dict.fromkeys(prompt.replace(TRIGGER, word) if word else prompt for prompt, word in prompts))


def model_spec(session: Session, base: StableDiffusionBase) -> dict[str, str]:
    """Strings for the file's header after ModelSpec 1.0.1, by which programs tell what an adapter is for.

    There is no date: the same run makes the same file. `save_apt_weights` adds the hash of the tensors.
    """
    args = session.args
    prediction = PREDICTION_TYPES.get(base.scheduler().config.get("prediction_type"))
    known = {
        "sai_model_spec": MODEL_SPEC_VERSION,
        "architecture": f"{base.architecture()}/apt",
        "implementation": "apt-diffusion",
        "implementation_version": __version__,
        "title": session.title,
        "resolution": f"{args.resolution}x{args.resolution}",
        "trigger_phrase": trigger_prompts(args)[0],
        "license": args.license,
        "prediction_type": prediction,  # flow matching has none
    }
    return {f"modelspec.{key}": value for key, value in known.items() if value is not None}
