"""The compared methods in tests: their configs in tiny sizes, and parameters far from their start."""

import torch
from torch import nn

from apt_diffusion import APTConfig
from apt_diffusion.architectures import resolve_config
from apt_diffusion.baselines import MethodConfig, get_method, method_names, method_parameters, with_heads

METHODS = method_names()
ADDING = [method for method in METHODS if method not in ("full", "classifier_only")]
SIZES = {"num_prompts": 5, "rank": 3, "bottleneck": 7}


def config_of(method: str, **sizes: int) -> MethodConfig | APTConfig:
    """The config of a method with those of the sizes that it has."""
    sizes = SIZES | sizes
    own = get_method(method).defaults()
    return get_method(method).config(**{name: size for name, size in sizes.items() if name in own})


def stored_config(model: nn.Module, method: str) -> MethodConfig | APTConfig:
    """The config that a file of this method on this model holds."""
    config = config_of(method)
    return resolve_config(model, with_heads(model, config)) if isinstance(config, APTConfig) else config


def shake(model: nn.Module) -> None:
    """The same large random values for a method's parameters every time."""
    generator = torch.Generator().manual_seed(3)
    for _, parameter in method_parameters(model):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
