"""Muon: momentum whose matrices are orthogonalised by Newton-Schulz steps (Jordan et al., 2024).

Scaled to the size of AdamW's updates (Liu et al., 2025), so that both take the same learning rate. Convolutions count
as matrices of their flattened filters, which torch's own Muon does not take. Matrices of one shape are handled
together.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """The optimizer, for matrices and convolution kernels."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 1e-3, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients."""
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[len(parameter), parameter[0].numel()].append(parameter)
            for shape, parameters in alike.items():
                gradients = [parameter.grad.flatten(1) for parameter in parameters]
                momenta = [self.momentum_of(parameter) for parameter in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
                size = 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, orthogonalise(torch.stack(updates)), strict=True):
                    parameter.add_(update.view_as(parameter), alpha=-group["lr"] * size)

    def momentum_of(self, parameter: nn.Parameter) -> Tensor:
        """The average gradient `(rows, columns)`, zero at first."""
        return self.state[parameter].setdefault("momentum", torch.zeros_like(parameter).flatten(1))


def split_for_muon(
    modules: dict[str, nn.Module], outer: Sequence[str] = ("conv_in", "conv_out", "time_embedding", "embeddings")
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Inner matrices and filters for Muon; vectors, and what has a word of `outer` in its name, for AdamW."""
    named = [pair for module in modules.values() for pair in module.named_parameters()]
    matrices = [p for name, p in named if p.ndim >= 2 and not any(part in name for part in outer)]
    chosen = {id(p) for p in matrices}
    return matrices, [p for _, p in named if id(p) not in chosen]


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices `(N, rows, columns)`, roughly: a quintic pushes singular values to 1."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.is_cuda:
        x = x.bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype).contiguous()
