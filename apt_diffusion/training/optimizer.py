"""AdamW over named groups of parameters, and learning rates as functions of the step."""

import logging
from collections.abc import Callable

import torch
from torch import nn

SHOWN = 3  # names in a message
# The factor on all learning rates, from the number of steps done.
Schedule = Callable[[int], float]


def make_adamw(
    groups: list[tuple[dict[str, nn.Parameter], float]],
    betas: tuple[float, float],
    weight_decay: float | list[float],
    epsilon: float,
    use_8bit: bool = False,
) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' 8-bit AdamW.

    Args:
        groups: named parameters and their learning rate.
        betas, epsilon: AdamW's.
        weight_decay: AdamW's; one for all groups, or one for each.
        use_8bit: needs bitsandbytes.
    """
    decays = weight_decay if isinstance(weight_decay, list) else [weight_decay] * len(groups)
    parameter_groups = [
        {"params": list(parameters.values()), "lr": rate, "weight_decay": decay}
        for (parameters, rate), decay in zip(groups, decays, strict=True)
    ]
    if use_8bit:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameter_groups, betas=betas, eps=epsilon)
    # Fused: an adapter is many small tensors, and a step of the plain loop costs a millisecond per hundred.
    return torch.optim.AdamW(parameter_groups, betas=betas, eps=epsilon, fused=True)


def make_schedule(
    name: str, optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int, cycles: int, power: float
) -> Schedule:
    """The factor on all learning rates, from the number of steps already done; a resumed run needs no state for it."""
    from diffusers.optimization import get_scheduler

    scheduler = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=total_steps,
        num_cycles=cycles,
        power=power,
    )
    return scheduler.lr_lambdas[0]


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> list[float]:
    """Sets every group's learning rate to `factor` times its initial one, and returns them."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return [group["lr"] for group in optimizer.param_groups]


def without_gradient(parameters: dict[str, nn.Parameter]) -> list[str]:
    """Names of the parameters that no backward pass has reached since gradients were last cleared."""
    return [name for name, parameter in parameters.items() if parameter.grad is None]


def warn_of_untrained(parameters: dict[str, nn.Parameter], logger: logging.Logger) -> None:
    """One warning names the parameters of `without_gradient`, if there are any."""
    silent = without_gradient(parameters)
    if silent:
        more = ", ..." if len(silent) > SHOWN else ""
        logger.warning(
            "%d of %d trained parameters have no gradient: the loss does not depend on them, and they stay as they "
            "are (%s%s).", len(silent), len(parameters), ", ".join(silent[:SHOWN]), more,
        )  # fmt: skip
