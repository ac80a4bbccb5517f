"""Initialises the miniature ViLT and METER from a CLIP's vision tower; the real models start from a ViT and a CLIP."""

import torch
from torch import Tensor, nn

from .world import render, sample_scenes

TAKEN = 4  # layers of CLIP's five; those above are about CLIP's own pooled token
PARTS = {
    "layer_norm1": "layernorm_before",
    "self_attn.q_proj": "attention.attention.query",
    "self_attn.k_proj": "attention.attention.key",
    "self_attn.v_proj": "attention.attention.value",
    "self_attn.out_proj": "attention.output.dense",
    "layer_norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def start_meter(meter: nn.Module, clip_vision: nn.Module) -> None:
    """Copies CLIP's vision tower without its last layer into METER's vision tower; the copy is exact."""
    tower = clip_vision.state_dict()
    own = meter.meter.vision_model.state_dict()
    meter.meter.vision_model.load_state_dict({name: tower[name] for name in own})


@torch.no_grad()
def start_vilt(vilt: nn.Module, clip_vision: nn.Module) -> None:
    """Copies CLIP's vision tower into ViLT, approximately: CLIP's first norm is folded into ViLT's embeddings.

    ViLT has no norm there, so the norm's data-dependent deviation is replaced by its mean over drawn pictures.
    """
    embed, norm, target = clip_vision.embeddings, clip_vision.pre_layrnorm, vilt.vilt.embeddings
    generator = torch.Generator().manual_seed(0)
    spread = embed(render(sample_scenes(256, generator), generator)).std(-1).mean()

    def normed(values: Tensor, channel: int) -> Tensor:
        weight = norm.weight.view(-1, *[1] * (values.ndim - 1 - channel))
        return (values - values.mean(channel, keepdim=True)) / spread * weight

    target.patch_embeddings.projection.weight.copy_(normed(embed.patch_embedding.weight, 0))
    target.patch_embeddings.projection.bias.zero_()
    target.cls_token.copy_(normed(embed.class_embedding, 0))
    target.position_embeddings.copy_(normed(embed.position_embedding.weight, 1) + norm.bias)
    for layer, taken in zip(vilt.vilt.encoder.layer, clip_vision.encoder.layers[:TAKEN], strict=False):
        for theirs, ours in PARTS.items():
            layer.get_submodule(ours).load_state_dict(taken.get_submodule(theirs).state_dict())
