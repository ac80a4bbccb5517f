#!/usr/bin/env python
"""Make the miniature Stable Diffusion 3: draw its world, train the transformer, grade it, export it.

    python tools/pretrain_miniature_sd3.py --output_dir runs/miniature-sd3      # hours on two cores, minutes on a GPU
    python tools/pretrain_miniature_sd3.py --grade                              # only grade the embedded weights

Autoencoder and first text encoder are those of the embedded Stable Diffusion, frozen; the transformer, a small second
CLIP and a T5 that is only an embedding of words are trained by flow matching. An interrupted run goes on where it
stopped; every step draws from its own seed, so a resumed run is the same run. docs/miniature.md records how the
shipped weights were made and how they grade.
"""

import argparse
import json
import logging
from pathlib import Path

import torch
from pretrain_miniature import encode_world, tokenize
from stages import Stage, fit
from torch import Tensor, nn

from apt_diffusion.miniature import STABLE_DIFFUSION, STABLE_DIFFUSION_3
from apt_diffusion.miniature.export import build_sd3_pipeline, export_sd3_pipeline, save_drawn
from apt_diffusion.miniature.grade import draw, format_table, grade_pipeline, grade_real, load_grader, row_scenes
from apt_diffusion.miniature.models import make_tokenizer
from apt_diffusion.miniature.muon import Muon, split_for_muon
from apt_diffusion.miniature.transformer import (
    T5_WORDS,
    CountedJointAttnProcessor,
    flow_loss,
    make_second_text_encoder,
    make_t5,
    make_t5_tokenizer,
    make_transformer,
    project_text_encoder,
    sample_repeats,
    sample_sigmas,
)
from apt_diffusion.miniature.world import caption

OUTER = ("embed", "norm", "proj_out", "text_projection", "shared")  # for AdamW: modulation among them


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/miniature-sd3", help="checkpoints, sample grids, grades")
    parser.add_argument("--export_dir", default=str(STABLE_DIFFUSION_3), help="where the pipeline goes, in fp16")
    parser.add_argument("--base", default=str(STABLE_DIFFUSION), help="gives the autoencoder and the text encoder")
    parser.add_argument("--grade", action="store_true", help="grade what is in --export_dir, and nothing else")
    parser.add_argument("--grade_count", type=int, default=64, help="pictures per row of the table")
    parser.add_argument("--max_sequence_length", type=int, default=32, help="T5 tokens of pictures to grade")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch_size", type=int, default=32, help="latents per step")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--pool", type=int, default=24000, help="pictures drawn once and reused")
    parser.add_argument("--save_every", type=int, default=500, help="steps between checkpoints and sample grids")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def load_base(folder: str) -> tuple[nn.Module, nn.Module]:
    """The frozen autoencoder and first text encoder, in float32."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32)
    vae.register_to_config(shift_factor=0.0)  # the stock pipeline adds it
    return vae.eval().requires_grad_(False), project_text_encoder(text_encoder)


def transformer_stage(args: argparse.Namespace, vae: nn.Module, text_encoder: nn.Module) -> Stage:
    """Transformer, second CLIP and T5 together on latents of the world; a tenth of the captions dropped."""
    tokenizer, t5_tokenizer = make_tokenizer(), make_t5_tokenizer()
    latents, ids = encode_world(args, vae, tokenizer, vae.config.scaling_factor)
    t5_ids = tokenize(t5_tokenizer, tokenizer.batch_decode(ids, skip_special_tokens=True), T5_WORDS)
    nothing = tokenize(tokenizer, [""]), tokenize(t5_tokenizer, [""], T5_WORDS)
    latents, ids, t5_ids, empty, t5_empty = (part.to(args.device) for part in (latents, ids, t5_ids, *nothing))
    text_encoder.to(args.device)
    modules = {
        "transformer": make_transformer().to(args.device),
        "text_encoder_2": make_second_text_encoder(tokenizer).to(args.device),
        "text_encoder_3": make_t5(t5_tokenizer).to(args.device),
    }
    modules["transformer"].set_attn_processor(CountedJointAttnProcessor())
    text_encoders = [text_encoder, modules["text_encoder_2"], modules["text_encoder_3"]]

    def loss(generator: torch.Generator) -> Tensor:
        count, device = args.batch_size, generator.device
        chosen = torch.randint(len(latents), (count,), generator=generator, device=device)
        dropped = torch.rand(count, 1, generator=generator, device=device) < 0.1
        clean = latents[chosen].float()
        noise = torch.randn(clean.shape, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            return flow_loss(
                modules["transformer"],
                text_encoders,
                clean,
                torch.where(dropped, empty, ids[chosen]),
                torch.where(dropped, t5_empty, t5_ids[chosen]),
                noise,
                sample_sigmas(count, generator),
                sample_repeats(count, generator),
            )

    matrices, others = split_for_muon(modules, OUTER)
    optimizers = [Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0)]
    return Stage("sd3", modules, optimizers, args.learning_rate, args.steps, loss, ema_decay=0.999)


def save_samples(file: Path, vae: nn.Module, text_encoder: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Pictures of each row of the grade table, to watch the model learn."""
    pipeline = build_sd3_pipeline(vae=vae, text_encoder=text_encoder, **modules)
    drawn = {}
    for row, scenes in row_scenes(4, seed=1).items():
        captions = [caption(scenes, index) for index in range(4)]
        drawn[row] = captions, draw(pipeline, captions, max_sequence_length=32)
    save_drawn(drawn, file)
    modules["transformer"].set_attn_processor(CountedJointAttnProcessor())


def report(args: argparse.Namespace) -> None:
    """Grades the exported pipeline: a table on the screen, JSON and a sheet of pictures in the output folder."""
    from diffusers import StableDiffusion3Pipeline

    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    pipeline = StableDiffusion3Pipeline.from_pretrained(args.export_dir, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    grader = load_grader()
    table, drawn = grade_pipeline(pipeline, grader, args.grade_count, max_sequence_length=args.max_sequence_length)
    ceiling = grade_real(grader, pipeline.vae, args.grade_count)
    print(f"Generated pictures, {args.grade_count} per row:\n{format_table(table)}\n")
    print(f"Ceiling, real pictures through the autoencoder:\n{format_table(ceiling)}")
    (output_dir / "grades.json").write_text(json.dumps({"generated": table, "ceiling": ceiling}, indent=2))
    save_drawn(drawn, output_dir / "graded.png")


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = parse_args(argv)
    if args.grade:
        report(args)
        return
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    vae, text_encoder = load_base(args.base)
    stage = transformer_stage(args, vae, text_encoder)
    vae.to(args.device)

    def sample(step: int) -> None:
        save_samples(output_dir / f"samples-{step:05d}.png", vae, text_encoder, stage.modules)

    fit(stage, output_dir, args.seed, args.save_every, sample)
    export_sd3_pipeline(args.export_dir, vae=vae, text_encoder=text_encoder, **stage.modules)
    report(args)


if __name__ == "__main__":
    main()
