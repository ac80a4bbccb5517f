"""Files of a finished run of a vision-language task, next to its weights: `results.json`, and the card's contents."""

from typing import Any

from torch import nn

from ...baselines import get_method, method_of
from ...io.public_names import public_name
from .. import provenance
from ..methods import trained_parameters
from ..metrics import RESULTS_NAME, plot_metrics, write_json
from ..model_card import base_in_code
from ..session import Session
from .models import BaseModel

CARD_SETTINGS = ("train_batch_size", "max_train_steps", "learning_rate")  # after the method and its own settings


def write_results(session: Session, model: nn.Module, metrics: dict[str, float]) -> None:
    """`results.json`: the metrics, and of which model with which settings; the main process writes it."""
    args = session.args
    if not session.is_main:
        return
    parameters = trained_parameters(model) if method_of(model) else {}
    content = {
        "task": session.script.removeprefix("train_apt_"),
        "base_model": public_name(args.model_name_or_path),
        "method": method_of(model),
        "metrics": metrics,
        "trained_parameters": sum(parameter.numel() for parameter in parameters.values()),
        "step": None if args.eval_only else session.steps_done,
        "seed": session.seed,
        "command": session.command,
        "settings": provenance.public_settings(vars(args)),
        "versions": provenance.versions(),
    }
    write_json(content, session.output_dir / RESULTS_NAME)
    if args.eval_only:  # else `Session.log` has shown them
        session.logger.info("Evaluation: %s", ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    session.logger.info("Results are in %s.", session.output_dir / RESULTS_NAME)


def card(
    session: Session,
    metrics: dict[str, float],
    plotted: list[str],
    summary: str,
    usage: str,
    tags: list[str],
    pipeline_tag: str | None = None,
) -> dict[str, Any]:
    """Arguments of the model card for `Session.finish`.

    Args:
        session: of the run.
        metrics: of the trained model.
        plotted: names of the metrics whose course is drawn.
        summary: a sentence or two on what was trained.
        usage: Python that loads it, with `{base_model!r}` and `{place!r}`.
        tags: for the hub, in addition to the package's and the method's.
        pipeline_tag: the hub's name of the task, if it has one.
    """
    args = session.args
    names = ("method", *get_method(args.method).defaults(), *CARD_SETTINGS)
    chosen = {name: getattr(args, name) for name in names} | provenance.public_settings(vars(args))
    return {
        "base_model": args.model_name_or_path,
        "summary": summary,
        "usage": usage.format(base_model=base_in_code(args.model_name_or_path), place=session.place),
        "tags": [*tags, "apt-diffusion", args.method],
        "settings": chosen | {"seed": session.seed},
        "license": args.license,
        "pipeline_tag": pipeline_tag,
        "metrics": metrics,
        "metrics_plot": plot_metrics(session.output_dir, plotted) if session.is_main else None,
    }


def loading_code(args: Any, base: BaseModel, model: nn.Module) -> dict[str, str]:
    """Parts of a card's Python: `module` and `model_class`, `import_line`, `settings` of the model, `load`, `size`.

    Args:
        args: the script's.
        base: the pre-trained model.
        model: the trained one.
    """
    parts = {
        "module": "apt_diffusion.models.meter" if base.model_type == "meter" else "transformers",
        "model_class": type(model).__name__,
        "kind": base.model_type,
        "settings": "",
        "size": f", {args.image_size}" if args.image_size else "",
    }
    module, name = ("", "load_apt_weights") if args.method == "apt" else (".baselines", "load_method")
    imports, load = [f"from apt_diffusion{module} import {name}"], [f"{name}(model, {{place!r}})"]
    if getattr(args, "use_classifier_token", None) and base.model_type == "meter":
        parts["settings"] = ", use_classifier_token=True"
    elif getattr(args, "use_classifier_token", None):
        imports.append("from apt_diffusion.models.vilt import add_classifier_token")
        load.insert(0, "add_classifier_token(model)")
    return parts | {"import_line": "\n".join(imports), "load": "\n".join(load)}
