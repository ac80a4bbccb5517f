"""Muon for matrices and AdamW for what is none, as one optimizer: PyTorch's Muon takes matrices only."""

from collections.abc import Iterable
from typing import Any

import torch


class MuonAndAdamW(torch.optim.Optimizer):
    """Prompts and the maps to their keys are matrices; scales and gates are none.

    Muon's steps are scaled to the size of AdamW's (`match_rms_adamw`), so that one learning rate fits both.

    Args:
        params: groups with `params` and `lr`.
        lr: for groups without their own.
        betas, eps: AdamW's.
        weight_decay: of both.
        momentum, nesterov, ns_steps: Muon's.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> None:
        matrices: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for group in params:
            for chosen, parts in ((True, matrices), (False, others)):
                if kept := [parameter for parameter in group["params"] if (parameter.ndim == 2) is chosen]:
                    parts.append(group | {"params": kept})
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            muon: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
            muon |= {"weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
            self._parts.append(torch.optim.Muon(matrices, lr, **muon))
        if others:
            self._parts.append(torch.optim.AdamW(others, lr, betas, eps, weight_decay))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Both work on the groups and the state that stand here, where checkpoints and learning rates find them."""
        first = 0
        for part in self._parts:
            last = first + len(part.param_groups)
            part.state, part.param_groups = self.state, self.param_groups[first:last]
            first = last

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's, for both."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """A step of both."""
        for part in self._parts:
            part.step()
