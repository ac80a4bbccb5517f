"""The loss log of a run, one JSON line per step, and its plot."""

import json
from pathlib import Path
from typing import Any

LOG_NAME = "losses.jsonl"
METRICS_NAME = "metrics.jsonl"
VALIDATION_LOSS = "validation_loss"  # among the metrics
PLOT_NAME = "loss.png"


class LossLog:
    """Appends rows to `losses.jsonl`. A resumed run continues the log exactly where its checkpoint stands.

    Args:
        folder: the run's output folder.
        step: the step at which the run starts: later rows, from a run that went on and was lost, are dropped.
        source: the log that is continued where it is not this one (a checkpoint in another folder).
        name: of the file; another kind of rows has another file.
    """

    def __init__(
        self, folder: str | Path, step: int = 0, source: str | Path | None = None, name: str = LOG_NAME
    ) -> None:
        self.path = Path(folder) / name
        rows = [row for row in read_log(source or self.path) if row["step"] <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{name}.tmp")
        temporary.write_text("".join(_line(row) for row in rows))
        temporary.replace(self.path)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Adds rows; each is one line of JSON."""
        with self.path.open("a") as file:
            file.writelines(_line(row) for row in rows)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """All whole rows; a last line that was cut off by a kill is no row."""
    rows = []
    text = Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).is_file() else ""
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def plot_losses(folder: str | Path) -> Path | None:
    """Draws `losses.jsonl` as `loss.png`: each step, a running mean over a twentieth of the run, held-out losses."""
    import numpy as np
    from matplotlib.figure import Figure

    folder = Path(folder)
    rows = read_log(folder / LOG_NAME)
    if not rows:
        return None
    steps, losses = np.array([[row["step"], row["loss"]] for row in rows]).T
    window = max(1, len(rows) // 20)
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
    axes.plot(steps[window - 1 :], mean, color="tab:blue", linewidth=2, label=f"mean of {window}")
    held_out = [row for row in read_log(folder / METRICS_NAME) if VALIDATION_LOSS in row and row["step"] <= steps[-1]]
    if held_out:
        points = [row["step"] for row in held_out], [row[VALIDATION_LOSS] for row in held_out]
        axes.plot(*points, color="tab:orange", marker=".", label="held-out pictures")
    axes.set(xlabel="step", ylabel="loss", title="Training loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(folder / PLOT_NAME)
    return folder / PLOT_NAME
