#!/usr/bin/env python
"""Make the miniature Stable Diffusion of emoji from nothing: compose pictures, train, grade, export.

    python tools/emoji_sprites.py                          # fetches and draws the emoji
    python tools/pretrain_miniature_emoji.py --device cuda --minutes 1 5 1 0.5
    python tools/pretrain_miniature_emoji.py --grade       # only grade the embedded weights

Runs on a CPU too, where it takes days. An interrupted run goes on where it stopped; every step draws from its own
seed. docs/emoji.md has the grades of the shipped weights.
"""

import argparse
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from emoji_export import CARD, build_pipeline, export_judge, export_pipeline
from emoji_grade import format_table, grade_model, save_sheet, whole_targets, windows_on
from emoji_models import make_autoencoder, make_discriminator, make_emoji_tokenizer, make_text_encoder, make_unet
from emoji_scenes import COLORS, PATTERNS, SIDE, Captions, Scenes, World
from stages import Stage, fit, load_stage
from torch import Tensor, nn

from apt_diffusion.miniature.emoji.judge import FOLDER, JUDGE_FILE, VOCABULARY_FILE, Judge, Vocabulary, load_judge
from apt_diffusion.miniature.models import make_scheduler
from apt_diffusion.miniature.muon import Muon, split_for_muon

MODEL_FOLDER = "stable_diffusion"
TRAINED = ("autoencoder", "denoiser", "decoder", "judge")
STAGES = (*TRAINED, "export")
SHARPNESS = 0.25  # of the decoder: how hard looking real pulls, against being alike


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line settings; those of each stage by its name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", default="runs/emoji/sprites.npz", help="what emoji_sprites.py wrote")
    parser.add_argument("--output_dir", default="runs/emoji", help="checkpoints, sample sheets, grades")
    parser.add_argument("--export_dir", default=str(FOLDER), help="where model and judge go, in fp16")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="all by default, in order")
    parser.add_argument("--further", action="store_true", help="start the stages from what is in --export_dir")
    parser.add_argument("--grade", action="store_true", help="grade what is in --export_dir, and nothing else")
    parser.add_argument("--grade_count", type=int, default=256, help="pictures per row of the table")
    parser.add_argument("--grade_limit", type=int, help="of the row of every pair draw this many, chosen at random")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    each = {"nargs": len(TRAINED), "metavar": tuple(stage[:3].upper() for stage in TRAINED)}
    parser.add_argument("--steps", type=int, default=[5000, 6000, 2500, 2500], help="of each stage", **each)
    parser.add_argument("--batch_sizes", type=int, default=[128, 512, 64, 512], help="of each stage", **each)
    parser.add_argument(
        "--minutes",
        type=float,
        help="the clock ends each stage, whatever --steps says: such a run repeats no other",
        **each,
    )
    parser.add_argument("--save_every", type=int, default=1000, help="steps between checkpoints")
    args = parser.parse_args(argv)
    args.steps = dict(zip(TRAINED, args.steps, strict=True))
    args.batch_sizes = dict(zip(TRAINED, args.batch_sizes, strict=True))
    args.seconds = dict(zip(TRAINED, (60 * minutes for minutes in args.minutes), strict=True)) if args.minutes else {}
    return args


def settings_of(args: argparse.Namespace, stage: str) -> dict[str, Any]:
    """How long a stage runs."""
    return {"name": stage, "steps": args.steps[stage], "seconds": args.seconds.get(stage)}


def autocast(world: World) -> torch.autocast:
    """bfloat16 where it pays."""
    return torch.autocast(world.device.type, torch.bfloat16)


# Autoencoder


def autoencoder_stage(args: argparse.Namespace, world: World) -> Stage:
    """The autoencoder, on pictures richer than the captions describe."""
    vae = make_autoencoder().to(world.device, memory_format=torch.channels_last)
    with torch.no_grad():
        channels = vae.config.latent_channels
        vae.quant_conv.bias[channels:] = -5.0  # nearly noiseless latents from the start
        vae.quant_conv.weight[channels:] *= 0.1
    count = args.batch_sizes["autoencoder"]

    def loss(generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            pictures = varied_pictures(world, count, generator).contiguous(memory_format=torch.channels_last)
        with autocast(world):
            posterior = vae.encode(pictures).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=generator, device=world.device)
            error = vae.decode(mean + (logvar / 2).exp() * noise).sample.float() - pictures
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.abs().mean() + error.square().mean() + 0.25 * edges_of(error) + 1e-3 * kl

    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.95), weight_decay=1e-4)
    return Stage(
        modules={"vae": vae},
        optimizers=[optimizer],
        lr=2e-3,
        loss=loss,
        ema_decay=0.995,
        **settings_of(args, "autoencoder"),
    )


def edges_of(error: Tensor) -> Tensor:
    """How much neighbouring pixels differ in error: blurred edges cost."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def varied_pictures(world: World, count: int, generator: torch.Generator) -> Tensor:
    """Half of them scenes, half the same turned, mirrored, stretched and in other colours: subjects of no caption."""
    pictures = world.render(world.sample(count, generator), generator)
    half = count // 2

    def noise(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=world.device) * 2 - 1

    angle, scale, shift = 3.14 * noise(half), torch.exp(0.5 * noise(half)), 0.3 * noise(half, 2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, (half, 3, SIDE, SIDE), align_corners=False)
    turned = F.grid_sample(pictures[:half], grid, padding_mode="reflection", align_corners=False)
    order = torch.rand((half, 3), generator=generator, device=world.device).argsort(1)
    turned = turned.gather(1, order[:, :, None, None].expand(-1, -1, SIDE, SIDE))
    turned = turned * torch.where(noise(half, 3) < -0.6, -1.0, 1.0)[:, :, None, None]
    return torch.cat([turned, pictures[half:]])


@torch.no_grad()
def measure_latents(world: World, vae: nn.Module) -> None:
    """Sets the autoencoder's scaling factor: latents of unit variance."""
    generator = torch.Generator(world.device).manual_seed(1)
    pictures = world.render(world.sample(512, generator), generator)
    vae.register_to_config(scaling_factor=1 / vae.encode(pictures).latent_dist.mean.std().item())


@torch.no_grad()
def fidelity(world: World, vae: nn.Module) -> float:
    """PSNR in dB of scenes that went through the autoencoder."""
    generator = torch.Generator(world.device).manual_seed(2)
    pictures = world.render(world.sample(256, generator), generator)
    error = (vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1) - pictures) / 2
    return -10 * error.square().mean().log10().item()


# Denoiser


def denoiser_stage(args: argparse.Namespace, world: World, vae: nn.Module) -> Stage:
    """UNet and text encoder together; v-prediction, a tenth of the captions dropped."""
    tokenizer, scheduler = make_emoji_tokenizer(world.names, world.styles), make_scheduler()
    text_encoder = make_text_encoder(tokenizer).to(world.device)
    unet = make_unet().to(world.device, memory_format=torch.channels_last)
    captions = Captions(world, tokenizer)
    count = args.batch_sizes["denoiser"]
    alphas = scheduler.alphas_cumprod.to(world.device)
    compiled = torch.compile(unet, dynamic=False) if world.device.type == "cuda" else unet

    def loss(generator: torch.Generator) -> Tensor:
        with torch.no_grad(), autocast(world):
            scenes = world.sample(count, generator)
            pictures = world.render(scenes, generator).contiguous(memory_format=torch.channels_last)
            clean = vae.encode(pictures).latent_dist.mean.float() * vae.config.scaling_factor
        ids = captions.encode(scenes, generator)
        # Half of the timesteps from the range in which shape is decided.
        middle = torch.randint(300, 850, (count,), generator=generator, device=world.device)
        anywhere = torch.randint(1000, (count,), generator=generator, device=world.device)
        decisive = torch.rand(count, generator=generator, device=world.device) < 0.5
        timesteps = torch.where(decisive, middle, anywhere)
        noise = torch.randn(clean.shape, generator=generator, device=world.device)
        signal = alphas[timesteps].sqrt()[:, None, None, None]
        spread = (1 - alphas[timesteps]).sqrt()[:, None, None, None]
        noisy = (signal * clean + spread * noise).contiguous(memory_format=torch.channels_last)
        with autocast(world):
            states = text_encoder(ids).last_hidden_state
            prediction = compiled(noisy, timesteps, states, return_dict=False)[0]
        return F.mse_loss(prediction.float(), signal * noise - spread * clean)

    modules = {"unet": unet, "text_encoder": text_encoder}
    matrices, others = split_for_muon(modules)
    optimizers = [Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0)]
    return Stage(
        modules=modules, optimizers=optimizers, lr=2e-3, loss=loss, ema_decay=0.999, **settings_of(args, "denoiser")
    )


# Decoder


def decoder_stage(args: argparse.Namespace, world: World, vae: nn.Module, modules: dict[str, nn.Module]) -> Stage:
    """The decoder once more, on what the denoiser makes of noisy latents: it learns to draw sharply from those.

    A discriminator of patches says what looks real. The encoder stays as it is, so latents keep their meaning, and
    adapters that were trained before go on fitting.
    """
    unet, text_encoder = modules["unet"], modules["text_encoder"]
    captions = Captions(world, make_emoji_tokenizer(world.names, world.styles))
    alphas = make_scheduler().alphas_cumprod.to(world.device)
    decoder = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder}).requires_grad_(True)
    discriminator = make_discriminator().to(world.device)
    last = vae.decoder.conv_out.weight
    count = args.batch_sizes["decoder"]

    def loss(generator: torch.Generator) -> Tensor:
        with torch.no_grad(), autocast(world):
            scenes = world.sample(count, generator)
            pictures = world.render(scenes, generator)
            pictures[: count // 4] = varied_pictures(world, count, generator)[: count // 4]
            clean = vae.encode(pictures).latent_dist.mean.float() * vae.config.scaling_factor
            timesteps = torch.randint(20, 450, (count,), generator=generator, device=world.device)
            signal = alphas[timesteps].sqrt()[:, None, None, None]
            spread = (1 - alphas[timesteps]).sqrt()[:, None, None, None]
            noisy = signal * clean + spread * torch.randn(clean.shape, generator=generator, device=world.device)
            states = text_encoder(captions.encode(scenes)).last_hidden_state
            latents = signal * noisy - spread * unet(noisy, timesteps, states).sample.float()
            latents[: count // 2] = clean[: count // 2]
        with autocast(world):
            drawn = vae.decode(latents / vae.config.scaling_factor).sample.float()
            verdicts = discriminator(torch.cat([pictures, drawn.detach()])).float().chunk(2)
            fixed = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
            fooled = -torch.func.functional_call(discriminator, fixed, drawn).float().mean()
        error = drawn - pictures
        likeness = error.abs().mean() + error.square().mean() + 0.25 * edges_of(error)
        judged = F.relu(1 - verdicts[0]).mean() + F.relu(1 + verdicts[1]).mean()
        # Looking real pulls a set share as hard as being alike, at the last layer.
        pulls = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (likeness, fooled)]
        return likeness + SHARPNESS * (pulls[0] / (pulls[1] + 1e-6)).clamp(max=1e3) * fooled + judged

    trained = [*decoder.parameters(), *discriminator.parameters()]
    optimizer = torch.optim.AdamW(trained, betas=(0.5, 0.95), weight_decay=1e-4)
    return Stage(
        modules={"decoder": decoder, "discriminator": discriminator},
        optimizers=[optimizer],
        lr=6e-4,
        loss=loss,
        ema_decay=0.998,
        **settings_of(args, "decoder"),
    )


# Judge


def judge_stage(args: argparse.Namespace, world: World, vae: nn.Module) -> Stage:
    """It knows the held-out things too. Half of its pictures have gone through the autoencoder."""
    vocabulary = Vocabulary(tuple(world.names), tuple(world.styles), PATTERNS, tuple(COLORS))
    judge = Judge(vocabulary).to(world.device, memory_format=torch.channels_last)
    every = torch.arange(len(world.names), device=world.device)
    count = args.batch_sizes["judge"]

    def loss(generator: torch.Generator) -> Tensor:
        with torch.no_grad(), autocast(world):
            scenes = world.sample(count, generator, every, layouts=(0.3, 0.4, 0.075, 0.075, 0.075, 0.075))
            pictures = world.render(scenes, generator)
            half = count // 2
            pictures[:half] = vae.decode(vae.encode(pictures[:half]).latent_dist.mean).sample.float()
            pictures += 0.05 * torch.randn(pictures.shape, generator=generator, device=world.device)
            windows, concept, style = random_window(pictures, scenes, generator)
        with autocast(world):
            read, targets = judge.read_windows(windows), whole_targets(scenes)
            losses = [
                F.cross_entropy(read["concept"].float(), concept),
                0.3 * F.cross_entropy(read["style"].float(), style),
            ]
            for name, logits in judge.read_whole(pictures).items():
                losses.append(0.3 * F.cross_entropy(logits.float(), targets[name]))
        return torch.stack(losses).sum()

    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=1e-3)
    return Stage(
        modules={"judge": judge},
        optimizers=[optimizer],
        lr=2e-3,
        loss=loss,
        ema_decay=0.99,
        **settings_of(args, "judge"),
    )


def random_window(pictures: Tensor, scenes: Scenes, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """One window per picture on one of its objects, and the thing and style `(B,)` that it shows."""
    count, device = len(scenes), pictures.device
    slot = torch.randint(2, (count,), generator=generator, device=device) * scenes.has_two
    jitter = torch.rand(count, 3, generator=generator, device=device) * 2 - 1
    concept, style = (values.gather(1, slot[:, None])[:, 0] for values in (scenes.concept, scenes.style))
    return windows_on(pictures, scenes, slot, jitter), concept, style


# All


def run_stage(
    stage: Stage, args: argparse.Namespace, at_save: Callable[[int], None] = lambda step: None
) -> dict[str, nn.Module]:
    """Trains a stage that was asked for; the averaged weights of the others come from their checkpoints.

    Without a checkpoint they come from what was exported before; with `--further` a stage starts from that, too.
    """
    if stage.name in args.stages:
        if args.further:
            load_exported(stage.modules, Path(args.export_dir))
        fit(stage, args.output_dir, args.seed, args.save_every, at_save)
    elif is_trained(args, stage.name):
        load_stage(stage, stage.parameters, Path(args.output_dir) / f"{stage.name}.pt")
    else:
        load_exported(stage.modules, Path(args.export_dir))
    return stage.modules


def is_trained(args: argparse.Namespace, stage: str) -> bool:
    """Whether there is a checkpoint of a stage."""
    return (Path(args.output_dir) / f"{stage}.pt").is_file()


@torch.no_grad()
def load_exported(modules: dict[str, nn.Module], folder: Path) -> None:
    """Gives modules the weights that were exported; a decoder comes with its autoencoder."""
    for name, module in modules.items():
        if name == "judge":
            module.load_state_dict(load_judge(folder / JUDGE_FILE.name, folder / VOCABULARY_FILE.name).state_dict())
        elif name in ("vae", "unet", "text_encoder"):
            exported = type(module).from_pretrained(folder / MODEL_FOLDER / name, dtype=torch.float32)
            module.load_state_dict(exported.state_dict())
            if name == "vae":
                module.register_to_config(scaling_factor=exported.config.scaling_factor)


def pipeline_of(world: World, vae: nn.Module, modules: dict[str, nn.Module]) -> Any:
    """Stock pipeline around the parts."""
    tokenizer = make_emoji_tokenizer(world.names, world.styles)
    return build_pipeline(vae, modules["text_encoder"], modules["unet"], tokenizer)


def save_samples(
    args: argparse.Namespace, world: World, vae: nn.Module, modules: dict[str, nn.Module], step: int
) -> None:
    """Pictures to watch the model learn by."""
    save_sheet(pipeline_of(world, vae, modules), world, Path(args.output_dir) / f"samples-{step:05d}.png")


def report(args: argparse.Namespace, world: World) -> None:
    """Grades the exported pipeline: tables on the screen, JSON and a sheet of pictures in the output folder."""
    from diffusers import StableDiffusionPipeline

    folder = Path(args.export_dir)
    pipeline = StableDiffusionPipeline.from_pretrained(folder / MODEL_FOLDER, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(world.device)
    judge = load_judge(folder / JUDGE_FILE.name, folder / VOCABULARY_FILE.name).to(world.device)
    tables = grade_model(pipeline, judge, world, args.grade_count, limit=args.grade_limit)
    for kind, table in tables.items():
        print(f"{kind}\n{format_table(table)}\n")
    (Path(args.output_dir) / "grades.json").write_text(json.dumps(tables, indent=2))
    save_sheet(pipeline, world, Path(args.output_dir) / "graded.png")


def main(argv: list[str] | None = None) -> None:
    """Runs the stages."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = parse_args(argv)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    world = World(args.sprites, args.device)
    if args.grade:
        report(args, world)
        return
    torch.manual_seed(args.seed)
    vae = run_stage(autoencoder_stage(args, world), args)["vae"].eval().requires_grad_(False)
    if is_trained(args, "autoencoder"):  # else the exported one's holds, on which the denoiser rests
        measure_latents(world, vae)
    print(f"autoencoder: {fidelity(world, vae):.1f} dB")
    stage = denoiser_stage(args, world, vae)
    run_stage(stage, args, functools.partial(save_samples, args, world, vae, stage.modules))
    run_stage(decoder_stage(args, world, vae, stage.modules), args)
    print(f"autoencoder: {fidelity(world, vae):.1f} dB")
    judge = run_stage(judge_stage(args, world, vae), args)["judge"]
    if "export" in args.stages:
        pipeline = pipeline_of(world, vae, stage.modules)
        export_pipeline(Path(args.export_dir) / MODEL_FOLDER, pipeline, CARD)
        export_judge(args.export_dir, judge)
        report(args, world)


if __name__ == "__main__":
    main()
