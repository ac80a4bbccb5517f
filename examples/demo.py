#!/usr/bin/env python
"""The main job, offline: teach the embedded model a subject with `train/train_apt_sd.py`, then draw it.

    python examples/demo.py                        # the subject of examples/subject, pictures in out/demo

The grid has three rows: the base model; the adapted model with the same prompts and noise; the adapted model with
prompts that do not ask for the subject.
"""

import argparse
import logging
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from apt_diffusion import StableDiffusionAPTPipeline
from apt_diffusion.miniature.grade import draw
from apt_diffusion.miniature.personalise import save_class_pictures
from apt_diffusion.miniature.pictures import save_picture_grid, to_images
from apt_diffusion.miniature.subjects import OTHER_PROMPTS, PROMPT, RECOGNISED, SUBJECTS, prompt_on, subject_score

ROOT = Path(__file__).resolve().parents[1]
SUBJECT = SUBJECTS["mushroom"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("out/demo"), help="adapter, samples, grid.png")
    parser.add_argument("--max_train_steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    pipe = StableDiffusionAPTPipeline.from_pretrained("miniature")
    pipe.set_progress_bar_config(disable=True)
    class_dir = args.output_dir / "class"
    logging.info("The base model draws its own pictures, which keep the adapter from forgetting: %s", class_dir)
    save_class_pictures(pipe, class_dir)

    train(args, class_dir)

    prompts = [prompt_on(ground) for ground in SUBJECT.unseen_grounds for _ in range(2)]
    base = draw(pipe, prompts, args.seed)
    pipe.load_apt_weights(args.output_dir)
    adapted = draw(pipe, prompts, args.seed)
    others = draw(pipe, list(OTHER_PROMPTS), args.seed)
    rows = [("base: ", prompts, base), ("APT: ", prompts, adapted), ("APT: ", list(OTHER_PROMPTS), others)]
    labels = [mark + prompt for mark, texts, _ in rows for prompt in texts]
    grid = args.output_dir / "grid.png"
    save_picture_grid(to_images(torch.cat([pictures for *_, pictures in rows])), labels, grid, columns=len(prompts))
    recognised = (subject_score(adapted, SUBJECT) > RECOGNISED).sum().item()
    stray = (subject_score(others, SUBJECT) > RECOGNISED).sum().item()
    print(f"The subject is recognised in {recognised} of {len(prompts)} pictures that ask for it, on backgrounds that")
    print(f"no training picture has, and in {stray} of {len(OTHER_PROMPTS)} that do not.")
    print(
        f"Base, adapted, and adapted without the subject's name: {grid} ({'x'.join(map(str, Image.open(grid).size))})"
    )


def train(args: argparse.Namespace, class_dir: Path) -> None:
    """The trainer, as a user would start it."""
    flags = {
        "pretrained_model_name_or_path": "miniature",
        "instance_data_dir": "examples/subject",
        "instance_prompt": PROMPT,
        "train_text_encoder": True,
        "with_prior_preservation": True,
        "class_data_dir": class_dir.resolve(),
        "class_prompt": "a glyph",  # every class picture has a caption of its own
        "num_class_images": 64,
        "max_train_steps": args.max_train_steps,
        "learning_rate": 3e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 0,
        "validation_prompt": prompt_on(SUBJECT.unseen_grounds[0]),
        "guidance_scale": 3,
        "seed": args.seed,
        "output_dir": args.output_dir.resolve(),
    }
    command = ["accelerate", "launch", "train/train_apt_sd.py"]
    for flag, value in flags.items():
        command += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    print(f"\n$ {shlex.join(command)}\n", flush=True)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "2"]
    subprocess.run([*launcher, *command[2:]], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
