"""Runs in a process of its own with a real ComfyUI checkout: its models and graph against diffusers, as JSON lines.

python tests/support/comfyui_graph.py COMFYUI_PATH FOLDER
"""

from pathlib import Path

from comfyui_checkout import COMFYUI, FOLDER, report

# isort: split
import comfy.diffusers_convert
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import comfyui.nodes as apt_nodes
import folder_paths
import nodes
import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import apt_diffusion as apt

PROMPT, NEGATIVE, SEED, STEPS, CFG = "a photo of sks dog", "blurry", 5, 2, 4.0


def randomize(model: torch.nn.Module, adapter: str) -> None:
    """Random weights for one adapter."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.normal_(0, 0.02 if "prompts" in name else 0.3)


def make_pipeline():
    """Stable Diffusion 1.5 with its text encoder and autoencoder, and two blocks of its UNet; random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(320, 320), layers_per_block=1, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=768, attention_head_dim=8,
    )  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
        vocab_size=49408, hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407,
    ))  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipeline = apt.StableDiffusionAPTPipeline(
        vae=vae.eval(), text_encoder=text.eval(), unet=unet.eval(), scheduler=scheduler, safety_checker=None,
        tokenizer=CLIPTokenizer.from_pretrained(COMFYUI / "comfy" / "sd1_tokenizer", model_max_length=77),
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def export(pipeline, file: Path) -> None:
    """One checkpoint in the LDM layout."""
    config = {"num_res_blocks": [1, 1], "channel_mult": [1, 1], "transformer_depth": [0, 1],
              "transformer_depth_output": [0, 0, 1, 1], "transformer_depth_middle": 1}  # fmt: skip
    names = comfy.utils.unet_to_diffusers(config)
    state = {f"model.diffusion_model.{names[key]}": value for key, value in pipeline.unet.state_dict().items()}
    vae = comfy.diffusers_convert.convert_vae_state_dict(pipeline.vae.state_dict())
    state |= {f"first_stage_model.{key}": value for key, value in vae.items()}
    text = pipeline.text_encoder.state_dict()
    state |= {
        f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}": value
        for key, value in text.items()
    }
    save_file({key: value.contiguous() for key, value in state.items()}, file)


def diffusers_picture(pipeline) -> torch.Tensor:
    """`(64, 64, 3)`, from ComfyUI's noise."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(SEED))
    pipeline.scheduler.set_timesteps(STEPS)
    latents = noise * (1 + pipeline.scheduler.sigmas[0] ** 2) ** 0.5 / pipeline.scheduler.init_noise_sigma
    images = pipeline(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=CFG, latents=latents,
        height=64, width=64, output_type="np",
    ).images  # fmt: skip
    return torch.from_numpy(np.asarray(images[0]))


def graph(model, clip, vae) -> torch.Tensor:
    """What the nodes of a text-to-image workflow draw."""
    [positive] = nodes.CLIPTextEncode().encode(clip, PROMPT)
    [negative] = nodes.CLIPTextEncode().encode(clip, NEGATIVE)
    [latent] = nodes.EmptyLatentImage().generate(64, 64)
    [samples] = nodes.KSampler().sample(model, SEED, STEPS, CFG, "euler", "normal", positive, negative, latent)
    [images] = nodes.VAEDecode().decode(vae, samples)
    return images[0]


@torch.inference_mode()
def main() -> None:
    """Writes an adapter and a checkpoint, and draws both ways."""
    pipeline = make_pipeline()
    folder_paths.models_dir = str(FOLDER / "models")
    folder_paths.folder_names_and_paths["checkpoints"] = ([str(FOLDER)], {".safetensors"})
    export(pipeline, FOLDER / "base.safetensors")
    base = diffusers_picture(pipeline)
    loaded = nodes.CheckpointLoaderSimple().load_checkpoint("base.safetensors")
    model, clip, vae = loaded[:3]
    report("the bare graph", graph(model, clip, vae), base, torch.zeros_like(base))
    with torch.inference_mode(False):
        for name, config in {
            "dog": apt.APTConfig(num_prompts=8, rank=2, init="paper"),
            "context": {
                "unet": apt.APTConfig(num_prompts=5, streams=["query", "context"], query_source="attn_output"),
            },
        }.items():
            apt.add_apt(pipeline, config, name)
            randomize(pipeline.unet, name)
            randomize(pipeline.text_encoder, name)
            pipeline.save_apt_weights(
                FOLDER / "models" / "apt" / name, name, {"instance_prompt": "a photo of sks dog"}
            )
    load = apt_nodes.LoadAPTAdapter().load
    files = {name: f"{name}/pytorch_apt_weights.safetensors" for name in ("dog", "context")}

    pipeline.set_apt_adapters("dog", 0.8)
    expected = diffusers_picture(pipeline)
    patched = load(model, files["dog"], 0.8, 0.8, clip)
    report("one adapter", graph(*patched, vae), expected, base)

    pipeline.set_apt_adapters(["dog", "context"], [0.8, -0.5])
    report(
        "two adapters",
        graph(*load(patched[0], files["context"], -0.5, 1.0, patched[1]), vae),
        diffusers_picture(pipeline),
        base,
    )

    pipeline.disable_apt()
    report("the original after it", graph(model, clip, vae), base, torch.zeros_like(base))

    pipeline.enable_apt()
    pipeline.set_apt_adapters("dog", {"unet": 0.0, "text_encoder": 0.8})
    [nowhere] = apt_nodes.APTStrengthSchedule().add(0.999, 1.0, 1.0)
    report(
        "a schedule that rests",
        graph(*load(model, files["dog"], 0.8, 0.8, clip, nowhere), vae),
        diffusers_picture(pipeline),
        base,
    )
    [whole] = apt_nodes.APTStrengthSchedule().add(0.0, 1.0, 1.0)
    report("a schedule of all steps", graph(*load(model, files["dog"], 0.8, 0.8, clip, whole), vae), expected, base)


if __name__ == "__main__":
    main()
