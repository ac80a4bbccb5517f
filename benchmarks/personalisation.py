#!/usr/bin/env python
"""Which settings of APT learn a subject best, and how does that compare with LoRA of the same size?

    python benchmarks/personalisation.py                       # the table of docs/miniature.md: an hour on two cores
    python benchmarks/personalisation.py --methods lora apt --seeds 0 --steps 100

Every method teaches the miniature Stable Diffusion the same pictures with the same noise, schedule and prior
preservation. Finished runs are kept in --output_dir, so an interrupted sweep goes on, and more methods can be added.
"""

import argparse
import dataclasses
import json
import math
import re
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from apt_diffusion import APTConfig, StableDiffusionAPTPipeline, add_apt, freeze_base
from apt_diffusion.data.folders import find_pictures
from apt_diffusion.miniature.personalise import draw_test, judge, save_class_pictures
from apt_diffusion.miniature.pictures import save_picture_grid, to_images
from apt_diffusion.miniature.subjects import SUBJECTS, save_subject

COLUMNS = ("subject", "recognised", "bleeding", "drift")
LORA_MODULES = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
}


@dataclass(frozen=True)
class Method:
    """An adapter of UNet and text encoder, and its learning rate."""

    lr: float
    unet: dict[str, Any] = field(default_factory=dict)  # APTConfig's, or LoRA's rank
    text_encoder: dict[str, Any] = field(default_factory=dict)
    lora: bool = False

    def attach(self, components: dict[str, nn.Module]) -> list[dict[str, Any]]:
        """Attaches the adapter; parameter groups for the optimizer."""
        settings = {"unet": self.unet, "text_encoder": self.text_encoder}
        for part, model in components.items():
            if self.lora:
                from peft import LoraConfig, inject_adapter_in_model

                rank = settings[part]["rank"]
                config = LoraConfig(
                    r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_MODULES[part]
                )
                model.requires_grad_(False)
                inject_adapter_in_model(config, model)
            else:
                add_apt(model, APTConfig(**settings[part]))
                freeze_base(model)
        return [
            {"params": [p for p in model.parameters() if p.requires_grad], "lr": self.lr, "initial_lr": self.lr}
            for model in components.values()
        ]


def apt(lr: float, num_prompts: int = 200, **unet: Any) -> Method:
    prompts = {"num_prompts": num_prompts}
    return Method(lr, prompts | unet, prompts)


def lora(lr: float, rank: int) -> Method:
    return Method(lr, {"rank": rank}, {"rank": rank}, lora=True)


BOTH = {"query_source": "attn_output", "streams": ("query", "context")}  # O asks, and the text is corrected too
METHODS = {
    # At about 245,000 parameters: the defaults, beside the LoRA of that size.
    "APT 200, the paper's form": apt(3e-3),
    "LoRA r15, lr 1e-3": lora(1e-3, 15),
    "LoRA r15, lr 2e-3": lora(2e-3, 15),
    "LoRA r15, lr 4e-3": lora(4e-3, 15),
    "APT 200, asked by O": apt(3e-3, query_source="attn_output"),
    # At about 430,000 parameters, beside the LoRA of that size.
    "APT 200, both": apt(3e-3, **BOTH),
    "APT 200, both, lr 1.5e-3": apt(1.5e-3, **BOTH),
    "LoRA r27, lr 2e-3": lora(2e-3, 27),
    "LoRA r27, lr 1e-3": lora(1e-3, 27),
    "LoRA r4, lr 2e-3": lora(2e-3, 4),
    "LoRA r4, lr 1e-3": lora(1e-3, 4),
    "LoRA r4, lr 4e-3": lora(4e-3, 4),
    "APT 50, both, lr 3e-3": apt(3e-3, 50, **BOTH),
    "APT 50, both, lr 1.5e-3": apt(1.5e-3, 50, **BOTH),
    "APT 50, both, lr 6e-3": apt(6e-3, 50, **BOTH),
    "APT 50, both, paper init": apt(3e-3, 50, init="paper", **BOTH),
    "APT 50, asked by O, lr 6e-3": apt(6e-3, 50, query_source="attn_output"),
    "APT 50, context alone": apt(3e-3, 50, streams=("context",)),
    "APT 24, asked by O, self-attention too": apt(
        3e-3, 24, query_source="attn_output", target_modules=("attn1", "attn2")
    ),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/personalisation", help="results, pictures, table")
    parser.add_argument("--model", default="miniature", help="a pipeline of the drawn world")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="names, or beginnings of names")
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--images", type=int, default=8, help="per test prompt")
    return parser.parse_args(argv)


class Lesson:
    """Latents and tokens of the subject's and the class's pictures; batches that depend on seed and step alone."""

    def __init__(self, pipeline: Any, instance_dir: Path, class_dir: Path) -> None:
        self.pipeline = pipeline
        self.instance = [self.encode(picture) for picture in find_pictures(instance_dir, "", "text")]
        self.of_class = [self.encode(picture) for picture in find_pictures(class_dir, "", "text")]

    @torch.no_grad()
    def encode(self, picture: Any) -> tuple[Tensor, Tensor]:
        from PIL import Image

        image = self.pipeline.image_processor.preprocess(Image.open(picture.path).convert("RGB"))
        latent = self.pipeline.vae.encode(image).latent_dist.mean * self.pipeline.vae.config.scaling_factor
        tokens = self.pipeline.tokenizer(
            picture.prompt,
            padding="max_length",
            max_length=self.pipeline.tokenizer.model_max_length,
            return_tensors="pt",
        )
        return latent[0], tokens.input_ids[0]

    def batch(self, generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        """`size` pictures of the subject, then as many of the class."""
        chosen = torch.randint(2**20, (2, size), generator=generator).tolist()
        pictures = [self.instance[index % len(self.instance)] for index in chosen[0]]
        pictures += [self.of_class[index % len(self.of_class)] for index in chosen[1]]
        latents, tokens = zip(*pictures, strict=True)
        return torch.stack(latents), torch.stack(tokens)


def learn(pipeline: Any, method: Method, lesson: Lesson, steps: int, seed: int) -> tuple[int, float]:
    """Trains `method` with a cosine schedule. Returns its number of parameters and seconds per step."""
    torch.manual_seed(seed)
    groups = method.attach({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})
    optimizer = torch.optim.AdamW(groups, fused=True)
    parameters = [parameter for group in groups for parameter in group["params"]]
    scheduler = pipeline.scheduler
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * 0.5 * (1 + math.cos(math.pi * step / steps))
        latents, tokens = lesson.batch(generator, 4)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(1000, (len(latents),), generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = pipeline.unet(noisy, timesteps, pipeline.text_encoder(tokens)[0]).sample
        error = (prediction - scheduler.get_velocity(latents, noise, timesteps)).square().mean()
        (2 * error).backward()  # the class pictures' loss weighs as much as the subject's, as in the trainer
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return sum(p.numel() for p in parameters), (time.perf_counter() - start) / steps


def run(job: tuple[str, str, int], args: argparse.Namespace) -> dict[str, Any]:
    """One method, subject and seed: trained, drawn, judged, written."""
    torch.set_num_threads(1)
    name, subject_name, seed = job
    output_dir, subject = Path(args.output_dir), SUBJECTS[subject_name]
    pipeline = load_pipeline(args.model)
    lesson = Lesson(pipeline, output_dir / subject_name, output_dir / "class")
    base_others = torch.load(output_dir / "base_others.pt", weights_only=True)
    parameters, seconds = learn(pipeline, METHODS[name], lesson, args.steps, seed)
    asked, others = draw_test(pipeline, subject, args.images)
    judgement = judge(asked, others, base_others, subject)
    pictures = torch.cat([asked[:: args.images // 2], others[:: args.images]])
    save_picture_grid(to_images(pictures), [""] * len(pictures), picture_file(output_dir, job), len(pictures))
    return {"method": name, "subject_name": subject_name, "seed": seed, "steps": args.steps, "parameters": parameters,
            "seconds": seconds} | dataclasses.asdict(judgement)  # fmt: skip


def picture_file(output_dir: Path, job: tuple[str, str, int]) -> Path:
    name, subject_name, seed = job
    return output_dir / f"{re.sub(r'[^A-Za-z0-9.]+', '_', name)}-{subject_name}-{seed}.png"


def load_pipeline(model: str) -> Any:
    pipeline = StableDiffusionAPTPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prepare(args: argparse.Namespace) -> None:
    """What all runs share: the subjects' pictures, the class pictures, the base model's test pictures."""
    output_dir = Path(args.output_dir)
    if (output_dir / "base_others.pt").is_file():
        return
    for name, subject in SUBJECTS.items():
        save_subject(subject, output_dir / name)
    pipeline = load_pipeline(args.model)
    save_class_pictures(pipeline, output_dir / "class")
    _, others = draw_test(pipeline, SUBJECTS["tree"], args.images)
    torch.save(others, output_dir / "base_others.pt")


def read_results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def format_table(results: list[dict[str, Any]]) -> str:
    """Markdown, one row per method: means and standard deviations over subjects and seeds."""
    lines = [
        "| method | parameters | runs | " + " | ".join(COLUMNS) + " | ms/step |",
        "|---" * (len(COLUMNS) + 4) + "|",
    ]
    for name in dict.fromkeys(result["method"] for result in results):
        rows = [result for result in results if result["method"] == name]
        cells = [spread([row[column] for row in rows]) for column in COLUMNS]
        milliseconds = 1000 * mean(row["seconds"] for row in rows)
        lines.append(
            f"| {name} | {rows[0]['parameters']:,} | {len(rows)} | {' | '.join(cells)} | {milliseconds:.0f} |"
        )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def jobs_left(args: argparse.Namespace, done: list[dict[str, Any]]) -> Iterator[tuple[str, str, int]]:
    finished = {(row["method"], row["subject_name"], row["seed"]) for row in done if row["steps"] == args.steps}
    for name in METHODS:
        for subject in args.subjects:
            for seed in args.seeds:
                if name.startswith(tuple(args.methods)) and (name, subject, seed) not in finished:
                    yield name, subject, seed


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    prepare(args)
    file = output_dir / f"results-{args.steps}.jsonl"
    jobs = list(jobs_left(args, read_results(file)))
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for future in tqdm([pool.submit(run, job, args) for job in jobs], desc="runs"):
            with file.open("a") as log:
                log.write(json.dumps(future.result()) + "\n")
    table = format_table(read_results(file))
    (output_dir / f"table-{args.steps}.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
