"""The method: Approximated Prompt Tuning (arXiv 2306.15706), as one module next to a frozen attention.

Axes: B batch, N tokens, d width, p prompts, r rank.  The comments at line ends give the paper's names.

    K = P + (P Dᵀ) Uᵀ              keys of the prompts: they do not depend on the input
    A = relu(X Kᵀ)                 affinity of every token to every prompt
    w = stop_gradient(max_p A)     how strongly the prompts act on a token
    Y = exp(s) · (O + w ⊙ (A P))   the corrected output of the attention

In a half-precision model the two matrix products, which are nearly all of the cost, are computed in that precision (a
matrix unit accumulates in float32); K, exp(s) and the adapter's weight are computed in float32 first.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import APTConfig


class FoldedPrompt(NamedTuple):
    """All that a forward pass needs: `Y = scale · O + information_diffusion(X, keys, values)`."""

    keys: Tensor  # (..., p, d)
    values: Tensor  # (..., p, d)
    scale: Tensor  # (1,), or (B, 1, 1) for one adapter per sample; float32 or better

    def in_precision(self, dtype: torch.dtype, activation: str) -> "FoldedPrompt":
        """Keys and values for products in half precision; for other dtypes, and for a softmax, nothing changes.

        Logits of a softmax that are rounded to half precision would change its result by a share of their size.
        """
        if activation != "relu" or dtype not in (torch.float16, torch.bfloat16):
            return self
        keys, values, scale = self
        if dtype == torch.float16:
            factor = float16_factor(values)
            keys, values = keys / factor, values * factor.square()
        return FoldedPrompt(keys.to(dtype), values.to(dtype), scale)

    def weighted(self, weight: float | Tensor) -> "FoldedPrompt":
        """At strength λ, `Y_λ = O + λ (Y − O)`; one number, or a tensor `(B, 1, 1)` for one per sample."""
        scale = 1 + weight * (self.scale - 1)
        if isinstance(weight, Tensor):  # λ = 1 is the adapter as it is, to the last bit
            scale = torch.where(weight == 1, self.scale, scale)
        return FoldedPrompt(self.keys, weight * self.values, scale)


def float16_factor(values: Tensor) -> Tensor:
    """A power of two c, `(..., 1, 1)`: keys / c and c² · values give the same result, because relu is homogeneous.

    float16 ends at 65504, and A enters squared: from affinities of 256 on, w ⊙ A would overflow although the result
    fits, as values are small. So values are scaled up, to at most 16, and affinities down, to at least a 64th, and may
    reach 16,000. bfloat16 has the range of float32.
    """
    largest = values.detach().abs().amax((-2, -1), keepdim=True)
    exponent = (16 / largest).log2().div(2).floor().clamp(0, 6)
    return (1 << exponent.long()).to(values.dtype)


def information_diffusion(
    query: Tensor, keys: Tensor, values: Tensor, activation: str = "relu", dropout: float = 0.0
) -> Tensor:
    """`w ⊙ (A V)`: the prompts' update of every token. Shapes `(B, N, d), (..., p, d), (..., p, d) -> (B, N, d)`."""
    affinity = query @ keys.mT  # X Kᵀ  (B, N, p)
    affinity = affinity.relu() if activation == "relu" else affinity.softmax(-1)  # A
    if dropout:
        affinity = F.dropout(affinity, dropout)
    gate = affinity.detach().amax(-1, keepdim=True)  # w  (B, N, 1)
    return (gate * affinity) @ values  # w ⊙ (A V), with w moved inside: it is one number per token


class ApproximatedPrompt(nn.Module):
    """Corrects the output of one attention module by an information-diffusion step from `num_prompts` prompts.

    Initialisation: `"paper"` P ~ N(0, 0.02²), D ~ N(0, 1), U = 0, s = 0; `"released"` the effective one of the
    official code, where D and U ~ N(0, 0.02²) too; `"identity"` as `"paper"` with a learnable factor `gate` on the
    update that starts at 0, so that an untrained adapter changes nothing (P = 0 would have no gradient).
    """

    def __init__(
        self,
        hidden_size: int,
        num_prompts: int = 200,
        rank: int = 4,
        activation: str = "relu",
        dropout: float = 0.0,
        init: str = "paper",
    ) -> None:
        super().__init__()
        # The config checks the values and names the one that is wrong.
        APTConfig(num_prompts=num_prompts, rank=rank, activation=activation, dropout=dropout, init=init)
        self.activation = activation
        self.dropout = dropout
        self.prompts = nn.Parameter(torch.randn(num_prompts, hidden_size) * 0.02)  # P
        self.low_rank_down = nn.Parameter(torch.randn(rank, hidden_size))  # D
        self.low_rank_up = nn.Parameter(torch.zeros(hidden_size, rank))  # U
        self.log_scale = nn.Parameter(torch.zeros(1))  # s
        self.gate = nn.Parameter(torch.zeros(1)) if init == "identity" else None
        if init == "released":
            nn.init.normal_(self.low_rank_down, std=0.02)
            nn.init.normal_(self.low_rank_up, std=0.02)

    def fold(self, dtype: torch.dtype, weight: float = 1.0) -> FoldedPrompt:
        """The adapter at strength `weight`, `Y_λ = O + λ (Y − O)`, with every input-independent step done.

        Args:
            dtype: of the attention's output. The steps are done in float32 or better.
            weight: λ.
        """
        computed = torch.promote_types(dtype, torch.float32)
        prompts, down, up, log_scale = (
            p.to(computed) for p in (self.prompts, self.low_rank_down, self.low_rank_up, self.log_scale)
        )
        scale = log_scale.exp()  # exp(s)
        strength = scale if self.gate is None else scale * self.gate.to(computed)
        keys = prompts + (prompts @ down.T) @ up.T  # K  (p, d)
        folded = FoldedPrompt(keys, strength * prompts, scale)
        return (folded if weight == 1 else folded.weighted(weight)).in_precision(dtype, self.activation)

    def forward(self, attn_output: Tensor, hidden_states: Tensor) -> Tensor:
        """`(O, X) -> Y`, all `(B, N, d)` in any floating dtype; see `correct` for the precision."""
        with torch.autocast(attn_output.device.type, enabled=False):
            folded = self.fold(attn_output.dtype)
            return correct(attn_output, hidden_states, folded, self.activation, self.active_dropout)

    @property
    def active_dropout(self) -> float:
        """The dropout on affinities that acts now: 0 outside of training."""
        return self.dropout if self.training else 0.0


def correct(
    attn_output: Tensor, query: Tensor, folded: FoldedPrompt, activation: str = "relu", dropout: float = 0.0
) -> Tensor:
    """`scale · O + w ⊙ (A V)`, returned in the dtype of O; the products are taken in that of `folded.keys`."""
    dtype = folded.keys.dtype
    update = information_diffusion(query.to(dtype), folded.keys, folded.values, activation, dropout)
    if dtype == folded.scale.dtype:
        return (folded.scale * attn_output.to(dtype) + update).to(attn_output.dtype)
    # In half precision exp(s) − 1 keeps its digits, which exp(s) near 1 loses. Expanded before it is rounded: the
    # gradient of s is then summed over tokens in float32.
    excess = (folded.scale - 1).expand(*attn_output.shape[:-1], 1).to(dtype)
    return torch.addcmul(attn_output + update, attn_output, excess)
