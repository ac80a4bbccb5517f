"""METER: CLIP's vision tower and RoBERTa, then two stacks of cross-modal layers that attend to each other.

Every cross-modal layer is post-norm: self-attention, attention to the other stack, feed-forward. Both stacks run in
parallel: layer i of one stack attends to the states that entered layer i of the other. Axes: B batch, T words, I image
tokens, d width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedModel, RobertaModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.utils import ModelOutput

from .configuration_meter import MeterConfig


@dataclass
class MeterForImagesAndTextClassificationOutput(ModelOutput):
    """As ViLT's: hidden states and attentions are lists with one entry per image."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: list[tuple[Tensor, ...]] | None = None
    attentions: list[tuple[Tensor, ...]] | None = None


class MeterAttention(nn.Module):
    """Multi-head self- or cross-attention; dropout, residual and norm follow in `MeterCrossLayer`."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        self.query = nn.Linear(self.hidden_size, self.hidden_size)
        self.key = nn.Linear(self.hidden_size, self.hidden_size)
        self.value = nn.Linear(self.hidden_size, self.hidden_size)
        self.dense = nn.Linear(self.hidden_size, self.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`(B, N, d)` attends to `encoder_hidden_states` (B, M, d), or to itself.

        Args:
            hidden_states: of the queries.
            encoder_hidden_states: of keys and values; `hidden_states` if `None`.
            attention_mask: `(B, M)`, true where there is something to attend to.
            output_attentions: return the probabilities `(B, heads, N, M)` too, which no fused kernel gives.
        """
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states in (self.query(hidden_states), self.key(context), self.value(context))
        )
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        dropout = self.dropout_prob if self.training else 0.0
        probabilities = None
        if output_attentions:
            scores = query @ key.mT * query.shape[-1] ** -0.5
            scores = scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            probabilities = scores.softmax(-1)
            attended = F.dropout(probabilities, dropout) @ value
        else:
            attended = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return self.dense(attended.transpose(1, 2).flatten(2)), probabilities


class MeterCrossLayer(GradientCheckpointingLayer):
    """One layer of one stack: `(own states, the other stack's states) -> own states`."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__()
        self.attention = MeterAttention(config)
        self.attention_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.crossattention = MeterAttention(config)
        self.crossattention_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`(B, N, d)` states, and those of the other stack `(B, M, d)`: new states, own and cross-attention maps."""
        attended, own = self.attention(hidden_states, None, attention_mask, output_attentions)
        hidden_states = self.attention_layer_norm(self.dropout(attended) + hidden_states)
        attended, others = self.crossattention(
            hidden_states, encoder_hidden_states, encoder_attention_mask, output_attentions
        )
        hidden_states = self.crossattention_layer_norm(self.dropout(attended) + hidden_states)
        fed = self.output(self.activation(self.intermediate(hidden_states)))
        return self.output_layer_norm(self.dropout(fed) + hidden_states), own, others


class MeterPooler(nn.Module):
    """The first token's state, mapped and squashed."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, N, d) -> (B, d)`."""
        return self.dense(hidden_states[:, 0]).tanh()


class MeterPreTrainedModel(PreTrainedModel):
    """Base class of the METER models: loading, saving, new weights."""

    config_class = MeterConfig
    base_model_prefix = "meter"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("MeterCrossLayer",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MeterModel) and module.classifier_token is not None:
            nn.init.normal_(module.classifier_token, std=self.config.initializer_range)


class MeterModel(MeterPreTrainedModel):
    """The bare model. `pooler_output` `(B, 2d)` is the pooled text followed by the pooled image."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        self.text_model = RobertaModel(config.text_config, add_pooling_layer=False)
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.cross_modal_text_transform = nn.Linear(self.text_model.config.hidden_size, config.hidden_size)
        self.cross_modal_image_transform = nn.Linear(self.vision_model.config.hidden_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.modality_type_vocab_size, config.hidden_size)
        size = (1, 1, config.hidden_size)
        self.classifier_token = nn.Parameter(torch.zeros(size)) if config.use_classifier_token else None
        layers = range(config.num_hidden_layers)
        self.cross_modal_text_layers = nn.ModuleList(MeterCrossLayer(config) for _ in layers)
        self.cross_modal_image_layers = nn.ModuleList(MeterCrossLayer(config) for _ in layers)
        self.cross_modal_text_pooler = MeterPooler(config)
        self.cross_modal_image_pooler = MeterPooler(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text encoder's table of words."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces that table."""
        self.text_model.set_input_embeddings(value)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Output of the text encoder before the modalities meet, `(B, T, d_text)`: frozen, it can be kept."""
        return self.text_model(input_ids, attention_mask=attention_mask).last_hidden_state

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Output of the vision encoder, `(B, I, d_vision)`; METER takes all tokens through CLIP's last norm."""
        other_size = tuple(pixel_values.shape[-2:]) != (self.config.vision_config.image_size,) * 2
        states = self.vision_model(pixel_values, interpolate_pos_encoding=other_size).last_hidden_state
        return self.vision_model.post_layernorm(states)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        text_embeds: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_token_type_idx: int = 1,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple | BaseModelOutputWithPooling:
        """Both modalities together.

        Args:
            input_ids: `(B, T)`.
            attention_mask: `(B, T)`, 1 for words, 0 for padding.
            pixel_values: `(B, 3, H, W)`, squares.
            text_embeds: in place of `input_ids`: `get_text_features` of them.
            image_embeds: in place of `pixel_values`: `get_image_features` of them.
            image_token_type_idx: the image's row of the modality table: 2 for the second of two images.
            output_attentions: of every layer (self, cross), first of the text stack, then of the image stack.
            output_hidden_states: `(B, T + I, d)` before the first layer and after each.
            return_dict: `False` for a tuple.

        Raises:
            ValueError: unless each modality is given exactly once.
        """
        for name, given in (("text", (input_ids, text_embeds)), ("image", (pixel_values, image_embeds))):
            if sum(value is not None for value in given) != 1:
                raise ValueError(f"Give the {name} once: either raw or as embeddings.")
        text_features = self.get_text_features(input_ids, attention_mask) if text_embeds is None else text_embeds
        image_features = self.get_image_features(pixel_values) if image_embeds is None else image_embeds
        text, image = self._enter(text_features, image_features, image_token_type_idx)
        mask = None if attention_mask is None else attention_mask.bool()

        hidden_states, attentions = [torch.cat([text, image], 1)], []
        for text_layer, image_layer in zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True):
            new_text = text_layer(text, image, mask, None, bool(output_attentions))
            new_image = image_layer(image, text, None, mask, bool(output_attentions))
            (text, *text_attentions), (image, *image_attentions) = new_text, new_image
            attentions += [*text_attentions, *image_attentions]
            if output_hidden_states:
                hidden_states.append(torch.cat([text, image], 1))
        pooled = torch.cat([self.cross_modal_text_pooler(text), self.cross_modal_image_pooler(image)], -1)
        output = BaseModelOutputWithPooling(
            last_hidden_state=torch.cat([text, image], 1),
            pooler_output=pooled,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _enter(
        self, text_features: Tensor, image_features: Tensor, image_token_type_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Both encoders' states in the width of the cross-modal layers, marked with their modality."""
        text = self.cross_modal_text_transform(text_features)
        image = self.cross_modal_image_transform(image_features)
        if self.classifier_token is not None:
            text = torch.cat([self.classifier_token.expand(len(text), -1, -1).to(text.dtype), text[:, 1:]], 1)
        kinds = self.token_type_embeddings.weight
        return text + kinds[0], image + kinds[image_token_type_idx]


def make_classifier(config: MeterConfig, num_inputs: int) -> nn.Sequential:
    """METER's head: pooled features of `num_inputs` passes to `config.num_labels` logits."""
    hidden = config.classifier_hidden_size or 2 * config.hidden_size
    return nn.Sequential(
        nn.Linear(2 * config.hidden_size * num_inputs, hidden),
        nn.LayerNorm(hidden),
        nn.GELU(),
        nn.Linear(hidden, config.num_labels),
    )


class MeterForQuestionAnswering(MeterPreTrainedModel):
    """Visual question answering as classification of answers."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.meter = MeterModel(config)
        self.classifier = make_classifier(config, num_inputs=1)
        self.post_init()

    def forward(
        self, *args: Any, labels: Tensor | None = None, return_dict: bool | None = None, **kwargs: Any
    ) -> tuple | SequenceClassifierOutput:
        """As `MeterModel.forward`; `labels` `(B, num_labels)` are soft scores of the answers.

        The loss is the binary cross-entropy summed over answers, averaged over the batch.
        """
        outputs = self.meter(*args, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype)) * labels.shape[1]
        result = SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return result.to_tuple() if return_dict is False else result


class MeterForImagesAndTextClassification(MeterPreTrainedModel):
    """One text about several images (NLVR2): one pass per image, one decision."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.num_images = config.modality_type_vocab_size - 1
        self.meter = MeterModel(config)
        self.classifier = make_classifier(config, num_inputs=self.num_images)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        text_embeds: Tensor | None = None,
        image_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple | MeterForImagesAndTextClassificationOutput:
        """As `MeterModel.forward`, with `pixel_values` `(B, num_images, 3, H, W)` or `image_embeds` `(B, num_images,
        I, d_vision)`; `labels` `(B,)` are classes. The text is encoded once for all images.

        Raises:
            ValueError: for another number of images than `modality_type_vocab_size - 1`.
        """
        images = pixel_values if image_embeds is None else image_embeds
        if images is None or images.shape[1] != self.num_images:
            shape = None if images is None else tuple(images.shape)
            raise ValueError(f"Expected {self.num_images} images per text in dimension 1, got {shape}.")
        if text_embeds is None:
            text_embeds = self.meter.get_text_features(input_ids, attention_mask)
        passes = [
            self.meter(
                attention_mask=attention_mask,
                text_embeds=text_embeds,
                **{"pixel_values" if image_embeds is None else "image_embeds": image},
                image_token_type_idx=index + 1,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
            )
            for index, image in enumerate(images.unbind(1))
        ]
        logits = self.classifier(torch.cat([outputs.pooler_output for outputs in passes], -1))
        result = MeterForImagesAndTextClassificationOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            hidden_states=[outputs.hidden_states for outputs in passes] if output_hidden_states else None,
            attentions=[outputs.attentions for outputs in passes] if output_attentions else None,
        )
        return result.to_tuple() if return_dict is False else result


class MeterForImageAndTextRetrieval(MeterPreTrainedModel):
    """How well a text fits an image, `(B, 1)`."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        self.meter = MeterModel(config)
        self.rank_output = nn.Linear(2 * config.hidden_size, 1)
        self.post_init()

    def forward(self, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> tuple | SequenceClassifierOutput:
        """As `MeterModel.forward`; `logits` are scores to rank by."""
        outputs = self.meter(*args, **kwargs)
        logits = self.rank_output(outputs.pooler_output)
        result = SequenceClassifierOutput(None, logits, outputs.hidden_states, outputs.attentions)
        return result.to_tuple() if return_dict is False else result
