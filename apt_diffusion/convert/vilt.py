"""Keys and sizes of the official ViLT, with and without APT."""

from typing import Any

from torch import Tensor

from .rules import Rule, apt_rules, count, shape

HEAD_SIZE = 64  # of every attention in ViLT; the files do not say
BLOCK_EPSILON, TEXT_EPSILON = 1e-6, 1e-12  # of the norms in and after the blocks, and of those taken from BERT
_BLOCK, _NEW_BLOCK = r"transformer\.blocks\.(\d+)\.", r"encoder.layer.\1."

RULES = (
    Rule(r"text_embeddings\.(position_ids|token_type_ids)", None, "a constant"),
    Rule(r"text_embeddings\.(.*)", r"embeddings.text_embeddings.\1"),
    Rule(r"token_type_embeddings\.weight", "embeddings.token_type_embeddings.weight"),
    Rule(r"transformer\.cls_token", "embeddings.cls_token"),
    Rule(r"transformer\.pos_embed", "embeddings.position_embeddings"),
    Rule(r"transformer\.patch_embed\.proj\.(\w+)", r"embeddings.patch_embeddings.projection.\1"),
    Rule(_BLOCK + r"norm1\.(\w+)", _NEW_BLOCK + r"layernorm_before.\2"),
    Rule(_BLOCK + r"norm2\.(\w+)", _NEW_BLOCK + r"layernorm_after.\2"),
    Rule(
        _BLOCK + r"attn\.qkv\.(\w+)",
        _NEW_BLOCK + r"attention.attention.{part}.\2",
        parts=("query", "key", "value"),
    ),
    Rule(_BLOCK + r"attn\.proj\.(\w+)", _NEW_BLOCK + r"attention.output.dense.\2"),
    *apt_rules(_BLOCK + r"attn\.", _NEW_BLOCK + "attention"),
    Rule(_BLOCK + r"mlp\.fc1\.(\w+)", _NEW_BLOCK + r"intermediate.dense.\2"),
    Rule(_BLOCK + r"mlp\.fc2\.(\w+)", _NEW_BLOCK + r"output.dense.\2"),
    Rule(r"transformer\.norm\.(\w+)", r"layernorm.\1"),
    Rule(r"transformer\.mask_token", None, "of masked patch prediction, which transformers' ViLT does not have"),
    Rule(r"(pooler\.dense\.\w+)", r"\1"),
    Rule(r"token4classifier", "embeddings.text_embeddings.classifier_token"),
)


def settings(state: dict[str, Tensor]) -> dict[str, Any]:
    """`ViltConfig`'s sizes, read from the official tensors; dropout is the official 0.1, of probabilities none.

    `text_layer_norm_eps` is not transformers': `use_text_epsilon` applies it.
    """
    width, _, patch, _ = shape(state, "transformer.patch_embed.proj.weight")
    positions = shape(state, "transformer.pos_embed")[1]
    return {
        "hidden_size": width,
        "num_hidden_layers": count(state, r"transformer\.blocks\.(\d+)\."),
        "num_attention_heads": width // HEAD_SIZE,
        "intermediate_size": shape(state, "transformer.blocks.0.mlp.fc1.weight")[0],
        "patch_size": patch,
        "image_size": round((positions - 1) ** 0.5) * patch,
        "vocab_size": shape(state, "text_embeddings.word_embeddings.weight")[0],
        "max_position_embeddings": shape(state, "text_embeddings.position_embeddings.weight")[0],
        "type_vocab_size": shape(state, "text_embeddings.token_type_embeddings.weight")[0],
        "qkv_bias": "transformer.blocks.0.attn.qkv.bias" in state,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.0,
        "max_image_length": -1,
        "layer_norm_eps": BLOCK_EPSILON,
        "text_layer_norm_eps": TEXT_EPSILON,
    }
