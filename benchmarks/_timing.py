"""Timing side by side: every round runs each variant once, so that a slow moment of the machine hits all of them."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


@dataclass
class Result:
    """Seconds of one variant, round by round, beside those of the baseline in the same rounds."""

    name: str
    seconds: list[float]
    baseline: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def ratios(self) -> list[float]:
        return sorted(mine / theirs for mine, theirs in zip(self.seconds, self.baseline, strict=True))

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile of the rounds' ratios."""
        quartiles = statistics.quantiles(self.ratios, n=4) if len(self.ratios) > 1 else [self.ratio] * 3
        return quartiles[0], quartiles[2]


def compare(variants: dict[str, Callable[[], Any]], rounds: int, label: str = "") -> list[Result]:
    """Times all variants in turn, `rounds` times after one round of warm-up. The first is the baseline."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in tqdm(range(rounds + 1), desc=label, leave=False):
        for name, run in variants.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    baseline = next(iter(seconds.values()))
    return [Result(name, values, baseline) for name, values in seconds.items()]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    import diffusers
    import peft
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers, peft)}
    return {"device": device, "threads": str(torch.get_num_threads()), "python": platform.python_version()} | versions


def format_results(results: list[Result]) -> str:
    lines = ["| variant | median ms | ratio | quartiles |", "|---|---|---|---|"]
    for result in results:
        low, high = result.spread
        lines.append(f"| {result.name} | {1000 * result.median:.1f} | {result.ratio:.3f} | {low:.3f} - {high:.3f} |")
    return "\n".join(lines)


def report(title: str, groups: dict[str, list[Result]], output_dir: str | Path, notes: dict[str, Any]) -> None:
    """Prints a table per group; writes all rounds as JSON and the ratios as a plot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    name = title.lower().replace(" ", "_")
    about = machine()
    print(f"\n# {title}\n{', '.join(f'{key} {value}' for key, value in about.items())}")
    for group, results in groups.items():
        print(f"\n{group}\n\n{format_results(results)}")
    for key, value in notes.items():
        print(f"\n{key}: {value}")
    rounds = {group: {r.name: r.seconds for r in results} for group, results in groups.items()}
    (folder / f"{name}.json").write_text(json.dumps({"machine": about, "seconds": rounds, "notes": notes}, indent=2))

    figure, axes = plt.subplots(1, len(groups), figsize=(4.5 * len(groups), 3.5), squeeze=False, layout="constrained")
    for axis, (group, results) in zip(axes[0], groups.items(), strict=True):
        axis.barh([r.name for r in results], [r.ratio for r in results], color="tab:blue")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set(title=group, xlabel="time / baseline")
    figure.savefig(folder / f"{name}.png", dpi=120)
    plt.close(figure)
    print(f"\nWritten: {folder / name}.json, {folder / name}.png")


def arguments(description: str, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds of all variants")
    parser.add_argument("--output_dir", default="runs/benchmarks", help="JSON and plot")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser
