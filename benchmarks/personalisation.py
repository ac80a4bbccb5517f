#!/usr/bin/env python
"""How well does APT teach a thing, beside LoRA of the same size, textual inversion and full cross-attention tuning?

    python benchmarks/personalisation.py                            # every method, six things, three seeds: a day
    python benchmarks/personalisation.py --methods APT LoRA --things robot --seeds 0
    python benchmarks/personalisation.py --steps 50 --pictures 1    # few steps, one picture
    python benchmarks/personalisation.py --world shapes --steps 400 --images 8     # the table of docs/miniature.md
    python benchmarks/personalisation.py --world shapes-sd3 --steps 400            # as this on a transformer

Every method teaches an embedded model the same pictures with the same noise, schedule and prior preservation.
A judge looks at the pictures that come out; that of emoji is a network that was trained apart. Finished runs are kept
in --output_dir, so an interrupted sweep goes on, and more methods, things or seeds can be added.
"""

import argparse
import copy
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from _families import Family
from _methods import Method, methods_of
from _worlds import WORLDS
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

from apt_diffusion.data.folders import find_pictures
from apt_diffusion.miniature import resolve_model
from apt_diffusion.miniature.personalise import class_captions, save_class_pictures
from apt_diffusion.miniature.pictures import save_picture_grid, to_images


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/personalisation", help="results, pictures, table, plots")
    parser.add_argument("--methods", nargs="+", default=[""], help="names, or beginnings of names (default: all)")
    parser.add_argument("--world", choices=list(WORLDS), default="emoji", help="model, things and judge")
    parser.add_argument("--things", nargs="+", help="to teach (default: all six emoji, or all three shapes)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=4, help="pictures of the thing; as many of the class")
    parser.add_argument("--pictures", type=int, default=5, help="that teach, from 1 to 5")
    parser.add_argument("--images", type=int, default=2, help="per test prompt")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no", help="of training and drawing")
    parser.add_argument("--device", default="cpu", help="cuda: all --jobs share the GPU; the noise is the CPU's")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    args = parser.parse_args(argv)
    if not 1 <= args.pictures <= 5:
        parser.error(f"--pictures must be from 1 to 5, not {args.pictures}")
    known = WORLDS[args.world].things
    args.things = args.things or list(known)
    if unknown := [thing for thing in args.things if thing not in known]:
        parser.error(f"no such thing: {', '.join(unknown)}; there are {', '.join(known)}")
    return args


class Lesson:
    """Latents and captions of the thing's and the class's pictures; batches that depend on seed and step alone."""

    def __init__(self, pipeline: Any, family: Family, things: Path, class_dir: Path, pictures: int) -> None:
        self.pipeline, self.family = pipeline, family
        self.instance = [self.encode(picture) for picture in find_pictures(things, "", "text")[:pictures]]
        self.of_class = [self.encode(picture) for picture in find_pictures(class_dir, "", "text")]

    @torch.no_grad()
    def encode(self, picture: Any) -> tuple[Tensor, ...]:
        """Latent `(C, H, W)` and what the family keeps of the caption."""
        from PIL import Image

        image = self.pipeline.image_processor.preprocess(Image.open(picture.path).convert("RGB"))
        image = image.to(self.pipeline.device)
        latent = self.pipeline.vae.encode(image).latent_dist.mean * self.pipeline.vae.config.scaling_factor
        return latent[0], *self.family.encode(self.pipeline, picture.prompt)

    def batch(self, generator: torch.Generator, size: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Latents and captions of `size` pictures of the thing, then of as many of the class."""
        chosen = torch.randint(2**20, (2, size), generator=generator).tolist()
        pictures = [self.instance[index % len(self.instance)] for index in chosen[0]]
        pictures += [self.of_class[index % len(self.of_class)] for index in chosen[1]]
        latents, *captions = (torch.stack(column) for column in zip(*pictures, strict=True))
        return latents, tuple(captions)


def learn(
    pipeline: Any, method: Method, words: str, lesson: Lesson, args: argparse.Namespace, seed: int
) -> dict[str, float]:
    """Trains `method` with a cosine schedule: number of parameters, (processor) seconds per step, memory in MB."""
    torch.manual_seed(seed)
    parts = {part: getattr(pipeline, part) for part in lesson.family.parts}
    base = copy.deepcopy(parts) if method.keeps_predictions else {}
    groups = method.attach(pipeline, lesson.family, words)
    parameters = [parameter for group in groups for parameter in group["params"]]
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    generator = torch.Generator().manual_seed(seed)
    wall, processor = time.perf_counter(), time.process_time()
    meter = ActivationMeter(pipeline, lesson.family)
    for step in range(args.steps):
        batch, drawn = lesson.batch(generator, args.batch_size), generator.get_state()
        # Autocast anew in each step: while it lasts, weights are cast once and kept.
        with precision(args), meter if step == 0 else nullcontext():
            prediction, target = lesson.family.predict(pipeline, *batch, generator)
            if base:
                pipeline.register_modules(**base)
                with torch.no_grad():
                    kept, _ = lesson.family.predict(pipeline, *batch, torch.Generator().set_state(drawn))
                pipeline.register_modules(**parts)
                target = torch.cat([target[: args.batch_size], kept[args.batch_size :]])
        # The class pictures' loss weighs as much as the thing's, as in the trainer.
        (2 * (prediction - target).float().square().mean()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        decay = min(method.average, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)  # without averaging, the last value
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    count = sum(p.numel() for p in parameters)
    return {
        "parameters": count,
        "seconds": wall / args.steps,
        "processor_seconds": processor / args.steps,
        "memory": (meter.bytes + 3 * 4 * count) / 1e6,  # with gradients and Adam's two averages, in float32
    }


class ActivationMeter(saved_tensors_hooks):
    """While it lasts, adds up the bytes that are kept for the backward pass, without the model's own weights."""

    def __init__(self, pipeline: Any, family: Family) -> None:
        models = [getattr(pipeline, part) for part in family.parts]
        self.weights = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
        self.kept: dict[int, int] = {}
        super().__init__(self.keep, lambda tensor: tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        """Counts each storage once."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        """So far."""
        return sum(self.kept.values())


def run(job: tuple[str, str, int], args: argparse.Namespace) -> dict[str, Any]:
    """One method, thing and seed: trained, drawn, judged, written."""
    torch.set_num_threads(1)
    name, thing, seed = job
    output_dir, world = Path(args.output_dir), WORLDS[args.world]
    pipeline = load_pipeline(world.model, args.device)
    lesson = Lesson(pipeline, world.family, output_dir / thing, output_dir / "class", args.pictures)
    base = torch.load(base_file(output_dir, thing, args), weights_only=True)
    method = methods_of(world.family)[name]
    cost = learn(pipeline, method, world.name, lesson, args, seed)
    with precision(args):
        drawn = world.draw(pipeline, thing, args.images, **world.settings).float().cpu()
    shown = to_images(drawn[:: args.images])
    save_picture_grid(shown, [""] * len(shown), picture_file(output_dir, job, args), len(shown))
    return {"method": name, "thing": thing, "seed": seed} | cost | world.judge(thing, drawn, base)


def precision(args: argparse.Namespace) -> torch.autocast:
    """Under which everything is computed."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.mixed_precision == "bf16")


def settings_name(args: argparse.Namespace) -> str:
    """Of what all runs of a table have in common."""
    kinds = f"{args.steps}-steps-{args.pictures}-pictures-batch-{args.batch_size}-images-{args.images}"
    return kinds + ("-bf16" if args.mixed_precision == "bf16" else "")


def picture_file(output_dir: Path, job: tuple[str, str, int], args: argparse.Namespace) -> Path:
    """Where a run's sheet goes."""
    name, thing, seed = job
    words = re.sub(r"[^A-Za-z0-9.]+", "_", f"{name}-{thing}-{seed}")
    return output_dir / f"{words}-{settings_name(args)}.png"


def base_file(output_dir: Path, thing: str, args: argparse.Namespace) -> Path:
    """Where the base model's test pictures are."""
    of = f"{thing}-" if WORLDS[args.world].own_prompts else ""
    return output_dir / f"base-{of}{args.images}-{args.mixed_precision}.pt"


def load_pipeline(model: str, device: str) -> Any:
    """An embedded model, in silence."""
    pipeline = DiffusionPipeline.from_pretrained(resolve_model(model), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def prepare(args: argparse.Namespace) -> None:
    """What all runs share: training pictures, class pictures, the base model's test pictures."""
    output_dir, world = Path(args.output_dir), WORLDS[args.world]
    for thing in args.things:
        if not (output_dir / thing).is_dir():
            world.save(thing, output_dir / thing)
    pipeline = load_pipeline(world.model, args.device)
    if not (output_dir / "class").is_dir():
        count = 32 if args.world == "emoji" else 64
        save_class_pictures(pipeline, output_dir / "class", class_captions(world.model, count), **world.settings)
    for thing in args.things:
        if not (file := base_file(output_dir, thing, args)).is_file():
            with precision(args):
                torch.save(world.draw(pipeline, thing, args.images, **world.settings).float().cpu(), file)


def read_results(file: Path) -> list[dict[str, Any]]:
    """Of the runs that are finished."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def format_table(results: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    """Markdown, one row per method: means over things and seeds, with standard deviations."""
    lines = [
        "| method | parameters | MB | runs | " + " | ".join(columns) + " | MB in training | s/step (processor) |",
        "|---" * (len(columns) + 6) + "|",
    ]
    for name in dict.fromkeys(result["method"] for result in results):
        rows = [result for result in results if result["method"] == name]
        cells = [spread([row[column] for row in rows]) for column in columns]
        parameters = rows[0]["parameters"]
        lines.append(
            f"| {name} | {parameters:,} | {4 * parameters / 1e6:.2f} | {len(rows)} | {' | '.join(cells)} "
            f"| {rows[0]['memory']:.0f} | {mean(row['processor_seconds'] for row in rows):.2f} |"
        )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def plot(results: list[dict[str, Any]], column: str, file: Path) -> None:
    """A column against drift, size and time, one point per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(result["method"] for result in results))
    axes_of = {
        "drift": lambda row: row["drift"],
        "parameters": lambda row: row["parameters"],
        "processor seconds per step": lambda row: row["processor_seconds"],
    }
    figure, axes = pyplot.subplots(1, len(axes_of), figsize=(15, 4.5), sharey=True)
    for axis, (label, value) in zip(axes, axes_of.items(), strict=True):
        axis.margins(x=0.4)  # room for the names
        for name in names:
            rows = [result for result in results if result["method"] == name]
            x, y = mean(map(value, rows)), mean(row[column] for row in rows)
            axis.scatter(x, y)
            axis.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axis.set_xlabel(label)
    axes[1].set_xscale("log")
    axes[0].set_ylabel(column)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def jobs_left(args: argparse.Namespace, done: list[dict[str, Any]]) -> Iterator[tuple[str, str, int]]:
    """Seeds first, then things, then methods, so that what is finished can be compared."""
    finished = {(row["method"], row["thing"], row["seed"]) for row in done}
    for seed in args.seeds:
        for thing in args.things:
            for name in methods_of(WORLDS[args.world].family):
                if name.startswith(tuple(args.methods)) and (name, thing, seed) not in finished:
                    yield name, thing, seed


def main(argv: list[str] | None = None) -> None:
    """Runs what is not finished, then prints the table and plots it."""
    args = parse_args(argv)
    output_dir = Path(args.output_dir) / args.world
    args.output_dir = output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    prepare(args)
    file = output_dir / f"results-{settings_name(args)}.jsonl"
    jobs = list(jobs_left(args, read_results(file)))
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for future in tqdm([pool.submit(run, job, args) for job in jobs], desc="runs"):
            with file.open("a") as log:
                log.write(json.dumps(future.result()) + "\n")
    results = read_results(file)
    columns = WORLDS[args.world].columns
    table = format_table(results, columns)
    file.with_suffix(".md").write_text(table + "\n")
    plot(results, columns[0], file.with_suffix(".png"))
    print(table)


if __name__ == "__main__":
    main()
