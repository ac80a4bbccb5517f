#!/usr/bin/env python
"""The main job, offline: teach the embedded model a thing with `train/train_apt_sd.py`, then draw it.

    python examples/demo.py                        # a robot from five pictures; the grid is out/demo/grid.png
    python examples/demo.py --thing "teddy bear"   # or another thing that the model never saw

The grid has four rows: the pictures that teach; the base model; the adapted model with the same prompts and noise; the
adapted model with prompts that do not ask for the thing.
"""

import argparse
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from apt_diffusion import StableDiffusionAPTPipeline
from apt_diffusion.miniature.emoji.judge import load_judge
from apt_diffusion.miniature.emoji.subjects import PROMPT, SUBJECTS, folder_of, judge_pictures, read_pictures
from apt_diffusion.miniature.grade import draw
from apt_diffusion.miniature.personalise import class_captions, save_class_pictures
from apt_diffusion.miniature.pictures import save_picture_grid, to_images

ROOT = Path(__file__).resolve().parents[1]
MODEL = "miniature-emoji"
ASKED = (
    "a large sks toy on a pink background",
    "a large sks toy on an orange background",
    "a large sks toy on a striped cyan background",
    "a large sks toy on a checkered pink and white background",
    "a small sks toy on a cyan background",
    "a sks toy left of a noto pizza on a grey background",
    "a fluent balloon right of a sks toy on a pink background",
    "a sks toy below a twemoji umbrella on a cyan background",
)
OTHERS = (
    "a large fluent fox on a green background",
    "a large fluent rocket on a blue background",
    "a large noto bear on a yellow background",
    "a large twemoji pizza on a pink background",
    "a small noto cactus on an orange background",
    "a large fluent cupcake on a purple background",
    "a large twemoji whale on a cyan background",
    "a large noto sunflower on a striped blue background",
)


def main() -> None:
    """Draws class pictures, starts the trainer, draws the grid and says what the judge finds in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thing", default="robot", choices=list(SUBJECTS), help="what to teach")
    parser.add_argument("--output_dir", type=Path, default=Path("out/demo"), help="adapter, samples, grid.png")
    parser.add_argument("--max_train_steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    pipe = StableDiffusionAPTPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    class_dir = args.output_dir / "class"
    logging.info("The base model draws its own pictures, which keep the adapter from forgetting: %s", class_dir)
    save_class_pictures(pipe, class_dir, class_captions(MODEL, 32))

    things = folder_of(args.thing)
    train(args, things, class_dir)

    prompts = [*ASKED, *OTHERS]
    base = draw(pipe, prompts, args.seed)
    pipe.load_apt_weights(args.output_dir)
    adapted = draw(pipe, prompts, args.seed)
    taught = read_pictures(things)
    blank = torch.ones(len(ASKED) - len(taught), *taught.shape[1:])
    pictures = torch.cat([taught, blank, base[: len(ASKED)], adapted])
    labels = ["taught"] * len(taught) + [""] * len(blank)
    labels += [f"base: {text}" for text in ASKED] + [f"APT: {text}" for text in prompts]
    grid = args.output_dir / "grid.png"
    save_picture_grid(to_images(pictures), labels, grid, columns=len(ASKED))
    judgement = judge_pictures(load_judge(), adapted, base, args.thing, taught, prompts)
    found = {kind: f"{share:.0%}" for kind, share in judgement.recognised.items()}
    print("The judge, a network that was trained apart and knows this thing among 634, recognises it in")
    print(f"{found['ground']} of the large pictures on new grounds, {found['small']} of the small,")
    print(
        f"{found['beside']} of those beside another thing, and {judgement.bleeding:.0%} of those that do not name it,"
    )
    print(f"of which {judgement.kept:.0%} show their own thing.")
    print(f"{grid} ({'x'.join(map(str, Image.open(grid).size))})")


def train(args: argparse.Namespace, things: Path, class_dir: Path) -> None:
    """The trainer, as a user would start it."""
    flags = {
        "pretrained_model_name_or_path": MODEL,
        "instance_data_dir": os.path.relpath(things, ROOT),
        "instance_prompt": PROMPT,
        "train_text_encoder": True,
        "with_prior_preservation": True,
        "class_data_dir": class_dir.resolve(),
        "class_prompt": "a thing",  # every class picture has a caption of its own
        "num_class_images": 32,
        "max_train_steps": args.max_train_steps,
        "learning_rate": 1.5e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 0,
        "validation_prompt": ASKED[0],
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
