#!/usr/bin/env python
"""Make the miniature Stable Diffusion from nothing: draw its world, train its parts, grade it, export it.

    python tools/pretrain_miniature.py --output_dir runs/miniature        # everything, hours on two cores
    python tools/pretrain_miniature.py --grade                            # only grade the embedded weights

Stages: `autoencoder`, `text` (the text encoder learns to tell what a caption says), `denoiser` (UNet and text encoder
together), `grader`, `export`. Each goes on where an interrupted run stopped; every step draws from its own seed, so a
resumed run is the same run. docs/miniature.md records how the shipped weights were made and how they grade.
"""

import argparse
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from stages import Stage, fit, load_stage
from torch import Tensor, nn
from tqdm import tqdm

from apt_diffusion.io.files import write_safetensors
from apt_diffusion.miniature import STABLE_DIFFUSION
from apt_diffusion.miniature.export import build_pipeline, export_pipeline, save_drawn
from apt_diffusion.miniature.grade import (
    ATTRIBUTES,
    GRADER_FILE,
    Grader,
    attributes,
    format_table,
    grade_pipeline,
    grade_real,
    grader_loss,
    load_grader,
    row_scenes,
)
from apt_diffusion.miniature.grade import draw as draw_pictures
from apt_diffusion.miniature.models import (
    MAX_TOKENS,
    make_autoencoder,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
)
from apt_diffusion.miniature.muon import Muon, split_for_muon
from apt_diffusion.miniature.pictures import composition
from apt_diffusion.miniature.world import caption, render, sample_scenes

STAGES = ("autoencoder", "text", "denoiser", "grader", "export")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/miniature", help="checkpoints, sample grids, grades")
    parser.add_argument("--export_dir", default=str(STABLE_DIFFUSION), help="where the pipeline goes, in fp16")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="all by default, in order")
    parser.add_argument("--grade", action="store_true", help="grade what is in --export_dir, and nothing else")
    parser.add_argument("--grade_count", type=int, default=64, help="pictures per row of the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoencoder_steps", type=int, default=3500, help="of 8 pictures")
    parser.add_argument("--text_steps", type=int, default=160, help="of 128 captions")
    parser.add_argument("--denoiser_steps", type=int, default=3000, help="of 32 latents")
    parser.add_argument("--grader_steps", type=int, default=1200, help="of 64 pictures")
    parser.add_argument("--pool", type=int, default=24000, help="pictures drawn once and reused")
    parser.add_argument("--save_every", type=int, default=500, help="steps between checkpoints")
    return parser.parse_args(argv)


def autoencoder_stage(args: argparse.Namespace) -> Stage:
    """Pictures richer than the captioned world, so that subjects which it lacks can be shown too."""
    vae = make_autoencoder().to(memory_format=torch.channels_last)
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -5.0  # nearly noiseless latents from the start
        vae.quant_conv.weight[4:] *= 0.1

    def loss(generator: torch.Generator) -> Tensor:
        pool = autoencoder_pictures(args.pool // 2, args.seed)
        chosen = torch.randint(len(pool), (8,), generator=generator)
        pictures = pool[chosen].float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(pictures).latent_dist
        error = vae.decode(posterior.sample(generator)).sample - pictures
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + error.square().mean() + 0.25 * edges + 1e-3 * posterior.kl().mean() / 1024

    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.95), weight_decay=1e-4)
    return Stage("autoencoder", {"vae": vae}, [optimizer], 2.2e-3, args.autoencoder_steps, loss)


@functools.cache
def autoencoder_pictures(count: int, seed: int) -> Tensor:
    """Half of them scenes, half free compositions, as bytes `(N, 3, 64, 64)`."""
    generator = torch.Generator().manual_seed(seed)
    size = min(250, max(1, count // 2))
    drawn = []
    for _ in tqdm(range(max(1, count // (2 * size))), desc="pictures"):
        drawn += [render(sample_scenes(size, generator), generator), composition(size, generator)]
    return torch.cat([pictures.add(1).mul(127.5).round().byte() for pictures in drawn])


def text_stage(args: argparse.Namespace, text_encoder: nn.Module) -> Stage:
    """A short warm-up: the end token and the padding after it must tell everything that the caption said."""
    tokenizer = make_tokenizer()
    width = text_encoder.config.hidden_size
    heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in ATTRIBUTES.items()})

    def loss(generator: torch.Generator) -> Tensor:
        scenes = sample_scenes(128, generator, two=0.7)
        ids = tokenize(tokenizer, [caption(scenes, index) for index in range(128)], length=20)
        states = text_encoder(ids).last_hidden_state  # (B, 20, d)
        end = states[torch.arange(128), (ids == tokenizer.eos_token_id).int().argmax(1)]
        total = states.new_zeros(())
        for name, (target, known) in attributes(scenes).items():
            for state in (end, states[:, -1]):
                total = total + (F.cross_entropy(heads[name](state), target, reduction="none") * known).mean()
        return total / len(ATTRIBUTES)

    modules = {"text_encoder": text_encoder, "heads": heads}
    optimizer = torch.optim.AdamW([p for m in modules.values() for p in m.parameters()], weight_decay=0.0)
    return Stage("text", modules, [optimizer], 2e-3, args.text_steps, loss)


def tokenize(tokenizer, captions: list[str], length: int = MAX_TOKENS) -> Tensor:
    """Token ids `(B, T)`."""
    return tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt").input_ids


def denoiser_stage(args: argparse.Namespace, vae: nn.Module, text_encoder: nn.Module) -> Stage:
    """UNet and text encoder together on latents of the world; v-prediction, a tenth of the captions dropped."""
    from diffusers.models.attention_processor import AttnProcessor

    unet = make_unet().to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # trains faster than fused attention at these head sizes
    tokenizer, scheduler = make_tokenizer(), make_scheduler()
    latents, ids = encode_world(args, vae, tokenizer)
    empty = tokenize(tokenizer, [""])

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (32,), generator=generator)
        clean = latents[chosen].float()
        prompts = torch.where(torch.rand(32, 1, generator=generator) < 0.1, empty, ids[chosen])
        # Half of the timesteps from the range in which shape is decided.
        middle = torch.randint(350, 850, (32,), generator=generator)
        anywhere = torch.randint(1000, (32,), generator=generator)
        timesteps = torch.where(torch.rand(32, generator=generator) < 0.5, middle, anywhere)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        states = text_encoder(prompts).last_hidden_state
        velocity = scheduler.get_velocity(clean, noise, timesteps)
        return F.mse_loss(unet(noisy, timesteps, states).sample, velocity)

    modules = {"unet": unet, "text_encoder": text_encoder}
    matrices, others = split_for_muon(modules)
    optimizers = [Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0)]
    return Stage("denoiser", modules, optimizers, 1.5e-3, args.denoiser_steps, loss, ema_decay=0.999)


@torch.no_grad()
def encode_world(
    args: argparse.Namespace, vae: nn.Module, tokenizer, scaling_factor: float | None = None
) -> tuple[Tensor, Tensor]:
    """Latents `(N, 4, 16, 16)` in half precision and token ids `(N, 32)`; sets the autoencoder's scaling factor.

    Without `scaling_factor` it is the one that gives the latents a standard deviation of 1.
    """
    file = Path(args.output_dir) / "latents.pt"
    if file.is_file():
        latents, ids, scaling_factor = torch.load(file, weights_only=True)
    else:
        generator = torch.Generator().manual_seed(args.seed + 1)
        size = min(400, args.pool)
        parts = []
        for _ in tqdm(range(args.pool // size), desc="latents"):
            scenes = sample_scenes(size, generator)
            pictures = render(scenes, generator).contiguous(memory_format=torch.channels_last)
            ids = tokenize(tokenizer, [caption(scenes, index) for index in range(size)])
            parts.append((vae.encode(pictures).latent_dist.mean, ids))
        latents, ids = (torch.cat(column) for column in zip(*parts, strict=True))
        scaling_factor = scaling_factor or 1 / latents.std().item()
        latents = (latents * scaling_factor).half()
        torch.save((latents, ids, scaling_factor), file)
    vae.register_to_config(scaling_factor=scaling_factor)
    return latents, ids


def grader_stage(args: argparse.Namespace, vae: nn.Module) -> Stage:
    """Half of its pictures have gone through the autoencoder, like those that it will grade."""
    grader = Grader()

    def loss(generator: torch.Generator) -> Tensor:
        scenes = sample_scenes(64, generator, held_out=bool(torch.rand((), generator=generator) < 0.2))
        pictures = render(scenes, generator)
        with torch.no_grad():
            pictures[:32] = vae.decode(vae.encode(pictures[:32]).latent_dist.mean).sample
        noise = torch.randn(pictures.shape, generator=generator)
        return grader_loss(grader, pictures + 0.05 * noise, scenes)

    optimizer = torch.optim.AdamW(grader.parameters(), weight_decay=1e-3)
    return Stage("grader", {"grader": grader}, [optimizer], 3e-3, args.grader_steps, loss, ema_decay=0.99)


def save_samples(file: Path, vae: nn.Module, text_encoder: nn.Module, unet: nn.Module) -> None:
    """Pictures of each row of the grade table, to watch the model learn."""
    pipeline = build_pipeline(vae, text_encoder, unet)
    drawn = {}
    for row, scenes in row_scenes(4, seed=1).items():
        captions = [caption(scenes, index) for index in range(4)]
        drawn[row] = captions, draw_pictures(pipeline, captions)
    save_drawn(drawn, file)
    for module in (vae, unet):
        module.to(memory_format=torch.channels_last)


def report(args: argparse.Namespace) -> None:
    """Grades the exported pipeline: a table on the screen, JSON and a sheet of pictures in the output folder."""
    from apt_diffusion import StableDiffusionAPTPipeline

    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    pipeline = StableDiffusionAPTPipeline.from_pretrained(args.export_dir)
    pipeline.set_progress_bar_config(disable=True)
    grader = load_grader()
    table, drawn = grade_pipeline(pipeline, grader, args.grade_count)
    ceiling = grade_real(grader, pipeline.vae, args.grade_count)
    print(f"Generated pictures, {args.grade_count} per row:\n{format_table(table)}\n")
    print(f"Ceiling, real pictures through the autoencoder:\n{format_table(ceiling)}")
    (output_dir / "grades.json").write_text(json.dumps({"generated": table, "ceiling": ceiling}, indent=2))
    save_drawn(drawn, output_dir / "graded.png")


def main(argv: list[str] | None = None) -> None:
    """Runs the stages."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = parse_args(argv)
    if args.grade:
        report(args)
        return
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    text_encoder = make_text_encoder(make_tokenizer())
    vae = run_stage(autoencoder_stage(args), args)["vae"].eval().requires_grad_(False)
    run_stage(text_stage(args, text_encoder), args)
    stage = denoiser_stage(args, vae, text_encoder)
    unet = stage.modules["unet"]
    run_stage(stage, args, lambda step: save_samples(output_dir / f"samples-{step:05d}.png", vae, text_encoder, unet))
    grader = run_stage(grader_stage(args, vae), args)["grader"]
    if "export" in args.stages:
        export_pipeline(args.export_dir, vae, text_encoder, unet)
        tensors = {key: value.half() for key, value in grader.state_dict().items()}
        write_safetensors(tensors, GRADER_FILE, {"format": "pt"})
        report(args)


def run_stage(
    stage: Stage, args: argparse.Namespace, at_save: Callable[[int], None] = lambda step: None
) -> dict[str, nn.Module]:
    """Trains a stage that was asked for; the weights of the others come from their checkpoints."""
    if stage.name in args.stages:
        fit(stage, args.output_dir, args.seed, args.save_every, at_save)
    else:
        load_stage(stage, stage.parameters, Path(args.output_dir) / f"{stage.name}.pt")
    return stage.modules


if __name__ == "__main__":
    main()
