"""A fused kernel for the attention of transformers' ViLT, which computes it step by step.

The numbers are the same; the probabilities, which no fused kernel gives, are computed as before where they are asked
for. Works before and after APT or one of the compared methods is attached, in training and in evaluation.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.vilt.modeling_vilt import ViltSelfAttention


class ViltSdpaSelfAttention(ViltSelfAttention):
    """`ViltSelfAttention` with `scaled_dot_product_attention`; same parameters."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        if output_attentions:
            return super().forward(hidden_states, attention_mask, output_attentions)
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)  # (B, heads, N, d/h)
            for project in (self.query, self.key, self.value)
        )
        if attention_mask is not None:
            attention_mask = attention_mask.to(query.dtype)  # under autocast it is still float32
        dropout = self.dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout)
        return (attended.transpose(1, 2).flatten(2),)


def use_sdpa(model: nn.Module, enabled: bool = True) -> int:
    """Lets every ViLT attention in `model` use the fused kernel, or with `enabled=False` transformers' own way again.

    Modules change their class, nothing else: parameters, their names, hooks and what `save_pretrained` writes stay;
    copies and pickles of the model keep the choice. Call it before the first compiled call.

    Returns:
        How many attention modules there are.

    Raises:
        ValueError: for a model without ViLT attention.
    """
    attentions = [module for module in model.modules() if isinstance(module, ViltSelfAttention)]
    if not attentions:
        raise ValueError(f"{type(model).__name__} has no ViLT attention; METER and CLIP use the fused kernel anyway.")
    for attention in attentions:
        attention.__class__ = ViltSdpaSelfAttention if enabled else ViltSelfAttention
    return len(attentions)
