"""Writes a pipeline of diffusers as one checkpoint in the layout of the models' first authors ("LDM").

The inverse of diffusers' conversion, by the rules of that layout, independent of its code.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}  # fmt: skip

SD3 = {
    "pos_embed.proj": "x_embedder.proj", "pos_embed.pos_embed": "pos_embed", "proj_out": "final_layer.linear",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2", "norm_out.linear": "final_layer.adaLN_modulation.1",
    "context_embedder": "context_embedder",
}  # fmt: skip
SD3_BLOCK = {
    "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k", "attn.to_out.0": "x_block.attn.proj",
    "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_add_out": "context_block.attn.proj", "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1", "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2", "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2", "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k", "attn2.to_out.0": "x_block.attn2.proj",
}  # fmt: skip


def unet_name(name: str, layers: int, attended: set[int]) -> str:
    """LDM's name of a parameter of the UNet; `attended`: up blocks with attention; `layers` per down block."""
    name = re.sub(r"(?<=\.)(norm1|conv1|time_emb_proj|norm2|conv2|conv_shortcut)(?=\.(weight|bias)$)",
                  lambda m: RESNET[m[1]] if "resnets" in name else m[1], name)  # fmt: skip
    for ours, theirs in UNET.items():
        name = re.sub(rf"^{re.escape(ours)}\.", f"{theirs}.", name)
    name = re.sub(r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}", name)
    name = re.sub(r"^mid_block\.attentions\.0", "middle_block.1", name)
    for part, place in (("resnets", 0), ("attentions", 1)):
        match = re.match(rf"(down|up)_blocks\.(\d)\.{part}\.(\d)", name)
        if match:
            down = match[1] == "down"  # whose blocks follow the first convolution
            index = int(match[2]) * (layers + 1) + int(match[3]) + (1 if down else 0)
            name = f"{'input' if down else 'output'}_blocks.{index}.{place}{name[match.end() :]}"
    name = re.sub(r"^down_blocks\.(\d)\.downsamplers\.0\.conv",
                  lambda m: f"input_blocks.{(int(m[1]) + 1) * (layers + 1)}.0.op", name)  # fmt: skip
    return re.sub(
        r"^up_blocks\.(\d)\.upsamplers\.0\.conv",
        lambda m: f"output_blocks.{int(m[1]) * (layers + 1) + layers}.{2 if int(m[1]) in attended else 1}.conv", name,
    )  # fmt: skip


def vae_name(name: str, blocks: int) -> str:
    """LDM's name of a parameter of the autoencoder with so many blocks a side."""
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    for ours, theirs in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        name = name.replace(f"mid_block.attentions.0.{ours}", f"mid.attn_1.{theirs}")
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)


def unet_state(unet) -> dict[str, Tensor]:
    attended = {i for i, block in enumerate(unet.up_blocks) if getattr(block, "has_cross_attention", False)}
    layers = unet.config.layers_per_block
    return {
        f"model.diffusion_model.{unet_name(name, layers, attended)}": value
        for name, value in unet.state_dict().items()
    }


def vae_state(vae) -> dict[str, Tensor]:
    state = {}
    for name, value in vae.state_dict().items():
        ldm = vae_name(name, len(vae.config.block_out_channels))
        is_map = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", ldm)
        state[f"first_stage_model.{ldm}"] = value[..., None, None] if is_map else value
    return state


def clip_state(text_encoder, prefix: str) -> dict[str, Tensor]:
    state = text_encoder.state_dict()
    return {
        f"{prefix}text_model.{name.removeprefix('text_model.')}": value
        for name, value in state.items()
        if not name.startswith("text_projection")
    }


def open_clip_state(text_encoder, prefix: str) -> dict[str, Tensor]:
    own = {name.removeprefix("text_model."): value for name, value in text_encoder.state_dict().items()}
    state = {
        "token_embedding.weight": own["embeddings.token_embedding.weight"],
        "positional_embedding": own["embeddings.position_embedding.weight"],
        "ln_final.weight": own["final_layer_norm.weight"],
        "ln_final.bias": own["final_layer_norm.bias"],
    }
    if "text_projection.weight" in own:
        state["text_projection"] = own["text_projection.weight"].T
    for layer in range(text_encoder.config.num_hidden_layers):
        here, there = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            for ours, theirs in OPEN_CLIP.items():
                state[f"{there}.{theirs}.{kind}"] = own[f"{here}.{ours}.{kind}"]
            parts = [own[f"{here}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"{there}.attn.in_proj_{kind}"] = torch.cat(parts)
    return {prefix + name: value for name, value in state.items()}


def sd3_state(transformer) -> dict[str, Tensor]:
    """Scale and shift of the last modulations stand in the other order, queries, keys and values in one map."""
    own, last = transformer.state_dict(), len(transformer.transformer_blocks) - 1
    state = {}
    for name, value in own.items():
        block, module, kind = re.match(r"(?:transformer_blocks\.(\d+)\.)?(.*?)(?:\.(weight|bias))?$", name).groups()
        if block is None:
            there = SD3[module]
        elif module in SD3_BLOCK:
            there = f"joint_blocks.{block}.{SD3_BLOCK[module]}"
        else:
            continue
        if module == "norm_out.linear" or (module == "norm1_context.linear" and int(block) == last):
            value = torch.cat(value.chunk(2)[::-1])
        state[f"{there}.{kind}" if kind else there] = value
    fused = {
        "x_block.attn": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "context_block.attn": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "x_block.attn2": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    }
    for block in range(last + 1):
        for there, maps in fused.items():
            for kind in ("weight", "bias"):
                if f"transformer_blocks.{block}.{maps[0]}.{kind}" in own:
                    parts = [own[f"transformer_blocks.{block}.{part}.{kind}"] for part in maps]
                    state[f"joint_blocks.{block}.{there}.qkv.{kind}"] = torch.cat(parts)
    return {f"model.diffusion_model.{name}": value for name, value in state.items()}


def ldm_state(pipeline) -> dict[str, Tensor]:
    """All tensors of a Stable Diffusion 1, XL or 3."""
    if hasattr(pipeline, "transformer"):
        state = sd3_state(pipeline.transformer) | vae_state(pipeline.vae)
        state |= clip_state(pipeline.text_encoder, "text_encoders.clip_l.transformer.")
        state |= clip_state(pipeline.text_encoder_2, "text_encoders.clip_g.transformer.")
        projection = pipeline.text_encoder_2.text_projection.weight
        state["text_encoders.clip_g.transformer.text_projection.weight"] = projection
        for name, value in pipeline.text_encoder_3.state_dict().items():
            state[f"text_encoders.t5xxl.transformer.{name}"] = value
        return {name: value.detach().clone().contiguous() for name, value in state.items()}
    state = unet_state(pipeline.unet) | vae_state(pipeline.vae)
    if getattr(pipeline, "text_encoder_2", None) is None:
        state |= clip_state(pipeline.text_encoder, "cond_stage_model.transformer.")
    else:
        state |= clip_state(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        state |= open_clip_state(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def write_single_file(pipeline, file: Path, metadata: dict[str, str] | None = None, **more: Tensor) -> Path:
    """As `.safetensors` or, by its name, `.ckpt`; `more` are further tensors of the checkpoint."""
    state = ldm_state(pipeline) | more
    if file.suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 1}, file)
    else:
        save_file(state, file, metadata=metadata)
    return file
