"""Configuration of METER: two encoders and the cross-modal layers between them."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig, RobertaConfig

# METER's towers: CLIP ViT-B/16 without its last layer, RoBERTa base.
VISION_DEFAULTS = {"num_hidden_layers": 11, "patch_size": 16, "image_size": 384}
TEXT_DEFAULTS = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}


@strict
class MeterConfig(PreTrainedConfig):
    """Defaults are those of METER clip16 + roberta at 384 pixels.

    Args:
        text_config: of the RoBERTa encoder.
        vision_config: of the CLIP vision encoder.
        hidden_size: width d of the cross-modal layers.
        num_hidden_layers: cross-modal layers per tower.
        num_attention_heads: of the cross-modal layers.
        intermediate_size: of their feed-forward parts.
        hidden_act: their activation.
        hidden_dropout_prob, attention_probs_dropout_prob: their dropout.
        layer_norm_eps: theirs; the official code keeps RoBERTa's class default of 1e-12 here, not its base model's.
        modality_type_vocab_size: rows of the table that tells text from images (3 for pairs of images).
        use_classifier_token: replace the first word's state by a learnable one, as the official code of APT and of
            the methods it is compared with does when it fine-tunes.
        classifier_hidden_size: width of the heads' hidden layer; 2d if `None`.
        initializer_range: standard deviation of new weights.
    """

    model_type = "meter"
    sub_configs = {"text_config": RobertaConfig, "vision_config": CLIPVisionConfig}  # noqa: RUF012

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-12
    modality_type_vocab_size: int = 2
    use_classifier_token: bool = False
    classifier_hidden_size: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = RobertaConfig(**{**TEXT_DEFAULTS, **(self.text_config or {})})
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = CLIPVisionConfig(**{**VISION_DEFAULTS, **(self.vision_config or {})})
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )
        super().__post_init__(**kwargs)


# So that tokenizers and processors of a METER folder load without a warning about its unknown type.
AutoConfig.register("meter", MeterConfig, exist_ok=True)
