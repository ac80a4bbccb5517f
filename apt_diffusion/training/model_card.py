"""README.md next to an adapter: its contents, its use, its training. It is a valid model card for the hub."""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..io.public_names import placeholder, public_name
from ..miniature import MODELS
from .provenance import public_settings, versions

LICENSE_HELP = (
    "Licence of the adapter for its card, by the hub's name (apache-2.0, openrail, other, ...). None if not set: the "
    "owner of the pictures chooses it."
)


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
    pipeline_tag: str | None = None,
    license: str | None = None,
    triggers: Sequence[str] = (),
    samples: Mapping[Path, str] | None = None,
    contact_sheet: Path | None = None,
    loss_plot: Path | None = None,
    metrics: dict[str, float] | None = None,
    metrics_plot: Path | None = None,
) -> Path:
    """Writes `README.md`.

    Args:
        folder: the run's output folder.
        title: the heading.
        base_model: the model that was adapted, a hub id or a path, of which the card has the name.
        summary: some sentences on what the adapter is.
        usage: Python that loads it.
        tags: for the hub.
        settings: of the training; secrets are left out.
        command: the command line of the training.
        pipeline_tag: the hub's name of the task.
        license: the hub's name of a licence; none if `None`, since the owner of the pictures chooses it.
        triggers: prompts that ask for the subject.
        samples: sample images inside `folder`, with their prompts.
        contact_sheet: a picture of the whole run's samples inside `folder`.
        loss_plot: the picture of the loss inside `folder`.
        metrics: results by name.
        metrics_plot: their course, a picture inside `folder`.
    """
    from huggingface_hub import ModelCardData

    folder = Path(folder)
    shown = {image.relative_to(folder).as_posix(): prompt for image, prompt in (samples or {}).items()}
    on_hub = _is_hub_id(base_model)
    widget = [{"text": prompt, "output": {"url": place}} for place, prompt in shown.items()]
    optional = {
        "base_model_relation": "adapter" if on_hub else None,
        "instance_prompt": triggers[0] if triggers else None,
        "widget": widget or None,
    }
    front = ModelCardData(
        base_model=base_model if on_hub else None,
        library_name="apt-diffusion",
        license=license,
        pipeline_tag=pipeline_tag,
        tags=tags,
        **optional,
    )
    lines = ["---", front.to_yaml(), "---", "", f"# {plain(title)}", ""]
    lines += ["<Gallery />", ""] if widget else []  # the hub's view of the widget's pictures
    lines += [summary, "", f"- Base model: {_named(base_model)}"]
    if triggers:
        lines += [f"- Trigger {'prompts' if len(triggers) > 1 else 'prompt'}: {', '.join(map(code, triggers))}"]
    lines += ["", *(f"![samples]({place})" for place in shown), ""]
    if metrics:
        lines += ["## Results", "", "| metric | value |", "|---|---|"]
        lines += [*(f"| {plain(name)} | {value:.4g} |" for name, value in metrics.items()), ""]
    if metrics_plot:
        lines += [f"![metrics]({metrics_plot.relative_to(folder).as_posix()})", ""]
    lines += ["## Use", "", *fenced(usage.strip(), "python"), "", "## Training", ""]
    if contact_sheet:
        lines += [f"![samples while training]({contact_sheet.relative_to(folder).as_posix()})", ""]
    if loss_plot:
        lines += [f"![loss]({loss_plot.relative_to(folder).as_posix()})", ""]
    lines += [*fenced(command, "bash"), "", "| setting | value |", "|---|---|"]
    lines += [f"| {plain(key)} | {_cell(value)} |" for key, value in public_settings(settings).items()]
    lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()) + ".", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    return folder / "README.md"


def license_id(text: str) -> str:
    """A licence as the hub names it, for a flag."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", text):
        raise argparse.ArgumentTypeError(
            "must be the hub's short name of a licence, such as apache-2.0, openrail or other "
            f"(https://huggingface.co/docs/hub/repositories-licenses), got {text!r}"
        )
    return text


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
