"""The optimizer that `--optimizer` names: one of a few by a short name, any other by the path of its class."""

import argparse
import ast
import importlib
import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

# By the short name: the class, and settings without which it would not follow --learning_rate.
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    # Fused: an adapter is many small tensors, and a step of the plain loop costs a millisecond per hundred.
    "adamw": ("torch.optim.AdamW", {"fused": True}),
    "adamw8bit": ("bitsandbytes.optim.AdamW8bit", {}),
    "adafactor": ("transformers.Adafactor", {"scale_parameter": False, "relative_step": False}),
    "lion": ("lion_pytorch.Lion", {}),
    "prodigy": ("prodigyopt.Prodigy", {}),
    "muon": ("apt_diffusion.training.muon.MuonAndAdamW", {}),
    "schedulefree": ("schedulefree.AdamWScheduleFree", {}),
    "sgd": ("torch.optim.SGD", {"momentum": 0.9}),
}
PACKAGES = {"lion_pytorch": "lion-pytorch"}  # where the package is called otherwise than its module


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of a short name, or of a path such as `torch.optim.NAdam`.

    Raises:
        ValueError: for a name that is neither.
        ImportError: for a package that is not installed.
    """
    path = NAMED[name][0] if name in NAMED else name
    module_name, _, class_name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"--optimizer {name}: expected {', '.join(NAMED)}, or a class such as torch.optim.NAdam.")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError as error:
        package = module_name.partition(".")[0]
        package = PACKAGES.get(package, package)
        raise ImportError(f"--optimizer {name} needs {package}: `pip install {package}` ({error}).") from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError(f"--optimizer {name}: {module_name} has no optimizer of the name {class_name!r}.")
    return found


def usual_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags on AdamW as settings that most optimizers have."""
    betas = args.adam_beta1, args.adam_beta2
    return {"betas": betas, "eps": args.adam_epsilon, "weight_decay": args.adam_weight_decay}


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """`["momentum=0.9", "nesterov=True"]` as keyword arguments; `ValueError` for what has no such form."""
    settings = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (equals and name.isidentifier()):
            raise ValueError(f"--optimizer_args {word}: expected NAME=VALUE, as in momentum=0.9.")
        if name in ("lr", "params"):
            raise ValueError(f"--optimizer_args {word}: --learning_rate and its kin say how fast what is trained.")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings


def make_optimizer(
    name: str,
    groups: Sequence[tuple[dict[str, nn.Parameter], float]],
    usual: dict[str, Any],
    settings: dict[str, Any],
) -> torch.optim.Optimizer:
    """The optimizer over named groups of parameters.

    Args:
        name: see `optimizer_class`.
        groups: named parameters and their learning rate.
        usual: `betas`, `eps`, `weight_decay`; those that the class does not have are left out.
        settings: arguments of the class, which come first.

    Raises:
        ValueError: for settings that the class refuses, with its own words.
    """
    found = optimizer_class(name)
    arguments = {key: value for key, value in usual.items() if key in takes(name)}
    arguments |= (NAMED[name][1] if name in NAMED else {}) | settings
    parameter_groups = [{"params": list(parameters.values()), "lr": rate} for parameters, rate in groups]
    try:
        return found(parameter_groups, **arguments)
    except Exception as error:  # each class has errors of its own
        raise ValueError(f"--optimizer {name} cannot be made with {arguments}: {error}") from error


def check_step(name: str, optimizer: torch.optim.Optimizer) -> None:
    """A step with gradients of zero: some classes see only then that settings and learning rates do not go together.

    Raises:
        ValueError: with the class's own words.
    """
    if is_schedule_free(optimizer):
        cast(Any, optimizer).train()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except Exception as error:  # each class has errors of its own
        raise ValueError(
            f"--optimizer {name} cannot take a step with these learning rates and --optimizer_args: {error}"
        ) from error


def takes(name: str) -> set[str]:
    """Which of `betas`, `eps` and `weight_decay` the class has, `eps` where it is one number."""
    found = inspect.signature(optimizer_class(name).__init__).parameters
    one_number = "eps" in found and isinstance(found["eps"].default, float)
    return {key for key in ("betas", "weight_decay") if key in found} | ({"eps"} if one_number else set())


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has other weights for training than for use, as those of `schedulefree` do."""
    return hasattr(optimizer, "eval") and hasattr(optimizer, "train")
