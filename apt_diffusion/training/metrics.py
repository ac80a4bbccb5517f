"""Logs evaluation metrics, plots them, and writes `results.json`."""

import json
from pathlib import Path
from typing import Any

from ..io.atomic import write_text
from .loss_log import METRICS_NAME, read_log

PLOT_NAME = "metrics.png"
RESULTS_NAME = "results.json"


def write_json(content: Any, file: str | Path) -> Path:
    """Writes a JSON file, whole or as it was before."""
    return write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def plot_metrics(folder: str | Path, names: list[str]) -> Path | None:
    """Draws the metrics called `names` of `metrics.jsonl` as `metrics.png`; nothing where there are not two points."""
    from matplotlib.figure import Figure

    folder = Path(folder)
    rows = read_log(folder / METRICS_NAME)
    if len(rows) < 2:
        return None
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name in names:
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], marker=".", label=name)
    axes.set(xlabel="step", title="Evaluation")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(folder / PLOT_NAME)
    return folder / PLOT_NAME
