"""Runs in a process of its own with a real ComfyUI checkout: the embedded model against diffusers, as JSON lines.

python tests/support/comfyui_embedded.py COMFYUI_PATH FOLDER
"""

from comfyui_checkout import FOLDER, report

# isort: split
import comfyui.nodes as apt_nodes
import folder_paths
import nodes
import numpy as np
import torch
from comfyui.embedded import folder_of

import apt_diffusion as apt

MODEL = "miniature-emoji"
PROMPT, NEGATIVE, SEED, STEPS, CFG = "a large sks toy on a pink background", "", 5, 4, 3.0


def graph(model, clip, vae, latent) -> torch.Tensor:
    """What the nodes of a text-to-image workflow draw."""
    [positive] = nodes.CLIPTextEncode().encode(clip, PROMPT)
    [negative] = nodes.CLIPTextEncode().encode(clip, NEGATIVE)
    [samples] = nodes.KSampler().sample(model, SEED, STEPS, CFG, "euler", "simple", positive, negative, latent)
    [images] = nodes.VAEDecode().decode(vae, samples)
    return images[0]


@torch.inference_mode()
def main() -> None:
    """Draws both ways, bare and with an adapter of UNet and text encoder."""
    pipeline = apt.StableDiffusionAPTPipeline.from_pretrained(
        folder_of(MODEL), dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    unet = pipeline.unet.config
    noise = torch.randn(1, unet.in_channels, unet.sample_size, unet.sample_size, generator=torch.manual_seed(SEED))

    def draw() -> torch.Tensor:
        images = pipeline(
            PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=CFG, latents=noise,
            output_type="np",
        ).images  # fmt: skip
        return torch.from_numpy(np.asarray(images[0]))

    folder_paths.models_dir = str(FOLDER / "models")
    exact = draw()
    nothing = torch.zeros_like(exact)
    # ComfyUI's stand-in for a signal of zero at the first step, so that the rest can be compared closely.
    pipeline.scheduler.alphas_cumprod[-1] = 4.8973451890853435e-08
    base = draw()
    model, clip, vae, latent = apt_nodes.LoadEmbeddedModel().load(MODEL)
    bare = graph(model, clip, vae, latent)
    report("the bare model", bare, exact, nothing)
    report("the bare model from ComfyUI's first step", bare, base, nothing)
    [encoded] = nodes.VAEEncode().encode(vae, base[None])
    reference = pipeline.vae.encode(base[None].movedim(-1, 1) * 2 - 1).latent_dist.mean
    report("an encoded picture", encoded["samples"], reference, torch.zeros_like(reference))
    with torch.inference_mode(False):
        apt.add_apt(pipeline, apt.APTConfig(num_prompts=8, rank=2, init="paper"), "toy")
        torch.manual_seed(2)
        with torch.no_grad():
            for part in (pipeline.unet, pipeline.text_encoder):
                for name, parameter in part.named_parameters():
                    if ".toy." in name:
                        parameter.normal_(0, 0.02 if "prompts" in name else 0.3)
        pipeline.save_apt_weights(FOLDER / "models" / "apt" / "toy", "toy")
    file = "toy/pytorch_apt_weights.safetensors"
    patched = apt_nodes.LoadAPTAdapter().load(model, file, 1.0, 1.0, clip)
    report("with an adapter", graph(*patched, vae, latent), draw(), base)


if __name__ == "__main__":
    main()
