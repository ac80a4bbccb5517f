"""AdamW of ViLT's and METER's recipes, SGD of CLIP's: parameter groups, learning rates and schedules."""

import argparse
import logging
import math

import torch
from torch import nn

from ..optimizer import Schedule, make_adamw, make_schedule

logger = logging.getLogger(__name__)


def make_optimizer(
    args: argparse.Namespace, parameters: dict[str, nn.Parameter]
) -> tuple[torch.optim.Optimizer, Schedule]:
    """AdamW; heads and cross-modal layers at their own rates, no weight decay on biases and the model's norms.

    Args:
        args: whose `max_train_steps` is known.
        parameters: by name.
    """
    groups: dict[tuple[float, float], dict[str, nn.Parameter]] = {}
    multipliers = {"--head_lr_multiplier": args.head_lr_multiplier}
    multipliers["--cross_modal_lr_multiplier"] = args.cross_modal_lr_multiplier
    used = set()
    for name, parameter in parameters.items():
        rate = args.learning_rate
        flag = "--cross_modal_lr_multiplier" if "cross_modal" in name else None
        flag = "--head_lr_multiplier" if "classifier" in name.split(".") else flag
        if flag is not None:
            used.add(flag)
            rate *= multipliers[flag]
        decay = 0.0 if name.endswith("bias") or "norm" in name.lower() else args.weight_decay
        groups.setdefault((rate, decay), {})[name] = parameter
    for flag in sorted(multipliers.keys() - used):
        if multipliers[flag] != 1:
            logger.warning("%s %g: without effect, because nothing of this kind is trained.", flag, multipliers[flag])
    optimizer = make_adamw(
        [(group, rate) for (rate, _), group in groups.items()],
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=[decay for _, decay in groups],
        epsilon=args.adam_epsilon,
    )
    warmup = int(args.lr_warmup_steps * (args.max_train_steps if args.lr_warmup_steps < 1 else 1))
    if args.lr_scheduler != "constant":
        _warn_of_long_warmup("--lr_warmup_steps", warmup, args.max_train_steps, "steps")
    return optimizer, make_schedule(args.lr_scheduler, optimizer, warmup, args.max_train_steps, cycles=1, power=1.0)


def make_clip_optimizer(
    args: argparse.Namespace, parameters: dict[str, nn.Parameter], steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, Schedule]:
    """The rate stays the same for an epoch: first `--warmup_lr`, then a cosine from `--learning_rate` to 0."""
    settings = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    values = list(parameters.values())
    if args.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(values, momentum=0.9, **settings)
    else:
        optimizer = torch.optim.AdamW(values, fused=True, **settings)
    for group in optimizer.param_groups:
        group["initial_lr"] = args.learning_rate
    epochs = math.ceil(args.max_train_steps / steps_per_epoch)
    _warn_of_long_warmup("--warmup_epochs", args.warmup_epochs, epochs, "epochs")

    def schedule(step: int) -> float:
        epoch = step // steps_per_epoch
        if epoch < args.warmup_epochs:
            return args.warmup_lr / args.learning_rate
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs))

    return optimizer, schedule


def _warn_of_long_warmup(flag: str, warmup: int, length: int, unit: str) -> None:
    if warmup >= length:
        logger.warning(
            "%s is %d, and the run has %d %s: its learning rate never reaches --learning_rate.",
            flag, warmup, length, unit,
        )  # fmt: skip
