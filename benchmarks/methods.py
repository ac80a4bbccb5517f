#!/usr/bin/env python
"""APT and the methods that it is compared with, on the drawn vision-language tasks, by the trainers themselves.

    python benchmarks/methods.py                                         # the table of docs/vision_language.md
    python benchmarks/methods.py --tasks vqa --models vilt --methods apt lora --seeds 0 1 2

Within a task all methods get the same steps, batches, order of examples and schedule, and of each method's learning
rates (`Method.learning_rates`) the one that does best on the validation split with the first seed. Finished runs are
kept in --output_dir, so that a comparison that was stopped goes on, and more methods and seeds can be added.
"""

import argparse
import importlib
import json
import logging
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from accelerate.state import AcceleratorState, GradientState
from tqdm import tqdm

from apt_diffusion.baselines import get_method, method_names
from apt_diffusion.training.metrics import RESULTS_NAME, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))


@dataclass(frozen=True)
class Task:
    """A trainer's script, its data, and the flags of its budget.

    Args:
        data: the drawn task.
        models: which of the miniature models it trains.
        flags: the budget.
        chosen_by: the metric that chooses a learning rate, on the validation split where the task has one.
        reported: metrics of the table, by column.
        seed_flag: of the script.
        script: `train_apt_<script>.py`; the task's name if `None`.
    """

    data: str
    models: tuple[str, ...]
    flags: dict[str, Any]
    chosen_by: str
    reported: dict[str, str]
    seed_flag: str = "seed"
    script: str | None = None


SHARED = {"no-augment": True, "report_to": "none", "hidden_dropout_prob": 0.0}
# In runs this short untrained prompts disturb ViLT and METER more than they help: docs/vision_language.md.
OF_METHOD = {("apt", "vilt"): {"init": "identity"}, ("apt", "meter"): {"init": "identity"}}
CLIP = {"no-augment": True, "report_to": "none", "optimizer": "adamw", "train_batch_size": 16}
AT_THE_END = {"evaluation_steps": 10**6}
TASKS = {
    "vqa": Task(
        "vqa",
        ("vilt", "meter"),
        SHARED | AT_THE_END | {"max_train_steps": 200},
        "accuracy",
        {"VQA accuracy": "accuracy"},
    ),
    "nlvr2": Task(
        "nlvr2",
        ("vilt", "meter"),
        SHARED | AT_THE_END | {"max_train_steps": 200},
        "dev_accuracy",
        {"NLVR2 test-P accuracy": "test_p_accuracy"},
    ),
    "retrieval": Task(
        "retrieval",
        ("vilt", "meter"),
        SHARED | {"max_train_steps": 150, "max_evaluation_images": 100, "evaluation_splits": ["val", "test"]},
        "val_text_recall@1",
        {"text recall@1": "test_text_recall@1", "image recall@1": "test_image_recall@1"},
    ),
    "clip": Task(
        "classification",
        ("clip",),
        CLIP | {"num_train_epochs": 10},
        "val_accuracy",
        {"base classes": "base_accuracy", "new classes": "new_accuracy"},
        seed_flag="seeds",
    ),
    "few_shot": Task(
        "classification",
        ("clip",),
        CLIP | {"protocol": "few_shot", "max_train_steps": 200},
        "val_accuracy",
        {"all classes": "accuracy"},
        seed_flag="seeds",
        script="clip",
    ),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/methods", help="data, runs, table, plot")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--models", nargs="+", default=["vilt", "meter", "clip"], choices=["vilt", "meter", "clip"])
    parser.add_argument("--methods", nargs="+", default=list(method_names()), choices=method_names())
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--learning_rates", nargs="+", type=float, help="in place of each method's own")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Job:
    task: str
    model: str
    method: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.model}-{self.method}-{self.rate:g}-{self.seed}"


def run(job: Job, output_dir: Path) -> dict[str, Any]:
    """The trainer's `results.json`; from before where this job was finished already."""
    task, folder = TASKS[job.task], output_dir / "runs" / job.name
    if not (folder / RESULTS_NAME).is_file():
        flags = (
            task.flags
            | OF_METHOD.get((job.method, job.model), {})
            | {
                "model_name_or_path": f"miniature-{job.model}",
                "data_dir": data_folder(task, output_dir),
                "output_dir": folder,
                "method": job.method,
                "learning_rate": job.rate,
                task.seed_flag: job.seed,
            }
        )
        if job.model == "meter" and not get_method(job.method).trains_base:
            flags["cache_encoder_outputs"] = output_dir / "encoder-outputs"
        words = [word for name, value in flags.items() for word in words_of(name, value)]
        AcceleratorState._reset_state(reset_partial_state=True)  # of the run before, in this same process
        GradientState._reset_state()
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
            importlib.import_module(f"train_apt_{task.script or job.task}").main(words)
        for checkpoint in folder.glob("checkpoint-*/optimizer.safetensors"):
            checkpoint.unlink()  # only results are kept
    return json.loads((folder / RESULTS_NAME).read_text())


def words_of(name: str, value: Any) -> list[str]:
    """Of one flag on a command line."""
    values = value if isinstance(value, list) else [] if value is True else [value]
    return [f"--{name}", *map(str, values)]


def data_folder(task: Task, output_dir: Path) -> Path:
    """The drawn task in its official layout, drawn once."""
    folder = output_dir / "data" / task.data
    if not folder.is_dir():
        command = [sys.executable, "-m", "apt_diffusion.miniature.tasks", task.data, "--output_dir", str(folder)]
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(command, check=True)
    return folder


def all_jobs(args: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    for task in args.tasks:
        for model in TASKS[task].models:
            if model in args.models:
                yield from ((task, model, method) for method in args.methods)


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per finished run with the chosen learning rate."""
    output_dir, rows = Path(args.output_dir), []
    for task, model, method in tqdm(list(all_jobs(args)), desc="methods"):
        rates = args.learning_rates or get_method(method).learning_rates
        first = {rate: run(Job(task, model, method, rate, args.seeds[0]), output_dir) for rate in rates}
        best = max(rates, key=lambda rate: first[rate]["metrics"][TASKS[task].chosen_by])
        for seed in args.seeds:
            result = run(Job(task, model, method, best, seed), output_dir)
            rows.append(
                {
                    "task": task, "model": model, "method": method, "learning_rate": best, "seed": seed,
                    "parameters": result["trained_parameters"], "metrics": result["metrics"],
                }
            )  # fmt: skip
        write_json(rows, output_dir / "methods.json")
    return rows


def table_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """`{method: {column: values}}`; a column is a metric of a task on a model."""
    table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for column, metric in TASKS[row["task"]].reported.items():
            table[row["method"]][f"{column}, {row['model']}"].append(row["metrics"][metric])
    return table


def format_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: methods by columns in percent, with the spread over seeds; the best of a column in bold."""
    table = table_of(rows)
    columns = list(dict.fromkeys(column for cells in table.values() for column in cells))
    best = {column: max(mean(cells[column]) for cells in table.values() if column in cells) for column in columns}
    lines = [f"| method | parameters | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for method, cells in table.items():
        own = [row["parameters"] for row in rows if row["method"] == method]
        sizes = f"{min(own):,}" if min(own) == max(own) else f"{min(own):,} to {max(own):,}"
        shown = [spread(cells[column], best[column]) if column in cells else "" for column in columns]
        lines.append(f"| {get_method(method).label} | {sizes} | {' | '.join(shown)} |")
    return "\n".join(lines)


def spread(values: list[float], best: float) -> str:
    text = f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")
    return f"**{text}**" if mean(values) == best else text


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """One panel per column: a bar per method, a dot per seed."""
    from matplotlib.figure import Figure

    table = table_of(rows)
    columns = list(dict.fromkeys(column for cells in table.values() for column in cells))
    figure = Figure(figsize=(3.2 * len(columns), 3.4), dpi=120, layout="constrained")
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        methods = [method for method in table if column in table[method]]
        colors = ["tab:orange" if method == "apt" else "tab:blue" for method in methods]
        labels = [get_method(method).label for method in methods]
        axes.barh(labels, [100 * mean(table[method][column]) for method in methods], color=colors, alpha=0.6)
        for method in methods:
            values = [100 * value for value in table[method][column]]
            axes.plot(values, [get_method(method).label] * len(values), "k.", markersize=4)
        every = [100 * value for method in methods for value in table[method][column]]
        axes.set(title=column, xlim=(max(0, min(every) - 8), min(100, max(every) + 4)))
        axes.invert_yaxis()
        axes.tick_params(labelleft=column == columns[0])
        axes.grid(alpha=0.3, axis="x")
    figure.savefig(file)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    output_dir = Path(args.output_dir)
    logging.basicConfig()  # here, not within the first run, whose log file is closed at its end
    rows = compare(args)
    table = format_table(rows)
    (output_dir / "methods.md").write_text(table + "\n")
    plot(rows, output_dir / "methods.png")
    print(table)


if __name__ == "__main__":
    main()
