#!/usr/bin/env python
"""Steps per second and peak memory of a training step: ours beside that of diffusers' `train_dreambooth_lora.py`.

    python benchmarks/training_speed.py                  # Stable Diffusion 1.5's shapes, 256 x 256, batch 1, float32

The peer's step is done with the peer's libraries: VAE encoding and text encoding in every step, LoRA of rank 4 on all
attention projections of the UNet. Ours reads kept latents and embeddings and trains APT with the defaults. Peak memory
is that of a fresh process which does nothing else.
"""

import resource
import subprocess
import sys
from collections.abc import Callable

import torch
from _models import sd15_text_encoder, sd15_unet, sd15_vae, twin, with_lora
from _timing import arguments, compare, report
from torch import Tensor, nn

from apt_diffusion import add_apt, freeze_base

SIZE = 256
VARIANTS = ("LoRA r4, as diffusers' script", "APT, as our trainer")


def make_step(unet: nn.Module, inputs: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], None]:
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


def lora_step(unet: nn.Module, device: str) -> tuple[Callable[[], None], dict[str, Callable[[], Tensor]]]:
    """The step, and the two parts of it that a frozen model would not need."""
    vae, text_encoder = sd15_vae(device), sd15_text_encoder(device)
    pixels = torch.randn(1, 3, SIZE, SIZE, device=device)
    tokens = torch.randint(0, 49407, (1, 77), device=device)

    @torch.no_grad()
    def encode() -> Tensor:
        return vae.encode(pixels).latent_dist.sample() * 0.18215

    @torch.no_grad()
    def read() -> Tensor:
        return text_encoder(tokens).last_hidden_state

    step = make_step(with_lora(unet), lambda: (encode(), read()))
    return step, {"VAE encoding": encode, "text encoder": read}


def apt_step(unet: nn.Module, device: str) -> Callable[[], None]:
    add_apt(unet)
    freeze_base(unet)
    latents = torch.randn(1, 4, SIZE // 8, SIZE // 8, device=device)
    states = torch.randn(1, 77, 768, device=device)
    return make_step(unet, lambda: (latents, states))


def peak_memory(variant: str) -> float:
    """GiB of a fresh process after three steps: on the GPU where there is one, else all of it."""
    done = subprocess.run([sys.executable, __file__, "--alone", variant], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def run_alone(variant: str, device: str) -> None:
    unet = sd15_unet(device)
    step = apt_step(unet, device) if variant == VARIANTS[1] else lora_step(unet, device)[0]
    for _ in range(3):
        step()
    used = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    print(used / 2**30)


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--alone", choices=VARIANTS, help="only measure the memory of this variant, in this process")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.alone:
        run_alone(args.alone, args.device)
        return
    memory = {variant: peak_memory(variant) for variant in VARIANTS}
    unet = sd15_unet(args.device)
    theirs, parts = lora_step(twin(unet), args.device)
    ours = apt_step(twin(unet), args.device)
    results = compare({VARIANTS[0]: theirs, VARIANTS[1]: ours} | parts, args.rounds, "steps")
    notes = {
        "Steps per second, APT / LoRA": f"{1 / results[1].ratio:.2f}",
        "Peak memory": ", ".join(f"{name} {value:.2f} GiB" for name, value in memory.items())
        + f"; ratio {memory[VARIANTS[1]] / memory[VARIANTS[0]]:.2f}",
    }
    report("Training speed", {f"one step at {SIZE} x {SIZE}": results}, args.output_dir, notes)


if __name__ == "__main__":
    main()
