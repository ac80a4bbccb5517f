#!/usr/bin/env python
"""Steps per second and peak memory of training: this library compared with diffusers' LoRA scripts for DreamBooth.

    python benchmarks/training_speed.py                  # all shapes, float32 and bf16; --only SDXL for one model

The peer's step is done with the peer's libraries: VAE encoding in every step, for Stable Diffusion 1.5 and the
embedded model text encoding, too (the scripts for SDXL and SD3 encode the one prompt before the first step), LoRA of
rank 4 on all attention projections of the denoiser. Ours reads kept latents and embeddings and trains APT with the
defaults. Shapes are those of Stable Diffusion 1.5, of SDXL with 1 and 2 in place of 2 and 10 transformer blocks a
stage, of SD 3.5 medium with 4 of its 24 blocks, and of the embedded model; one picture a step. In bf16 the VAE of SDXL
and SD3 stays in float32, as in the scripts. Peak memory is that of a fresh process which does nothing else.
"""

import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _denoisers import MINIATURE, REAL, SD15_256, Inputs, Shape, groups_of, moved, predict, trained_in_float32
from _models import sd15_text_encoder, sd15_vae, twin, with_lora
from _timing import Result, arguments, compare, report
from torch import Tensor, nn

from apt_diffusion import add_apt, freeze_base

VARIANTS = ("LoRA r4, as diffusers' script", "APT, as our trainer")
SHAPES = {"miniature, 64 x 64": MINIATURE} | REAL
Step = Callable[[], None]


@dataclass
class Encoders:
    """What makes latents and embeddings in each of the peer's steps; ours needs neither."""

    vae: nn.Module
    text_encoder: nn.Module | None


def encoders_of(shape: Shape, channels: int, device: str, dtype: torch.dtype) -> Encoders:
    """The autoencoder, and the text encoder if each step of the peer runs it."""
    if shape.embedded is not None:
        from apt_diffusion import StableDiffusionAPTPipeline

        pipe = StableDiffusionAPTPipeline.from_pretrained(shape.embedded)
        parts = [part.requires_grad_(False).to(device, dtype) for part in (pipe.vae, pipe.text_encoder)]
        return Encoders(*parts)
    if shape.encodes_text:
        return Encoders(sd15_vae(device, channels).to(dtype), sd15_text_encoder(device).to(dtype))
    return Encoders(sd15_vae(device, channels), None)


def make_step(model: nn.Module, inputs: Callable[[], Inputs], dtype: torch.dtype) -> Step:
    """A step on what `inputs` gives, the latents first."""
    parameters = trained_in_float32(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        given = inputs()
        first = next(iter(given))
        noise = torch.randn_like(given[first])
        prediction = predict(model, given | {first: 0.7 * given[first] + 0.7 * noise}, dtype)
        (prediction - noise.float()).square().mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def lora_step(shape: Shape, base: nn.Module, kept: Inputs, dtype: torch.dtype) -> tuple[Step, dict[str, Step]]:
    """The step, and its parts but for the backward pass and the optimizer."""
    first = next(iter(kept))
    latents, states = kept[first], kept["encoder_hidden_states"]
    encoders = encoders_of(shape, latents.shape[1], str(latents.device), dtype)
    vae, text_encoder = encoders.vae, encoders.text_encoder
    pixels = torch.randn(1, 3, shape.pixels, shape.pixels, device=latents.device, dtype=vae.dtype)

    @torch.no_grad()
    def encode() -> Tensor:
        return (vae.encode(pixels).latent_dist.sample() * 0.18215).to(dtype)

    parts: dict[str, Callable[[], Tensor]] = {"of it VAE encoding": encode}
    if text_encoder is not None:
        tokens = torch.randint(0, text_encoder.config.vocab_size - 1, states.shape[:2], device=latents.device)

        @torch.no_grad()
        def read() -> Tensor:
            return text_encoder(tokens).last_hidden_state

        parts["of it text encoder"] = read
    model = with_lora(twin(base))

    @torch.no_grad()
    def forward() -> Tensor:
        return predict(model, kept, dtype)

    def inputs() -> Inputs:
        return kept | {first: encode()} | ({"encoder_hidden_states": read()} if text_encoder is not None else {})

    return make_step(model, inputs, dtype), parts | {"of it the denoiser's forward pass": forward}


def apt_step(base: nn.Module, kept: Inputs, dtype: torch.dtype) -> Step:
    """A step on kept latents and embeddings."""
    model = twin(base)
    add_apt(model)
    freeze_base(model)
    return make_step(model, lambda: kept, dtype)


def peak_memory(variant: str) -> float:
    """GiB of a fresh process after three steps: on the GPU where there is one, else all of it."""
    done = subprocess.run([sys.executable, __file__, "--alone", variant], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def run_alone(variant: str, device: str) -> None:
    """Prints the peak memory of three steps at the shapes of Stable Diffusion 1.5, 256 x 256, float32."""
    base, kept = SD15_256.make(device), moved(SD15_256.inputs(), device, torch.float32)
    is_ours = variant == VARIANTS[1]
    step = apt_step(base, kept, torch.float32) if is_ours else lora_step(SD15_256, base, kept, torch.float32)[0]
    for _ in range(3):
        step()
    used = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    print(used / 2**30)


def side_by_side(shape: Shape, dtype: torch.dtype, device: str, rounds: int, group: str) -> list[Result]:
    """Times of both steps and of the peer's parts; nothing stays in memory."""
    torch.manual_seed(0)
    base, kept = shape.make(device).to(dtype), moved(shape.inputs(), device, dtype)
    theirs, parts = lora_step(shape, base, kept, dtype)
    return compare({VARIANTS[0]: theirs, VARIANTS[1]: apt_step(base, kept, dtype)} | parts, rounds, group)


def main() -> None:
    """Measures and reports."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--alone", choices=VARIANTS, help="only measure the memory of this variant, in this process")
    parser.add_argument("--only", default="", help="groups whose names begin so, as SDXL; without memory")
    args = parser.parse_args()
    if args.alone:
        run_alone(args.alone, args.device)
        return
    groups, notes = {}, {}
    for group, shape, dtype in groups_of(SHAPES, args.only):
        rounds = args.rounds * (20 if shape.embedded else 1)
        groups[group] = side_by_side(shape, dtype, args.device, rounds, group)
        notes[f"Steps per second, APT / LoRA, {group}"] = f"{1 / groups[group][1].ratio:.2f}"
    if not args.only:
        memory = {variant: peak_memory(variant) for variant in VARIANTS}
        shown = ", ".join(f"{name} {value:.2f} GiB" for name, value in memory.items())
        notes["Peak memory, SD 1.5, 256 x 256"] = f"{shown}; ratio {memory[VARIANTS[1]] / memory[VARIANTS[0]]:.2f}"
    report("Training speed", groups, args.output_dir, notes)


if __name__ == "__main__":
    main()
