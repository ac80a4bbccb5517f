#!/usr/bin/env python
"""Steps per second and peak memory of training: this library compared with diffusers' `train_dreambooth_lora.py`.

    python benchmarks/training_speed.py                  # Stable Diffusion 1.5's shapes, and the embedded model

The peer's step is done with the peer's libraries: VAE encoding and text encoding in every step, LoRA of rank 4 on all
attention projections of the UNet. Ours reads kept latents and embeddings and trains APT with the defaults. Shapes are
those of Stable Diffusion 1.5 at 256 x 256 and of the embedded model at 64 x 64, one picture a step, float32, text
encoder frozen. Peak memory is that of a fresh process which does nothing else.
"""

import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from _models import sd15_text_encoder, sd15_unet, sd15_vae, twin, with_lora
from _timing import Result, arguments, compare, report
from torch import Tensor, nn

from apt_diffusion import add_apt, freeze_base

VARIANTS = ("LoRA r4, as diffusers' script", "APT, as our trainer")
Step = Callable[[], None]


@dataclass
class Base:
    """A UNet, the size of what it is trained on, and what makes that of pictures and words."""

    unet: nn.Module
    pixels: int
    latents: tuple[int, int, int, int]
    tokens: int
    vae: nn.Module | None = None  # ours needs neither in a step
    text_encoder: nn.Module | None = None


def sd15(device: str, encoders: bool = True) -> Base:
    vae, text_encoder = (sd15_vae(device), sd15_text_encoder(device)) if encoders else (None, None)
    return Base(sd15_unet(device), 256, (1, 4, 32, 32), 77, vae, text_encoder)


def miniature(device: str) -> Base:
    from apt_diffusion import StableDiffusionAPTPipeline

    pipe = StableDiffusionAPTPipeline.from_pretrained("miniature").to(device)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    return Base(pipe.unet, 64, (1, 4, 16, 16), 32, pipe.vae, pipe.text_encoder)


def make_step(unet: nn.Module, inputs: Callable[[], tuple[Tensor, Tensor]]) -> Step:
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    unet.train()

    def step() -> None:
        latents, states = inputs()
        noise = torch.randn_like(latents)
        prediction = unet(0.7 * latents + 0.7 * noise, torch.randint(1000, (1,), device=latents.device), states).sample
        (prediction - noise).square().mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def lora_step(base: Base, device: str) -> tuple[Step, dict[str, Callable[[], Tensor]]]:
    """The step, and its parts but for the backward pass and the optimizer."""
    pixels = torch.randn(1, 3, base.pixels, base.pixels, device=device)
    tokens = torch.randint(0, base.text_encoder.config.vocab_size - 1, (1, base.tokens), device=device)

    @torch.no_grad()
    def encode() -> Tensor:
        return base.vae.encode(pixels).latent_dist.sample() * 0.18215

    @torch.no_grad()
    def read() -> Tensor:
        return base.text_encoder(tokens).last_hidden_state

    unet = with_lora(twin(base.unet))
    step = make_step(unet, lambda: (encode(), read()))
    latents, states = encode(), read()

    @torch.no_grad()
    def forward() -> Tensor:
        return unet(latents, 500, states).sample

    return step, {"of it VAE encoding": encode, "of it text encoder": read, "of it UNet forward": forward}


def apt_step(base: Base, device: str) -> Step:
    unet = twin(base.unet)
    add_apt(unet)
    freeze_base(unet)
    latents = torch.randn(base.latents, device=device)
    states = torch.randn(1, base.tokens, base.unet.config.cross_attention_dim, device=device)
    return make_step(unet, lambda: (latents, states))


def peak_memory(variant: str) -> float:
    """GiB of a fresh process after three steps: on the GPU where there is one, else all of it."""
    done = subprocess.run([sys.executable, __file__, "--alone", variant], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def run_alone(variant: str, device: str) -> None:
    ours = variant == VARIANTS[1]
    base = sd15(device, encoders=not ours)
    step = apt_step(base, device) if ours else lora_step(base, device)[0]
    for _ in range(3):
        step()
    used = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    print(used / 2**30)


def side_by_side(base: Base, rounds: int, device: str) -> list[Result]:
    theirs, parts = lora_step(base, device)
    return compare({VARIANTS[0]: theirs, VARIANTS[1]: apt_step(base, device)} | parts, rounds, "steps")


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--alone", choices=VARIANTS, help="only measure the memory of this variant, in this process")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.alone:
        run_alone(args.alone, args.device)
        return
    memory = {variant: peak_memory(variant) for variant in VARIANTS}
    groups, notes = {}, {}
    sizes: dict[str, tuple[Callable[[], Base], int]] = {
        "Stable Diffusion 1.5, 256 x 256": (partial(sd15, args.device), args.rounds),
        "miniature, 64 x 64": (partial(miniature, args.device), 20 * args.rounds),
    }
    for name, (make, rounds) in sizes.items():
        groups[name] = side_by_side(make(), rounds, args.device)
        notes[f"Steps per second, APT / LoRA, {name}"] = f"{1 / groups[name][1].ratio:.2f}"
    notes["Peak memory, Stable Diffusion 1.5"] = (
        ", ".join(f"{name} {value:.2f} GiB" for name, value in memory.items())
        + f"; ratio {memory[VARIANTS[1]] / memory[VARIANTS[0]]:.2f}"
    )
    report("Training speed", groups, args.output_dir, notes)


if __name__ == "__main__":
    main()
