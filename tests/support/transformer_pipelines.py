"""Tiny whole pipelines of diffusion transformers: real tokenizers, text encoders and VAEs, of random weights."""

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from conftest import make_text_encoder, make_tokenizer

from .transformer_families import TRANSFORMERS

LETTERS = [chr(code) for code in range(32, 127)]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)
LANGUAGE_MODEL = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


# What a drawing needs beside its prompt: a picture of few tokens, a short text, layers that the text encoder has.
SMALL = {"height": 16, "width": 16, "max_sequence_length": 32}
EXACT = {"use_resolution_binning": False, "clean_caption": False}
INPUTS: dict[str, dict[str, Any]] = {
    "sd3-tiny": SMALL,
    "flux": SMALL,
    "flux2": SMALL | {"text_encoder_out_layers": (1, 2)},
    "flux2-klein": SMALL | {"text_encoder_out_layers": (1, 2)},
    "qwen-image": SMALL | {"negative_prompt": "dark", "true_cfg_scale": 2.0},
    "z-image": SMALL,
    "pixart-sigma": SMALL | EXACT,
    "sana": SMALL | EXACT | {"height": 32, "width": 32, "complex_human_instruction": None},
    "chroma": SMALL,
    "aura-flow": SMALL,
    "lumina2": SMALL
    | {"height": 64, "width": 64, "system_prompt": "draw"},  # the pipeline counts 8 pixels to a latent
    "cogview4": SMALL | {"negative_prompt": "dark"},
    "pixart-alpha": SMALL | EXACT,
    "wan": SMALL | {"num_frames": 5},
    "wan-2": SMALL | {"num_frames": 5},
    "ltx": SMALL | {"num_frames": 5, "height": 32, "width": 32},
}


def transformer(family: str, **changes: Any) -> torch.nn.Module:
    """The tiny transformer of the tests of denoisers, with other settings where the pipeline needs them."""
    row = TRANSFORMERS[family]
    return dataclasses.replace(row, config=row.config | changes).make()


def t5(width: int) -> tuple[Any, Any]:
    """A T5 encoder, and a tokenizer of single letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab = [*special, *((letter, -3.0) for letter in LETTERS[1:])]
    tokenizer = transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=64)
    config = transformers.T5Config(
        vocab_size=100, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5EncoderModel(config).eval(), tokenizer


def qwen_tokenizer() -> Any:
    """A byte-level tokenizer without merges, as Qwen's."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {token: index for index, token in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=2048)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def flow(**settings: Any) -> Any:
    """The scheduler of all flow-matching pipelines."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def vae(latent_channels: int = 4, cls: str = "AutoencoderKL", **settings: Any) -> Any:
    """A VAE that halves the picture."""
    torch.manual_seed(1)
    return getattr(diffusers, cls)(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=latent_channels, layers_per_block=1,
        norm_num_groups=4, sample_size=16, **settings,
    ).eval()  # fmt: skip


def sd3(folder: Path) -> Any:
    """Stable Diffusion 3 as published: 16 latent channels, two CLIPs and T5."""
    encoder, tokenizer = t5(64)
    clips: dict[str, Any] = {}
    for suffix in ("", "_2"):
        clips[f"tokenizer{suffix}"] = clip_tokenizer = make_tokenizer(folder / f"tokenizer{suffix}")
        config = make_text_encoder(len(clip_tokenizer)).config.to_dict() | {"projection_dim": 32}
        model = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))
        clips[f"text_encoder{suffix}"] = model.eval()
    widths = {"in_channels": 16, "out_channels": 16, "joint_attention_dim": 64, "pooled_projection_dim": 64}
    return diffusers.StableDiffusion3Pipeline(
        scheduler=flow(), vae=vae(16, shift_factor=0.1, scaling_factor=1.5), **clips, text_encoder_3=encoder,
        tokenizer_3=tokenizer, transformer=transformer("sd3", **widths),
    )  # fmt: skip


def flux(folder: Path) -> Any:
    """Flux.1: CLIP gives the pooled text, T5 the tokens."""
    encoder, tokenizer = t5(32)
    clip_tokenizer = make_tokenizer(folder / "tokenizer")
    return diffusers.FluxPipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=vae(1, shift_factor=0.1, scaling_factor=1.5),
        text_encoder=make_text_encoder(len(clip_tokenizer)), tokenizer=clip_tokenizer, text_encoder_2=encoder,
        tokenizer_2=tokenizer, transformer=transformer("flux"),
    )  # fmt: skip


def flux2(folder: Path) -> Any:
    """Flux.2: hidden states of two layers of Mistral."""
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8, "model_type": "pixtral",
    }  # fmt: skip
    config = transformers.Mistral3Config(text_config=LANGUAGE_MODEL | {"model_type": "mistral"}, vision_config=vision)
    return diffusers.Flux2Pipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=vae(1, "AutoencoderKLFlux2"),
        text_encoder=transformers.Mistral3ForConditionalGeneration(config).eval(), tokenizer=qwen_tokenizer(),
        transformer=transformer("flux2"),
    )  # fmt: skip


def flux2_klein(folder: Path) -> Any:
    """Flux.2 Klein: hidden states of two layers of Qwen3."""
    return diffusers.Flux2KleinPipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=vae(1, "AutoencoderKLFlux2"),
        text_encoder=qwen3(), tokenizer=qwen_tokenizer(), transformer=transformer("flux2"),
    )  # fmt: skip


def qwen3() -> Any:
    """A Qwen3."""
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LANGUAGE_MODEL, head_dim=8)).eval()


def qwen_image(folder: Path) -> Any:
    """Qwen-Image: Qwen2.5-VL reads the prompt, the VAE has a time axis."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16, "patch_size": 8,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=LANGUAGE_MODEL | {"rope_parameters": rope}, vision_config=vision, image_token_id=1,
        video_token_id=2, vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip
    torch.manual_seed(1)
    autoencoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=1, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.1],
        latents_std=[0.9],
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=autoencoder.eval(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config).eval(), tokenizer=qwen_tokenizer(),
        transformer=transformer("qwen_image", out_channels=1),
    )  # fmt: skip


def z_image(folder: Path) -> Any:
    """Z-Image: Qwen3, and inputs in lists."""
    return diffusers.ZImagePipeline(
        scheduler=flow(), vae=vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**LANGUAGE_MODEL, head_dim=8)).eval(),
        tokenizer=qwen_tokenizer(), transformer=transformer("z_image"),
    )  # fmt: skip


def pixart_sigma(folder: Path) -> Any:
    """PixArt-Σ: T5, and a noise prediction with its variance."""
    encoder, tokenizer = t5(8)
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae(), transformer=transformer("pixart"),
        scheduler=diffusers.DDIMScheduler(),
    )  # fmt: skip


def gemma2(width: int) -> tuple[Any, Any]:
    """A Gemma 2, and a tokenizer of single letters and bytes."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: index for index, token in enumerate([*special, *LETTERS[1:]])}
    config = transformers.Gemma2Config(
        **LANGUAGE_MODEL | {"vocab_size": 400, "hidden_size": width, "eos_token_id": 1, "bos_token_id": 2}, head_dim=4
    )
    tokenizer = transformers.GemmaTokenizer(vocab=vocab, merges=[], model_max_length=2048)
    return transformers.Gemma2Model(config).eval(), tokenizer


def sana(folder: Path) -> Any:
    """Sana: Gemma 2, linear attention, and a deep-compression VAE."""
    encoder, tokenizer = gemma2(8)
    torch.manual_seed(1)
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=4, encoder_block_types=("ResBlock", "ResBlock"), decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        upsample_block_type="interpolate", downsample_block_type="stride_conv", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.4,
    )  # fmt: skip
    return diffusers.SanaPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=autoencoder.eval(),
        transformer=transformer("sana"), scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )  # fmt: skip


def chroma(folder: Path) -> Any:
    """Chroma: Flux.1 with T5 alone."""
    encoder, tokenizer = t5(32)
    return diffusers.ChromaPipeline(
        scheduler=flow(), vae=vae(1, shift_factor=0.1, scaling_factor=1.5), text_encoder=encoder, tokenizer=tokenizer,
        transformer=transformer("chroma"),
    )  # fmt: skip


def umt5(width: int) -> tuple[Any, Any]:
    """A UMT5 encoder, and T5's tokenizer."""
    config = transformers.UMT5Config(
        vocab_size=100, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.UMT5EncoderModel(config).eval(), t5(width)[1]


def aura_flow(folder: Path) -> Any:
    """AuraFlow: UMT5."""
    encoder, tokenizer = umt5(16)
    return diffusers.AuraFlowPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae(), transformer=transformer("aura_flow"), scheduler=flow()
    )


def wan(folder: Path) -> Any:
    """Wan, video: UMT5, and a VAE that takes two frames together."""
    encoder, tokenizer = umt5(16)
    torch.manual_seed(1)
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_spatial=4, scale_factor_temporal=2,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    return diffusers.WanPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=autoencoder.eval(), scheduler=scheduler,
        transformer=transformer("wan"),
    )  # fmt: skip


def wan_in_two(folder: Path) -> Any:
    """Wan 2.2: one transformer for the noisy half of the steps, another for the rest."""
    return diffusers.WanPipeline(
        **wan(folder).components | {"transformer_2": transformer("wan", cross_attn_norm=False)}, boundary_ratio=0.9
    )


def ltx(folder: Path) -> Any:
    """LTX, video: T5."""
    encoder, tokenizer = t5(16)
    torch.manual_seed(1)
    scaling = {f"{kind}spatio_temporal_scaling": (True, True, False, False) for kind in ("", "decoder_")}
    autoencoder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1, patch_size_t=1, **scaling,
    )  # fmt: skip
    return diffusers.LTXPipeline(
        scheduler=flow(), vae=autoencoder.eval(), text_encoder=encoder, tokenizer=tokenizer,
        transformer=transformer("ltx"),
    )  # fmt: skip


def lumina2(folder: Path) -> Any:
    """Lumina 2: Gemma 2."""
    encoder, tokenizer = gemma2(16)
    return diffusers.Lumina2Pipeline(
        transformer=transformer("lumina2"), scheduler=flow(), vae=vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=encoder, tokenizer=tokenizer,
    )  # fmt: skip


def cogview4(folder: Path) -> Any:
    """CogView4: GLM."""
    config = transformers.GlmConfig(**LANGUAGE_MODEL | {"hidden_size": 8}, head_dim=8)
    return diffusers.CogView4Pipeline(
        tokenizer=qwen_tokenizer(), text_encoder=transformers.GlmModel(config).eval(), vae=vae(),
        transformer=transformer("cogview4"), scheduler=flow(use_dynamic_shifting=True, time_shift_type="linear"),
    )  # fmt: skip


def pixart_alpha(folder: Path) -> Any:
    """PixArt-α: the modules of PixArt-Σ."""
    sigma = pixart_sigma(folder)
    return diffusers.PixArtAlphaPipeline(**sigma.components)


PIPELINES = {
    "sd3-tiny": sd3, "flux": flux, "flux2": flux2, "flux2-klein": flux2_klein, "qwen-image": qwen_image,
    "z-image": z_image, "pixart-sigma": pixart_sigma, "sana": sana, "chroma": chroma, "aura-flow": aura_flow,
    "lumina2": lumina2, "cogview4": cogview4, "pixart-alpha": pixart_alpha, "wan": wan,
    "wan-2": wan_in_two, "ltx": ltx,
}  # fmt: skip


def acting(module: torch.nn.Module) -> torch.nn.Module:
    """The same module with small weights where published ones start at zero."""
    torch.manual_seed(4)
    for parameter in module.parameters():
        if parameter.numel() and parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter.data, std=0.1)
    return module.eval()


def sd3_controlnet(pipeline: Any, conditions: int = 0) -> dict[str, Any]:
    """A ControlNet of this pipeline's transformer."""
    torch.manual_seed(7)
    net = diffusers.SD3ControlNetModel.from_transformer(
        pipeline.transformer, num_layers=2, num_extra_conditioning_channels=conditions
    )
    for block in net.controlnet_blocks:
        torch.nn.init.normal_(block.weight, std=0.1)
    return {"controlnet": net.eval()}


def sd3_inpaint_controlnet(pipeline: Any) -> dict[str, Any]:
    """A ControlNet that reads the mask, too."""
    return sd3_controlnet(pipeline, conditions=1)


def flux_controlnet(pipeline: Any) -> dict[str, Any]:
    """A ControlNet of this pipeline's transformer."""
    net = diffusers.FluxControlNetModel.from_transformer(
        pipeline.transformer, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2
    )
    return {"controlnet": acting(net)}


def flux_control(pipeline: Any) -> dict[str, Any]:
    """The transformer of `Flux.1 ... Control`, which reads the latents of a second picture."""
    return {"transformer": transformer("flux", in_channels=8, out_channels=4)}


def flux_fill(pipeline: Any) -> dict[str, Any]:
    """The transformer of `Flux.1 Fill`: latents, those of the masked picture, and a mask of 2 x 2 pixels for each."""
    return {"transformer": transformer("flux", in_channels=4 + 4 + 16, out_channels=4)}


def cogview4_control(pipeline: Any) -> dict[str, Any]:
    """The transformer of CogView4 Control, which reads the latents of a second picture."""
    return {"transformer": transformer("cogview4", in_channels=8)}


def qwen_controlnet(pipeline: Any, **more: Any) -> dict[str, Any]:
    """A ControlNet of this pipeline's transformer."""
    net = diffusers.QwenImageControlNetModel.from_transformer(
        pipeline.transformer, num_layers=1, attention_head_dim=16, num_attention_heads=2, **more
    )
    return {"controlnet": acting(net)}


def qwen_inpaint_controlnet(pipeline: Any) -> dict[str, Any]:
    """A ControlNet that reads the mask, too."""
    return qwen_controlnet(pipeline, extra_condition_channels=4)


def z_controlnet(pipeline: Any, **changes: Any) -> dict[str, Any]:
    """A ControlNet of this pipeline's transformer."""
    net = diffusers.ZImageControlNetModel(
        control_layers_places=[0], control_refiner_layers_places=[0], dim=32, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, all_patch_size=(2,), all_f_patch_size=(1,), **{"control_in_dim": 4, **changes},
    )  # fmt: skip
    return {"controlnet": diffusers.ZImageControlNetModel.from_transformer(acting(net), pipeline.transformer)}


def z_inpaint_controlnet(pipeline: Any) -> dict[str, Any]:
    """A ControlNet that reads the masked picture and the mask, too."""
    return z_controlnet(pipeline, control_in_dim=4 + 4 + 1, add_control_noise_refiner="control_noise_refiner")


def sana_controlnet(pipeline: Any) -> dict[str, Any]:
    """A ControlNet with the widths of this pipeline's transformer."""
    config = {name: value for name, value in pipeline.transformer.config.items() if name not in ("num_layers",)}
    return {"controlnet": acting(diffusers.SanaControlNetModel.from_config(config | {"num_layers": 1}))}


def sana_sprint(pipeline: Any) -> dict[str, Any]:
    """Sana Sprint's transformer, which reads the guidance, and its scheduler."""
    return {
        "transformer": transformer("sana", guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        "scheduler": diffusers.SCMScheduler(prediction_type="trigflow", sigma_data=0.5),
    }


def save(kind: str, folder: Path) -> Path:
    """Writes a tiny pipeline, one of `PIPELINES`, into `folder`."""
    torch.manual_seed(0)
    PIPELINES[kind](folder).save_pretrained(folder)
    return folder
