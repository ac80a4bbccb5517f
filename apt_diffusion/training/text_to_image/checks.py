"""What must fit together before weights are loaded."""

import argparse

from ... import add_apt
from .arguments import apt_config
from .stable_diffusion import StableDiffusionBase


def check_fit(args: argparse.Namespace, base: StableDiffusionBase) -> None:
    """The adapter must fit the model: `ValueError` where it does not, seen on configurations, without weights."""
    if args.tokenizer_name is not None and len(base.text_parts) > 1:
        raise ValueError("--tokenizer_name names one tokenizer, but this model has two, which pad differently.")
    skeletons = base.skeletons()
    add_apt({part: skeletons[part] for part in trained_parts(args, base)}, apt_config(args))


def trained_parts(args: argparse.Namespace, base: StableDiffusionBase) -> list[str]:
    """The parts that get an adapter, by the pipeline's names."""
    return [*([] if args.no_train_unet else ["unet"]), *(base.text_parts if args.train_text_encoder else ())]
