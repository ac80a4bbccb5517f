"""README.md next to an adapter: its contents, its use, its training. It is a valid model card for the hub."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..io.public_names import placeholder, public_name
from ..miniature import MODELS
from .provenance import public_settings, versions


def write_model_card(
    folder: str | Path,
    *,
    title: str,
    base_model: str,
    summary: str,
    usage: str,
    tags: list[str],
    settings: dict[str, Any],
    command: str,
    prompt: str | None = None,
    images: Sequence[Path] = (),
    loss_plot: Path | None = None,
    metrics: dict[str, float] | None = None,
    metrics_plot: Path | None = None,
) -> Path:
    """Writes `README.md`. It names no licence: that is for the owner of the pictures to choose.

    Args:
        folder: the run's output folder.
        title: the heading.
        base_model: the model that was adapted, a hub id or a path, of which the card has the name.
        summary: some sentences on what the adapter is.
        usage: Python that loads it.
        tags: for the hub.
        settings: of the training; secrets are left out.
        command: the command line of the training.
        prompt: the prompt that names the subject.
        images: sample images inside `folder`.
        loss_plot: the picture of the loss inside `folder`.
        metrics: results by name.
        metrics_plot: their course, a picture inside `folder`.
    """
    folder = Path(folder)
    front: dict[str, Any] = {"library_name": "apt-diffusion", "tags": tags}
    if _is_hub_id(base_model):
        front["base_model"] = base_model
    if prompt:
        front["instance_prompt"] = prompt
    # JSON is YAML: no value can break the front matter.
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()), "---", ""]
    lines += [f"# {plain(title)}", "", summary, "", f"- Base model: {_named(base_model)}"]
    if prompt:
        lines += [f"- Trigger prompt: {code(prompt)}"]
    lines += ["", *(f"![samples]({image.relative_to(folder).as_posix()})" for image in images), ""]
    if metrics:
        lines += ["## Results", "", "| metric | value |", "|---|---|"]
        lines += [*(f"| {plain(name)} | {value:.4g} |" for name, value in metrics.items()), ""]
    if metrics_plot:
        lines += [f"![metrics]({metrics_plot.relative_to(folder).as_posix()})", ""]
    lines += ["## Use", "", *fenced(usage.strip(), "python"), "", "## Training", ""]
    if loss_plot:
        lines += [f"![loss]({loss_plot.relative_to(folder).as_posix()})", ""]
    lines += [*fenced(command, "bash"), "", "| setting | value |", "|---|---|"]
    lines += [f"| {plain(key)} | {_cell(value)} |" for key, value in public_settings(settings).items()]
    lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()) + ".", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    return folder / "README.md"


def _is_hub_id(base_model: str) -> bool:
    return base_model.count("/") == 1 and not Path(base_model).exists() and not base_model.startswith((".", "/", "~"))


def _named(base_model: str) -> str:
    local = base_in_code(base_model) != base_model
    return f"{code(public_name(base_model))}{', a folder of whoever trained this' if local else ''}"


def base_in_code(base_model: str) -> str:
    """The base model in code of the card: its hub id or embedded name, or a placeholder for a folder."""
    return base_model if base_model in MODELS else placeholder(base_model)


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return code(text).replace("|", "\\|")


def code(text: str) -> str:
    """A text of others as one line of code: the fence is longer than any row of backticks in it."""
    text = " ".join(text.split())
    fence = _fence(text, 1)
    space = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{space}{text}{space}{fence}"


def fenced(text: str, language: str) -> list[str]:
    """A text of others as a block of code."""
    fence = _fence(text, 3)
    return [f"{fence}{language}", text, fence]


def plain(text: str) -> str:
    """A text of others in one line, in which no character is markup of Markdown or HTML."""
    text = " ".join(text.split())
    # An underscore between letters or digits, as in the names of settings, is no markup.
    text = re.sub(r"([\\`*{}\[\]()<>#!|~&@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)
    return re.sub(r"(?<=:)(?=//)|(?<=www)(?=\.)|^(?=[-+=])|(?<=^\d)(?=[.)])", r"\\", text)  # links and lists


def _fence(text: str, least: int) -> str:
    return "`" * max(least, 1 + max((len(row) for row in re.findall("`+", text)), default=0))
