"""Tiny diffusion transformers of every family that APT has default places for, with inputs for a batch of two."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class TransformerFamily:
    """One row of the table.

    Args:
        class_name: in diffusers.
        config: of a tiny model.
        inputs: keyword arguments of its forward, for a batch of two.
        sites: names of the modules that are adapted by default.
        text_sites: those whose text output APT can correct, too; none where the text has no stream of its own.
        can_checkpoint: whether the bare model of diffusers runs with gradient checkpointing.
    """

    class_name: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    sites: list[str]
    text_sites: tuple[str, ...] = ()
    can_checkpoint: bool = True

    def make(self) -> torch.nn.Module:
        """A model of random weights; zero ones would hide what an adapter does."""
        import diffusers

        torch.manual_seed(0)
        model = getattr(diffusers, self.class_name)(**self.config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() and parameter.abs().max() == 0:
                    parameter.normal_(0, 0.05)
        return model

    def run(self, model: torch.nn.Module) -> torch.Tensor:
        """The prediction, `(2, ...)`."""
        dtype = next(p for p in model.parameters() if p.is_floating_point()).dtype
        output = model(**{key: _cast(value, dtype) for key, value in self.inputs().items()}, return_dict=False)[0]
        return torch.stack(list(output)) if isinstance(output, list | tuple) else output


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_cast(entry, dtype) for entry in value]
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers that do not depend on torch's own generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TIMES = torch.tensor([3, 700])
IMAGE_IDS_3 = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
IMAGE_IDS_4 = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), torch.zeros(1))
TEXT_IDS_4 = torch.cartesian_prod(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.arange(5.0))


def _packed(text_width: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 16, 4),
        "encoder_hidden_states": noise(2, 5, text_width, seed=1),
        "timestep": torch.tensor([0.1, 0.7]),
        **more,
    }


def _spatial(size: int, text_width: int, tokens: int = 5, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, size, size),
        "encoder_hidden_states": noise(2, tokens, text_width, seed=1),
        "timestep": TIMES,
        **more,
    }


TRANSFORMERS = {
    "sd3": TransformerFamily(
        "SD3Transformer2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
            "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32,
            "joint_attention_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 8,
            "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
        lambda: _spatial(8, 32, pooled_projections=noise(2, 16, seed=2)),
        [f"transformer_blocks.{i}.attn" for i in range(3)],
        ("transformer_blocks.0.attn", "transformer_blocks.1.attn"),
    ),
    "flux": TransformerFamily(
        "FluxTransformer2DModel",
        {
            "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 4, 8], "guidance_embeds": True,
        },
        lambda: _packed(
            32, pooled_projections=noise(2, 32, seed=2), guidance=torch.tensor([3.0, 3.0]),
            img_ids=IMAGE_IDS_3, txt_ids=torch.zeros(5, 3),
        ),
        [f"{kind}transformer_blocks.{i}.attn" for kind in ("", "single_") for i in range(2)],
        ("transformer_blocks.0.attn", "transformer_blocks.1.attn"),
    ),
    "chroma": TransformerFamily(
        "ChromaTransformer2DModel",
        {
            "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": [4, 4, 8],
            "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1,
        },
        lambda: _packed(32, img_ids=IMAGE_IDS_3, txt_ids=torch.zeros(5, 3)),
        [*(f"transformer_blocks.{i}.attn" for i in range(2)), "single_transformer_blocks.0.attn"],
        ("transformer_blocks.0.attn", "transformer_blocks.1.attn"),
    ),
    "flux2": TransformerFamily(
        "Flux2Transformer2DModel",
        {
            "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 32, "timestep_guidance_channels": 256,
            "axes_dims_rope": [4, 4, 4, 4],
        },
        lambda: _packed(
            32, guidance=torch.tensor([3.0, 3.0]), img_ids=IMAGE_IDS_4.expand(2, -1, -1),
            txt_ids=TEXT_IDS_4.expand(2, -1, -1),
        ),
        [*(f"transformer_blocks.{i}.attn" for i in range(2)), "single_transformer_blocks.0.attn"],
        ("transformer_blocks.0.attn", "transformer_blocks.1.attn"),
    ),
    "qwen_image": TransformerFamily(
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 16, "guidance_embeds": False, "axes_dims_rope": (8, 4, 4),
        },
        lambda: _packed(16, encoder_hidden_states_mask=torch.ones(2, 5).long(), img_shapes=[(1, 4, 4)] * 2),
        [f"transformer_blocks.{i}.attn" for i in range(3)],
        ("transformer_blocks.0.attn", "transformer_blocks.1.attn"),
    ),
    "z_image": TransformerFamily(
        "ZImageTransformer2DModel",
        {
            "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 32, "n_layers": 2,
            "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "qk_norm": True, "cap_feat_dim": 16,
            "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32],
        },
        lambda: {
            "x": [noise(4, 1, 8, 8, seed=seed) for seed in range(2)],
            "cap_feats": [noise(5, 16, seed=seed + 2) for seed in range(2)],
            "t": torch.tensor([0.1, 0.7]),
        },
        [f"layers.{i}.attention" for i in range(2)],
    ),
    "pixart": TransformerFamily(
        "PixArtTransformer2DModel",
        {
            "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2,
            "in_channels": 4, "cross_attention_dim": 16, "out_channels": 8, "caption_channels": 8,
            "use_additional_conditions": False,
        },
        lambda: _spatial(8, 8, added_cond_kwargs={"aspect_ratio": None, "resolution": None}),
        [f"transformer_blocks.{i}.attn1" for i in range(2)],
    ),
    "sana": TransformerFamily(
        "SanaTransformer2DModel",
        {
            "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8,
            "cross_attention_dim": 16, "caption_channels": 8, "sample_size": 8,
        },
        lambda: _spatial(8, 8),
        [f"transformer_blocks.{i}.attn1" for i in range(2)],
    ),
    "lumina2": TransformerFamily(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2,
            "num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2), "axes_lens": (128, 128, 128), "cap_feat_dim": 16,
        },
        lambda: _spatial(8, 16, encoder_attention_mask=torch.ones(2, 5, dtype=torch.bool)) | {
            "timestep": torch.tensor([0.1, 0.7])
        },
        [f"layers.{i}.attn" for i in range(2)],
    ),
    "aura_flow": TransformerFamily(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 2, "num_single_dit_layers": 1,
            "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32,
            "joint_attention_dim": 16, "out_channels": 4, "pos_embed_max_size": 64,
        },
        lambda: _spatial(8, 16) | {"timestep": torch.tensor([0.1, 0.7])},
        [*(f"joint_transformer_blocks.{i}.attn" for i in range(2)), "single_transformer_blocks.0.attn"],
        ("joint_transformer_blocks.0.attn", "joint_transformer_blocks.1.attn"),
    ),
    "hunyuan_dit": TransformerFamily(
        "HunyuanDiT2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 2, "cross_attention_dim": 8, "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4, "hidden_size": 16, "text_len": 4, "text_len_t5": 4,
        },
        lambda: _spatial(
            8, 8, 4, text_embedding_mask=torch.ones(2, 4), encoder_hidden_states_t5=noise(2, 4, 8, seed=3),
            text_embedding_mask_t5=torch.ones(2, 4), style=torch.zeros(2, dtype=torch.long),
            image_meta_size=torch.tensor([[1024.0, 1024, 16, 16, 0, 0]] * 2),
            image_rotary_emb=[torch.ones(16, 8), torch.zeros(16, 8)],
        ) | {"timestep": TIMES.float()},
        [f"blocks.{i}.attn1" for i in range(2)],
        can_checkpoint=False,
    ),
    "hunyuan_image": TransformerFamily(
        "HunyuanImageTransformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
            "num_single_layers": 1, "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": (1, 1),
            "text_embed_dim": 16, "rope_axes_dim": (8, 8), "guidance_embeds": False,
        },
        lambda: _spatial(4, 16, encoder_attention_mask=torch.ones(2, 5)) | {"timestep": TIMES.float()},
        [*(f"transformer_blocks.{i}.attn" for i in range(2)), "single_transformer_blocks.0.attn"],
        ("transformer_blocks.0.attn", "transformer_blocks.1.attn"),
        can_checkpoint=False,
    ),
    "cogview4": TransformerFamily(
        "CogView4Transformer2DModel",
        {
            "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 4,
            "out_channels": 4, "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 4,
        },
        lambda: _spatial(
            8, 8, original_size=torch.full((2, 2), 64), target_size=torch.full((2, 2), 64),
            crop_coords=torch.zeros(2, 2, dtype=torch.long),
        ),
        [f"transformer_blocks.{i}.attn1" for i in range(3)],
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
    ),
    "hidream": TransformerFamily(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 1,
            "attention_head_dim": 8, "num_attention_heads": 4, "caption_channels": [8, 4], "text_emb_dim": 8,
            "num_routed_experts": 2, "num_activated_experts": 2, "axes_dims_rope": (4, 2, 2),
            "max_resolution": (8, 8), "llama_layers": (0, 1), "force_inference_output": True,
        },
        lambda: {
            "hidden_states": noise(2, 4, 8, 8), "timesteps": TIMES, "pooled_embeds": noise(2, 8, seed=4),
            "encoder_hidden_states_t5": noise(2, 5, 8, seed=1),
            "encoder_hidden_states_llama3": noise(2, 2, 5, 4, seed=2),
        },
        [*(f"double_stream_blocks.{i}.block.attn1" for i in range(2)), "single_stream_blocks.0.block.attn1"],
        ("double_stream_blocks.0.block.attn1", "double_stream_blocks.1.block.attn1"),
    ),
    "wan": TransformerFamily(
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
            "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
            "cross_attn_norm": True, "rope_max_seq_len": 32,
        },
        lambda: {
            "hidden_states": noise(2, 4, 2, 8, 8), "encoder_hidden_states": noise(2, 5, 16, seed=1), "timestep": TIMES,
        },
        [f"blocks.{i}.attn1" for i in range(2)],
    ),
    "ltx": TransformerFamily(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
            "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 16,
        },
        lambda: {
            "hidden_states": noise(2, 2 * 4 * 4, 4), "encoder_hidden_states": noise(2, 5, 16, seed=1),
            "timestep": TIMES, "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
            "num_frames": 2, "height": 4, "width": 4,
        },
        [f"transformer_blocks.{i}.attn1" for i in range(2)],
    ),
}  # fmt: skip
