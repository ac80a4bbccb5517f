"""APT itself, the method that the others are compared with: attached by `add_apt`, stored in its own format."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..api import adapter_parameters, add_apt, remove_apt
from ..config import INITS, APTConfig
from ..heads import head_tensors
from ..model import ModelAdapters
from .registry import Costs, Method, Setting
from .settings import NUM_PROMPTS, RANK

ADAPTER = "default"  # the name of the adapter that is compared


class APT(Method):
    """`Y = exp(s) (O + w A P)`: one step of information diffusion from p prompts, behind every attention."""

    label = "APT"
    settings = (
        NUM_PROMPTS,
        RANK,
        Setting(
            "init",
            None,
            "How prompts start. 'released' is what the released code really does; the default of the architecture if "
            "not set.",
            choices=INITS,
        ),
    )

    def attach(self, model: nn.Module, **settings: Any) -> list[str]:
        """`add_apt` with these settings."""
        return add_apt(model, APTConfig(**settings))

    def detach(self, model: nn.Module) -> None:
        """`remove_apt`."""
        remove_apt(model)

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Parameters of the active adapters, without their heads."""
        config = ModelAdapters.of(model).configs.get(ADAPTER)
        heads = head_tensors(model, config.modules_to_save) if config and config.modules_to_save else {}
        own = {id(p) for p in adapter_parameters(model)} - {id(tensor) for tensor in heads.values()}
        return [(name, p) for name, p in model.named_parameters() if id(p) in own]

    def costs(
        self,
        hidden_size: int,
        tokens: Sequence[int],
        num_prompts: int = NUM_PROMPTS.default,
        rank: int = RANK.default,
    ) -> Costs:
        """m (pd + 2dr + 1) parameters; Σ 2pdN for affinities and values, and 2pdr per module for the keys."""
        m, d, p, r = len(tokens), hidden_size, num_prompts, rank
        return Costs(m * (p * d + 2 * d * r + 1), 2 * p * d * sum(tokens) + m * 2 * p * d * r)

    def config(self, **settings: Any) -> APTConfig:
        """APT's own config."""
        return APTConfig(**settings)
