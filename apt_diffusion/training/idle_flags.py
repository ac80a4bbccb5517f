"""Warns before the first step of command-line flags that have no effect in this run, with the reason."""

import argparse
import logging
from collections.abc import Iterable

# A flag, whether it has no effect in this run, and why.
Rule = tuple[str, bool, str]


def warn_of_idle_flags(
    args: argparse.Namespace, parser: argparse.ArgumentParser, rules: Iterable[Rule], logger: logging.Logger
) -> None:
    """Logs one warning for the flags of `rules` that the user set and that have no effect.

    Args:
        args: the script's flags.
        parser: the script's parser; flags at their default are not reported.
        rules: as `shared_rules` and the script's own.
        logger: the script's.
    """
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    idle = [f"--{flag} {why}" for flag, is_idle, why in rules if is_idle and flag in given]
    if idle:
        logger.warning("Without effect in this run: %s.", "; ".join(idle))


def shared_rules(args: argparse.Namespace) -> list[Rule]:
    """Rules of the flags that every trainer has; call it once `max_train_steps` is known."""
    return [
        (
            "checkpointing_steps",
            args.checkpointing_steps > args.max_train_steps,
            f"is more than the {args.max_train_steps} steps of the run: only the last step has a checkpoint",
        ),
        ("hub_token", not args.push_to_hub, "needs --push_to_hub"),
        ("hub_model_id", not args.push_to_hub, "needs --push_to_hub"),
    ]


def warn_of_long_warmup(warmup_steps: int, args: argparse.Namespace, logger: logging.Logger) -> None:
    """Logs that the learning rate never reaches its value; a default is no excuse here."""
    if args.lr_scheduler != "constant" and warmup_steps >= args.max_train_steps:
        logger.warning(
            "The warm-up of %d steps is as long as the run of %d steps or longer: the learning rate stays below "
            "--learning_rate, and --lr_scheduler %s never gets to work. Lower --lr_warmup_steps.",
            warmup_steps, args.max_train_steps, args.lr_scheduler,
        )  # fmt: skip
