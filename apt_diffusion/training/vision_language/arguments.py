"""Flags that the trainers of vision-language models share."""

import argparse
import importlib.util

from ...baselines import get_method
from ..methods import add_method_flags, settle_method_flags
from ..model_card import LICENSE_HELP, license_id
from ..run_config import add_config_flag
from .recipes import Recipe, recipe_help


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not that there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def positive_int(text: str) -> int:
    """A flag's value that must be 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_common_flags(parser: argparse.ArgumentParser, miniatures: str) -> None:
    """Flags of all trainers, but those of optimizer, inputs, seeds and a task's data.

    Args:
        parser: the script's.
        miniatures: the embedded models that it trains, for the help.
    """
    _model_flags(parser.add_argument_group("model").add_argument, miniatures)
    _method_flags(parser.add_argument_group("method").add_argument)
    _length_flags(parser.add_argument_group("steps, checkpoints, evaluations").add_argument)
    _output_flags(parser.add_argument_group("output").add_argument)
    _hardware_flags(parser.add_argument_group("hardware").add_argument)


def add_shared_flags(parser: argparse.ArgumentParser, recipes: dict[str, Recipe]) -> None:
    """Every flag of a trainer of ViLT and METER, but those of a task's data.

    Args:
        parser: the script's.
        recipes: by type of model; their values are the defaults of flags that are not given.
    """
    add_common_flags(parser, "'miniature-vilt' or 'miniature-meter'")
    _fusion_model_flags(parser.add_argument_group("ViLT and METER").add_argument)
    _optimizer_flags(parser.add_argument_group("optimizer").add_argument, recipes)
    _input_flags(parser.add_argument_group("pictures and texts").add_argument, recipes)
    parser.add_argument(
        "--seed", type=int, help="Everything random follows from it; drawn, and kept in checkpoints, if not set."
    )


def _model_flags(add, miniatures: str) -> None:
    add_config_flag(add)
    add("--model_name_or_path", required=True, help=f"Hub id or folder, {miniatures}.")
    add("--revision", help="Revision of the model on the hub.")


def _fusion_model_flags(add) -> None:
    add(
        "--hidden_dropout_prob",
        type=float,
        default=0.1,
        help="Dropout of the layers that learn, 0.1 in the released code; in METER of attention probabilities, too. "
        "METER's frozen encoders have none here.",
    )
    add(
        "--use_classifier_token",
        action=argparse.BooleanOptionalAction,
        help="Put a learnable token in place of the first word's state, as the released code does for all methods; as "
        "the model was saved, or --adapter was trained, if not set.",
    )


def _method_flags(add) -> None:
    add_method_flags(add)
    add(
        "--freeze_scale",
        action="store_true",
        help="Keep APT's output scale at 1. The released METER code does so, because a name does not match.",
    )
    add("--adapter", help="File, folder or hub repository of a trained method to evaluate, or to train on.")


def _length_flags(add) -> None:
    add("--train_batch_size", type=positive_int, default=32, help="Examples per batch and process.")
    add(
        "--gradient_accumulation_steps",
        type=positive_int,
        help="Batches per step. Default: as many as the recipe's batch needs, see --help of --learning_rate.",
    )
    add("--num_train_epochs", type=positive_int, default=10, help="Rounds through the examples; 10 in all recipes.")
    add("--max_train_steps", type=positive_int, help="Steps in all; overrides --num_train_epochs.")
    add("--checkpointing_steps", type=positive_int, default=500, help="Steps between checkpoints; the last has one.")
    add("--checkpoints_total_limit", type=positive_int, help="How many checkpoints to keep.")
    add("--resume_from_checkpoint", help="'latest', the name of a checkpoint in --output_dir, or a path.")
    add(
        "--evaluation_steps",
        type=positive_int,
        help="Steps between evaluations; if not set an epoch for VQA and NLVR2, the whole training for the others. At "
        "the end there is always one.",
    )
    add("--eval_batch_size", type=positive_int, default=64, help="Examples per batch and process of evaluations.")
    add("--eval_only", action="store_true", help="Train nothing: evaluate --adapter, or the model as it is.")


def _optimizer_flags(add, recipes: dict[str, Recipe]) -> None:
    add(
        "--learning_rate",
        type=float,
        help="Learning rate after the warmup. "
        + recipe_help(recipes, lambda r: f"{r.learning_rate} ({r.full_learning_rate} with --method full)")
        + " There with a batch of "
        + ", ".join(f"{recipe.total_batch_size} for {kind.upper()}" for kind, recipe in recipes.items())
        + " in all.",
    )
    add(
        "--head_lr_multiplier",
        type=float,
        help="Factor for the classifier's learning rate. " + recipe_help(recipes, lambda r: r.head_lr_multiplier),
    )
    add(
        "--cross_modal_lr_multiplier",
        type=float,
        help="Factor for what lies in METER's cross-modal layers, the method's parameters included. "
        + recipe_help(recipes, lambda r: r.cross_modal_lr_multiplier),
    )
    add(
        "--lr_scheduler",
        default="linear",
        choices=["linear", "cosine", "polynomial", "constant", "constant_with_warmup"],
        help="The schedule of the learning rate; linear to 0 in all recipes.",
    )
    add(
        "--lr_warmup_steps",
        type=float,
        default=0.1,
        help="Warmup steps; below 1 a share of all steps. A tenth in all recipes.",
    )
    add("--weight_decay", type=float, default=0.01, help="AdamW's weight decay; none on biases and the model's norms.")
    add("--adam_beta1", type=float, default=0.9, help="AdamW's β1.")
    add("--adam_beta2", type=float, default=0.98, help="AdamW's β2; 0.98 in all recipes.")
    add("--adam_epsilon", type=float, default=1e-8, help="AdamW's ε.")
    add("--max_grad_norm", type=float, help="Gradients are clipped to this norm; not at all if not set, as published.")


def _input_flags(add, recipes: dict[str, Recipe]) -> None:
    add(
        "--image_size",
        type=positive_int,
        help="Shorter side of the pictures. " + recipe_help(recipes, lambda r: r.image_size),
    )
    add(
        "--max_text_length",
        type=positive_int,
        help="Tokens of a text, at most what the model has positions for. "
        + recipe_help(recipes, lambda r: r.max_text_length),
    )
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="RandAugment (2 operations of magnitude 9) on training pictures, as published; on unless outputs are "
        "cached. It changes colours: switch it off where questions are about them.",
    )
    add(
        "--cache_encoder_outputs",
        metavar="FOLDER",
        help="METER: compute the outputs of its frozen encoders once, and keep them here for all epochs and runs.",
    )


def _output_flags(add) -> None:
    add("--output_dir", required=True, help="Folder for weights, results, card, logs and checkpoints.")
    add("--logging_dir", default="logs", help="Folder of the trackers' logs inside --output_dir.")
    add(
        "--report_to",
        default="tensorboard",
        choices=["tensorboard", "wandb", "comet_ml", "all", "none"],
        help="Tracker for losses and metrics. tensorboard is skipped where it is not installed.",
    )
    add("--license", type=license_id, help=LICENSE_HELP)
    add("--push_to_hub", action="store_true", help="Upload weights, results and card at the end.")
    add("--hub_token", help="Token for the hub; that of `hf auth login` if not set.")
    add("--hub_model_id", help="Repository on the hub; the name of --output_dir if not set.")


def _hardware_flags(add) -> None:
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Of the computation; accelerate's if not set.")
    add("--gradient_checkpointing", action="store_true", help="Less memory, slower steps.")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on GPUs that have them.")
    add("--dataloader_num_workers", type=int, default=0, help="Loader processes; 0 loads in the main one.")


def check_common(args: argparse.Namespace) -> None:
    """Refuses what cannot work, before anything is loaded: `ValueError` or `ImportError`."""
    if args.report_to == "wandb" and args.hub_token is not None:
        raise ValueError("--hub_token would be shown among the run's settings on wandb: sign in with `hf auth login`.")
    if args.report_to in ("wandb", "comet_ml") and importlib.util.find_spec(args.report_to) is None:
        raise ImportError(f"--report_to {args.report_to} needs it installed: `pip install {args.report_to}`.")
    if args.eval_only and args.resume_from_checkpoint:
        raise ValueError("--eval_only evaluates --adapter, which may be a checkpoint, not --resume_from_checkpoint.")
    if args.resume_from_checkpoint and args.adapter:
        raise ValueError("--resume_from_checkpoint goes on with its checkpoint's weights: leave --adapter out.")
    if args.method != "apt" and (args.init or args.freeze_scale):
        raise ValueError(f"--init and --freeze_scale are APT's; this run has --method {args.method}.")
    settle_method_flags(args)


def check_seed(flag: str, seed: int | None) -> None:
    """`ValueError` for a seed that numpy does not take."""
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"{flag} must be from 0 to {2**32 - 1}, got {seed}.")


def check_shared(args: argparse.Namespace) -> None:
    """As `check_common`, for the flags of `add_shared_flags`; whether pictures are augmented is settled here."""
    check_common(args)
    check_seed("--seed", args.seed)
    if not 0 <= args.hidden_dropout_prob < 1:
        raise ValueError(f"--hidden_dropout_prob must be in [0, 1), got {args.hidden_dropout_prob}.")
    if args.lr_warmup_steps < 0:
        raise ValueError(f"--lr_warmup_steps must not be negative, got {args.lr_warmup_steps}.")
    if args.cache_encoder_outputs:
        if args.augment:
            raise ValueError("--cache_encoder_outputs needs pictures that stay the same: leave --augment out.")
        if get_method(args.method).trains_base:
            raise ValueError(f"--cache_encoder_outputs needs frozen encoders: --method {args.method} trains them.")
    args.augment = args.augment is not False and not args.cache_encoder_outputs
