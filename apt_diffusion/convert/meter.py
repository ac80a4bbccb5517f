"""Keys and sizes of the official METER (clip16 + roberta), with and without APT."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rules import Rule, apt_rules, count, shape

HEAD_SIZE = 64  # of every attention in METER's parts; the files do not say
_BLOCK, _NEW_BLOCK = r"vit_model\.visual\.transformer\.resblocks\.(\d+)\.", r"vision_model.encoder.layers.\1."
_CROSS = r"(cross_modal_(?:text|image)_layers\.\d+)\."
_LEFT_OVER = "left over from CLIP's text tower, never used"
_QKV = ("q_proj", "k_proj", "v_proj")

RULES = (
    Rule(r"vit_model\.visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    Rule(r"vit_model\.visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    Rule(r"vit_model\.visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    Rule(r"vit_model\.visual\.ln_pre\.(\w+)", r"vision_model.pre_layrnorm.\1"),
    Rule(r"vit_model\.visual\.ln_post\.(\w+)", r"vision_model.post_layernorm.\1"),
    Rule(_BLOCK + r"attn\.in_proj_(weight|bias)", _NEW_BLOCK + r"self_attn.{part}.\2", parts=_QKV),
    Rule(_BLOCK + r"attn\.out_proj\.(\w+)", _NEW_BLOCK + r"self_attn.out_proj.\2"),
    Rule(_BLOCK + r"ln_([12])\.(\w+)", _NEW_BLOCK + r"layer_norm\2.\3"),
    Rule(_BLOCK + r"mlp\.c_fc\.(\w+)", _NEW_BLOCK + r"mlp.fc1.\2"),
    Rule(_BLOCK + r"mlp\.c_proj\.(\w+)", _NEW_BLOCK + r"mlp.fc2.\2"),
    Rule(r"vit_model\.(positional_embedding|ln_final\.\w+|token_embedding\.weight)", None, _LEFT_OVER),
    Rule(r"text_transformer\.embeddings\.(position_ids|token_type_ids)", None, "a constant"),
    Rule(r"text_transformer\.pooler\..*", None, "RoBERTa's pooler, never used"),
    Rule(r"text_transformer\.(.*)", r"text_model.\1"),
    Rule(r"(cross_modal_(?:text|image)_transform\.\w+)", r"\1"),
    Rule(_CROSS + r"(attention|crossattention)\.self\.(query|key|value)\.(\w+)", r"\1.\2.\3.\4"),
    Rule(_CROSS + r"(attention|crossattention)\.output\.dense\.(\w+)", r"\1.\2.dense.\3"),
    Rule(_CROSS + r"(attention|crossattention)\.output\.LayerNorm\.(\w+)", r"\1.\2_layer_norm.\3"),
    *apt_rules(_CROSS + r"(attention|crossattention)\.output\.", r"\1.\2"),
    Rule(_CROSS + r"(intermediate|output)\.dense\.(\w+)", r"\1.\2.\3"),
    Rule(_CROSS + r"output\.LayerNorm\.(\w+)", r"\1.output_layer_norm.\2"),
    Rule(r"(cross_modal_(?:text|image)_pooler\.dense\.\w+)", r"\1"),
    Rule(r"token_type_embeddings\.weight", "token_type_embeddings.weight"),
    Rule(r"token4classifier", "classifier_token"),
)


def settings(state: dict[str, Tensor], image_size: int | None) -> dict[str, Any]:
    """`MeterConfig`'s sizes, read from the official tensors."""
    visual, text, cross = "vit_model.visual.", "text_transformer.", "cross_modal_text_layers."
    width, _, patch, _ = shape(state, f"{visual}conv1.weight")
    positions = shape(state, f"{visual}positional_embedding")[0]
    words, text_width = shape(state, f"{text}embeddings.word_embeddings.weight")
    hidden = shape(state, "cross_modal_text_transform.weight")[0]
    return {
        "vision_config": {
            "hidden_size": width,
            "patch_size": patch,
            "image_size": image_size or round((positions - 1) ** 0.5) * patch,
            "num_hidden_layers": count(state, rf"{visual}transformer\.resblocks\.(\d+)\."),
            "num_attention_heads": width // HEAD_SIZE,
            "intermediate_size": shape(state, f"{visual}transformer.resblocks.0.mlp.c_fc.weight")[0],
            "hidden_act": "quick_gelu",
        },
        "text_config": {
            "vocab_size": words,
            "hidden_size": text_width,
            "max_position_embeddings": shape(state, f"{text}embeddings.position_embeddings.weight")[0],
            "type_vocab_size": shape(state, f"{text}embeddings.token_type_embeddings.weight")[0],
            "num_hidden_layers": count(state, rf"{text}encoder\.layer\.(\d+)\."),
            "num_attention_heads": text_width // HEAD_SIZE,
            "intermediate_size": shape(state, f"{text}encoder.layer.0.intermediate.dense.weight")[0],
        },
        "hidden_size": hidden,
        "num_hidden_layers": count(state, rf"{cross}(\d+)\."),
        "num_attention_heads": hidden // HEAD_SIZE,
        "intermediate_size": shape(state, f"{cross}0.intermediate.dense.weight")[0],
        "use_classifier_token": "token4classifier" in state,
    }


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """`(1 + g², d) -> (1 + grid², d)`: the class token's row as it is, the others bicubic, as METER does when loading.

    Raises:
        ValueError: for a table that is not of a square grid.
    """
    before = round((len(table) - 1) ** 0.5)
    if before**2 + 1 != len(table):
        raise ValueError(f"{len(table)} image positions are no square grid and one class token.")
    if before == grid:
        return table
    patches = table[1:].float().unflatten(0, (before, before)).permute(2, 0, 1)[None]
    resized = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], resized[0].flatten(1).T.to(table.dtype)])
