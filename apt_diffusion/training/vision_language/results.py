"""What a run of a vision-language task leaves behind: weights that explain themselves, `results.json`, a card."""

from typing import TYPE_CHECKING

from ...baselines import get_method, method_of
from .. import provenance
from ..loss_log import plot_losses
from ..methods import save_trained, trained_parameters
from ..metrics import RESULTS_NAME, plot_metrics, write_json
from ..model_card import write_model_card

if TYPE_CHECKING:
    from .trainer import Run, Task

CARD_SETTINGS = ("train_batch_size", "max_train_steps", "learning_rate")  # after the method and its own settings


def metadata(run: "Run", task: "Task", step: int) -> dict[str, str]:
    """The header of the weights' file."""
    base = provenance.adapter_metadata(
        vars(run.args), run.command, step, base_model=run.args.model_name_or_path, task=run.script
    )
    return base | task.header


def write_results(run: "Run", task: "Task", metrics: dict[str, float], step: int | None) -> None:
    """`results.json`: what was measured, of what, and how."""
    parameters = trained_parameters(task.model) if method_of(task.model) else {}
    content = {
        "task": run.script.removeprefix("train_apt_"),
        "base_model": run.args.model_name_or_path,
        "method": method_of(task.model),
        "metrics": metrics,
        "trained_parameters": sum(parameter.numel() for parameter in parameters.values()),
        "step": step,
        "seed": run.seed,
        "command": run.command,
        "settings": provenance.public_settings(vars(run.args)),
        "versions": provenance.versions(),
    }
    write_json(content, run.output_dir / RESULTS_NAME)
    run.logger.info("Results are in %s.", run.output_dir / RESULTS_NAME)


def finish(run: "Run", task: "Task", metrics: dict[str, float], step: int) -> None:
    """The trained weights, their card and plots."""
    args = run.args
    save_trained(task.model, run.output_dir, metadata(run, task, step))
    names = ("method", *get_method(args.method).defaults(), *CARD_SETTINGS)
    chosen = {name: getattr(args, name) for name in names} | provenance.public_settings(vars(args))
    write_model_card(
        run.output_dir,
        title=run.repo_id or run.output_dir.resolve().name,
        base_model=args.model_name_or_path,
        summary=task.summary,
        usage=task.usage.format(base_model=args.model_name_or_path, place=run.repo_id or args.output_dir),
        tags=[*task.tags, "apt-diffusion", args.method],
        settings=chosen | {"seed": run.seed},
        command=run.command,
        loss_plot=plot_losses(run.output_dir),
        metrics=metrics,
        metrics_plot=plot_metrics(run.output_dir, task.plotted),
    )


def loading_code(method: str) -> dict[str, str]:
    """Two lines for a card: the import, and the call with `{place!r}`."""
    module, name = ("", "load_apt_weights") if method == "apt" else (".baselines", "load_method")
    return {"import_line": f"from apt_diffusion{module} import {name}", "load": f"{name}(model, {{place!r}})"}
