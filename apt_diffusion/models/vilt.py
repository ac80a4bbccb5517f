"""Additions to transformers' ViLT: the official code's classifier token, places of dropout and epsilons.

Also a fused kernel for its attention. Kernel, token and epsilons may be set before or after an adapter is attached;
`use_official_dropout` comes after it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.vilt.modeling_vilt import (
    TextEmbeddings,
    ViltLayer,
    ViltPredictionHeadTransform,
    ViltSelfAttention,
)


class ViltSdpaSelfAttention(ViltSelfAttention):
    """`ViltSelfAttention` with `scaled_dot_product_attention`: same parameters, same numbers.

    Where `output_attentions` is set, probabilities, which no fused kernel gives, are computed as before.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        """`(B, N, d) -> (B, N, d)` in a tuple, with the probabilities behind it if `output_attentions`."""
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


def add_classifier_token(model: nn.Module, cls_token_id: int = 101) -> nn.Parameter:
    """Gives ViLT a learnable state in place of the first word's, as the official code of APT does.

    METER has this built in (`MeterConfig(use_classifier_token=True)`). The parameter
    `embeddings.text_embeddings.classifier_token` (1, 1, d) begins as the text embedding of [CLS]; name it in
    `modules_to_save` to train and keep it with an adapter, and call this before that adapter is loaded. A model from
    the conversion of an official checkpoint also gets the official epsilon in its text embeddings.

    Raises:
        ValueError: for a model that is not ViLT, or has one already.
    """
    embeddings = next((module for module in model.modules() if isinstance(module, TextEmbeddings)), None)
    if embeddings is None:
        raise ValueError(f"{type(model).__name__} has no ViLT text embeddings.")
    if hasattr(embeddings, "classifier_token"):
        raise ValueError("This model has a classifier token already.")
    text_epsilon = getattr(model.config, "text_layer_norm_eps", None)
    if text_epsilon is not None:
        use_text_epsilon(model, text_epsilon)
    training = embeddings.training
    device = embeddings.word_embeddings.weight.device
    with torch.no_grad():  # without dropout: the official code's initial value has some in it by accident
        first = embeddings.eval()(torch.tensor([[cls_token_id]], device=device))
    embeddings.train(training)
    embeddings.classifier_token = nn.Parameter(first)
    embeddings.register_forward_hook(_replace_first_state)
    return embeddings.classifier_token


def _replace_first_state(embeddings: nn.Module, args: tuple, output: Tensor) -> Tensor:
    token = embeddings.classifier_token.expand(len(output), -1, -1).to(output.dtype)
    return torch.cat([token, output[:, 1:]], 1)


def use_official_dropout(model: nn.Module) -> int:
    """Puts ViLT's training dropout where the official code has it; evaluation does not change.

    The official block drops out after APT's correction (projection, APT, dropout) and also behind the GELU of its
    feed-forward part; transformers drops out before the correction, and not behind the GELU. The rates stay those of
    the config. Call it once all adapters are attached: one that is attached later would act behind the dropout.

    Returns:
        The number of blocks.
    """
    layers = [module for module in model.modules() if isinstance(module, ViltLayer)]
    for layer in layers:
        if not hasattr(layer.intermediate, "dropout"):
            layer.intermediate.dropout = nn.Dropout(layer.output.dropout.p).train(layer.training)
            layer.intermediate.register_forward_hook(_drop_activation)
        attention = layer.attention
        if hasattr(attention, "apt") and not hasattr(attention, "dropout"):
            attention.dropout, attention.output.dropout = attention.output.dropout, nn.Identity()
            attention.register_forward_hook(_drop_attended)
    return len(layers)


def _drop_activation(intermediate: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return intermediate.dropout(output)


def _drop_attended(attention: nn.Module, args: tuple, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (attention.dropout(output[0]), *output[1:])


def use_text_epsilon(model: nn.Module, epsilon: float) -> None:
    """Sets the epsilon of the norms that the official code takes from BERT: text embeddings, head of masked words.

    transformers gives all norms `config.layer_norm_eps`; in the official ViLT it is 1e-6 in the blocks and 1e-12 here.
    """
    for module in model.modules():
        if isinstance(module, TextEmbeddings | ViltPredictionHeadTransform):
            module.LayerNorm.eps = epsilon
