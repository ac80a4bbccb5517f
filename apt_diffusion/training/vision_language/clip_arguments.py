"""Flags of the CLIP trainer, and the published recipes behind their defaults."""

import argparse
from dataclasses import dataclass

from transformers import PreTrainedConfig

from ...data.classification_sets import DATA_SETS
from .. import run_config
from ..run_config import RunArguments
from .arguments import HelpFormatter, add_common_flags, check_common, check_seed, positive_int
from .recipes import check_image_size


@dataclass(frozen=True)
class ClipRecipe:
    """A published setting of one protocol: SGD, cosine by epoch, the first epoch at a small constant rate."""

    source: str
    learning_rate: float
    num_train_epochs: int
    train_batch_size: int

    def fill_in(self, args: argparse.Namespace, num_processes: int, config: PreTrainedConfig) -> None:
        """Gives a value to what the command line left open."""
        for name in ("learning_rate", "num_train_epochs", "train_batch_size"):
            if getattr(args, name) is None:
                setattr(args, name, getattr(self, name))
        check_image_size(args.image_size, config)


# Nobody published APT on CLIP. These are the settings of what is nearest to it, prompts in every layer of both towers,
# and for all classes those of the paper that the protocol comes from.
RECIPES = {
    "base_to_new": ClipRecipe("IVLP, the deep prompts that MaPLe (arXiv 2210.03117) is compared with", 0.0035, 5, 4),
    "few_shot": ClipRecipe("CoOp (arXiv 2109.01134) with 16 shots", 0.002, 200, 32),
}


def _recipe_help(name: str) -> str:
    values = ", ".join(f"{getattr(recipe, name)} for {key} ({recipe.source})" for key, recipe in RECIPES.items())
    return f"Default: {values}."


def parse_args(description: str, argv: list[str] | None = None) -> RunArguments:
    """The flags, checked as far as they can be without data and model."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    add_common_flags(parser, "'miniature-clip'")
    parser.set_defaults(
        train_batch_size=None, num_train_epochs=None, gradient_accumulation_steps=1, eval_batch_size=100
    )
    add_data_flags(parser.add_argument_group("data and protocol").add_argument)
    add_optimizer_flags(parser.add_argument_group("optimizer").add_argument)
    args = run_config.parse_args(parser, argv)
    if (args.data_dir is None) == (args.dataset_name is None):
        parser.error("give --data_dir or --dataset_name")
    check_common(args)
    for seed in args.seeds:
        check_seed("--seeds", seed)
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds has one twice: {args.seeds}.")
    for template in args.template or ():
        if "{}" not in template:
            raise ValueError(f"--template {template!r} has no {{}} for the name of the class.")
    if args.warmup_epochs < 0:
        raise ValueError(f"--warmup_epochs must not be negative, got {args.warmup_epochs}.")
    if args.push_to_hub and len(args.seeds) > 1:
        raise ValueError("--push_to_hub uploads one adapter: give one of the --seeds.")
    return args


def add_data_flags(add) -> None:
    """Flags of the data set and of the protocol."""
    add(
        "--data_dir",
        help="Folder of a data set: with CoOp's split_zhou_*.json, FGVC Aircraft's lists, or a folder per class.",
    )
    add("--dataset_name", help="In place of --data_dir: a data set of the hub whose labels carry class names.")
    add("--image_column", default="image", help="With --dataset_name: column of the pictures.")
    add("--label_column", default="label", help="With --dataset_name: column of the labels.")
    add(
        "--data_set",
        choices=list(DATA_SETS),
        help="Which of CoOp's eleven data sets it is: that gives the template, the folder of pictures, and the rule "
        "that turns folder names into class names.",
    )
    add(
        "--template",
        nargs="+",
        help="Text of a class, {} for its name; that of --data_set, or 'a photo of a {}.', if not set. Features of "
        "several are averaged.",
    )
    add(
        "--protocol",
        choices=list(RECIPES),
        default="base_to_new",
        help="base_to_new: train on the first half of the classes, test on its test pictures and on those of the "
        "other half, each among its own classes (CoCoOp, arXiv 2203.05557). few_shot: train and test on all classes "
        "(CoOp).",
    )
    add("--num_shots", type=positive_int, default=16, help="Training pictures per class; 16 in published tables.")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[1],
        help="Of the shots, drawn as CoOp draws them, and of everything else random. Several are run one after the "
        "other, into seed-N of --output_dir, with mean and spread at the end; published tables have 1 2 3.",
    )
    add(
        "--image_size",
        type=positive_int,
        help="Pixels of the squares; the model's own processor's if not set. For another size than that of its "
        "pre-training the model's positions are interpolated.",
    )
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Random resized crops and mirroring of training pictures, as in CoOp; else they are cut as in tests.",
    )
    add(
        "--text_batch_size",
        type=positive_int,
        default=64,
        help="Classes whose texts are encoded together: memory of a step is that of one such part.",
    )


def add_optimizer_flags(add) -> None:
    """Flags of optimizer and learning rate."""
    add("--learning_rate", type=float, help=_recipe_help("learning_rate"))
    add(
        "--optimizer",
        choices=["sgd", "adamw"],
        default="sgd",
        help="SGD with momentum 0.9 in all published recipes.",
    )
    add("--weight_decay", type=float, default=5e-4, help="5e-4 in all published recipes.")
    add("--warmup_epochs", type=int, default=1, help="Epochs at --warmup_lr; 1 in all published recipes.")
    add("--warmup_lr", type=float, default=1e-5, help="Learning rate of these; 1e-5 in all published recipes.")
    add("--max_grad_norm", type=float, help="Gradients are clipped to this norm; not at all if not set, as published.")
