"""The trainer of vision-language models: the loop, checkpoints and results that stand once for all of their tasks.

A script brings a `Task`: a model with its method, examples by position, a loss and an evaluation. Everything random
follows from the seed and the position, so that a run that is stopped goes on exactly.
"""

import argparse
import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, PreTrainedConfig

import apt_diffusion.models.meter.configuration_meter  # noqa: F401 (makes its type known to AutoConfig)

from ...data.image_text import Batch
from ...data.order import micro_batches
from ...miniature import MODELS, resolve_model
from .. import checkpoints, hub, provenance
from ..checkpoints import Checkpoint
from ..interrupt import Interrupt
from ..loading import make_loader
from ..loss_log import LossLog, read_log
from ..methods import (
    attach_method,
    check_same_method,
    load_trained,
    method_config,
    save_trained,
    trained_parameters,
)
from ..metrics import METRICS_NAME
from ..optimizer import make_adamw, make_schedule, set_learning_rates
from ..run import agree_on_seed, find_resumed, make_accelerator, report_changes, seed_dropout, start_progress
from .arguments import Recipe
from .predict import to_device
from .results import finish, metadata, write_results

# The factor on all learning rates, from the number of steps done.
Schedule = Callable[[int], float]


@dataclass
class Run:
    """What is known before data and model are loaded."""

    script: str
    args: argparse.Namespace
    accelerator: Accelerator
    command: str
    model_path: str
    config: PreTrainedConfig
    resumed: Checkpoint | None
    seed: int
    repo_id: str | None = None

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def model_type(self) -> str:
        return self.config.model_type

    @property
    def logger(self) -> logging.Logger:
        return logging.getLogger(self.script)

    @property
    def first_step(self) -> int:
        """Steps already done."""
        return self.resumed.step if self.resumed else 0

    @property
    def first_position(self) -> int:
        """Examples already seen."""
        return self.resumed.state["position"] if self.resumed else 0

    @property
    def positions_per_step(self) -> int:
        args = self.args
        return args.train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps


@dataclass
class Task:
    """What a script brings.

    Args:
        model: with its method attached (`attach`).
        examples: by position in the endless stream of training (`TrainingStream`); its length is an epoch.
        collate: items of `examples` to a batch.
        loss: of the model, as accelerate wrapped it, on a batch.
        evaluate: metrics by name, given the model without wrappers; all processes call it together.
        plotted: which metrics to draw; the first is shown in the log.
        header: more strings for the header of the weights' file.
        summary, usage, tags: for the model card; `usage` with `{base_model!r}` and `{place!r}`.
        conclude: what else to do with the trained model, which it gets as `evaluate` does.
        network: what accelerate wraps, and `loss` and `evaluate` get, where it is more than the model within it.
        evaluates_epochs: whether there is an evaluation after every epoch where the flags do not say how often.
        make_optimizer: from named parameters and the steps of an epoch to the optimizer and its schedule; AdamW with
            the flags' rates and schedule if `None`.
    """

    model: nn.Module
    examples: Dataset
    collate: Callable[[list[Any]], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[nn.Module], dict[str, float]]
    plotted: list[str]
    summary: str
    usage: str
    tags: list[str]
    header: dict[str, str] = field(default_factory=dict)
    conclude: Callable[[nn.Module], None] | None = None
    network: nn.Module | None = None
    evaluates_epochs: bool = True
    make_optimizer: Callable[[dict[str, nn.Parameter], int], tuple[torch.optim.Optimizer, Schedule]] | None = None

    def __post_init__(self) -> None:
        self.network = self.model if self.network is None else self.network


@dataclass
class Trainer:
    """What a training step uses."""

    model: nn.Module  # as accelerate wrapped it
    parameters: dict[str, nn.Parameter]
    optimizer: Any
    schedule: Schedule
    loader: DataLoader
    log: LossLog | None  # of metrics; main process only


def start(args: argparse.Namespace, script: str, argv: list[str] | None, recipes: dict[str, Recipe]) -> Run:
    """Processes, seed, checkpoint, model config, output folder: what can be wrong shows before data are read.

    Args:
        args: the script's; what was not given is filled in from the model's recipe.
        script: its name.
        argv: its command line.
        recipes: by type of model; `miniature` is for the embedded ones, where their type's is not.

    Raises:
        ValueError: for a model of another type.
        OSError: for a model that is not there.
    """
    accelerator = make_accelerator(args, script)
    resumed = find_resumed(args)
    path = resolve_model(args.model_name_or_path)
    config = AutoConfig.from_pretrained(path, revision=args.revision)
    if config.model_type not in recipes:
        known = " or ".join(kind.upper() for kind in recipes if kind != "miniature")
        raise ValueError(f"{args.model_name_or_path} is a {config.model_type!r} model: this script trains {known}.")
    embedded = args.model_name_or_path in MODELS and "miniature" in recipes
    recipes["miniature" if embedded else config.model_type].fill_in(args, accelerator.num_processes, config)
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
    command = provenance.command_line(f"train/{script}.py", argv)
    run = Run(script, args, accelerator, command, path, config, resumed, agree_on_seed(args.seed, resumed))
    if accelerator.is_main_process:
        run.output_dir.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_unfinished(run.output_dir)
        if args.push_to_hub:
            run.repo_id = hub.create_repository(args.hub_model_id or run.output_dir.resolve().name, args.hub_token)
    return run


def attach(run: Run, model: nn.Module) -> None:
    """The method that the flags ask for, with the weights of `--adapter` or of the checkpoint where there are some."""
    args, config = run.args, method_config(run.args)
    torch.manual_seed(run.seed)
    source = run.resumed.folder if run.resumed else args.adapter
    if source is not None:
        load_trained(model, source)
        if not args.eval_only:
            check_same_method(model, config, source)
    elif args.eval_only:
        model.requires_grad_(False)  # evaluated as it is: what its encoders say may be kept
    else:
        attach_method(model, config)
    if args.freeze_scale:
        for name, parameter in model.named_parameters():
            if name.endswith(".log_scale"):
                parameter.requires_grad_(False)


def run_task(run: Run, task: Task) -> dict[str, float]:
    """Trains and evaluates, or only evaluates. After Ctrl-C or SIGTERM: `SystemExit`, once a checkpoint is written."""
    accelerator, args = run.accelerator, run.args
    if args.eval_only:
        model, step = accelerator.prepare_model(task.network, evaluation_mode=True), None
        metrics = evaluate(run, task, model)
    else:
        trainer = prepare(run, task)
        signal_number = train(run, task, trainer)
        if signal_number:
            accelerator.end_training()
            raise SystemExit(128 + signal_number)  # what a shell reports of a process that the signal ended
        model, step = trainer.model, max(run.first_step, args.max_train_steps)
        metrics = evaluate(run, task, model)
        if accelerator.is_main_process:
            log_metrics(run, trainer, step, metrics)
            finish(run, task, metrics, step)
    if accelerator.is_main_process:
        write_results(run, task, metrics, step)
    if task.conclude is not None:
        with inference_mode(run, task, model) as inner:
            task.conclude(inner)
    accelerator.wait_for_everyone()
    if run.repo_id and accelerator.is_main_process:
        hub.upload(run.repo_id, run.output_dir, args.hub_token)
    accelerator.end_training()
    return metrics


def prepare(run: Run, task: Task) -> Trainer:
    """Optimizer, schedule, order of the examples, and where all of them stand in a run that is resumed."""
    args, accelerator = run.args, run.accelerator
    steps_per_epoch = math.ceil(len(task.examples) / run.positions_per_step)
    args.max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    if task.evaluates_epochs:
        args.evaluation_steps = args.evaluation_steps or steps_per_epoch
    run.logger.info(
        "%d examples; %d steps per epoch with %d examples each; %d steps in all.",
        len(task.examples), steps_per_epoch, run.positions_per_step, args.max_train_steps,
    )  # fmt: skip
    if run.resumed:
        report_changes(args, run.resumed.state["settings"])
    if args.gradient_checkpointing:
        task.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = trained_parameters(task.model)
    if task.make_optimizer is not None:
        optimizer, schedule = task.make_optimizer(parameters, steps_per_epoch)
    else:
        optimizer = make_optimizer(args, parameters)
        warmup = args.lr_warmup_steps * (args.max_train_steps if args.lr_warmup_steps < 1 else 1)
        schedule = make_schedule(args.lr_scheduler, optimizer, int(warmup), args.max_train_steps, cycles=1, power=1.0)
    model, optimizer = accelerator.prepare(task.network, optimizer)
    log = None
    if run.resumed:
        checkpoints.load_training_state(run.resumed, optimizer.optimizer, parameters, accelerator.scaler)
    if accelerator.is_main_process:
        source = run.resumed.folder.resolve().parent / METRICS_NAME if run.resumed else None
        log = LossLog(run.output_dir, run.first_step, source, METRICS_NAME)
    batches = micro_batches(
        run.first_position,
        max(0, args.max_train_steps - run.first_step) * args.gradient_accumulation_steps,
        args.train_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
    )
    pin_memory = accelerator.device.type == "cuda"
    loader = make_loader(task.examples, batches, task.collate, args.dataloader_num_workers, pin_memory)
    return Trainer(model, parameters, optimizer, schedule, loader, log)


def make_optimizer(args: argparse.Namespace, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; heads and cross-modal layers at their own rates, no weight decay on biases and the model's norms."""
    groups: dict[tuple[float, float], dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        parts = set(name.split("."))
        rate = args.learning_rate
        if "classifier" in parts:
            rate *= args.head_lr_multiplier
        elif "cross_modal" in name:
            rate *= args.cross_modal_lr_multiplier
        decay = 0.0 if name.endswith("bias") or "norm" in name.lower() else args.weight_decay
        groups.setdefault((rate, decay), {})[name] = parameter
    return make_adamw(
        [(group, rate) for (rate, _), group in groups.items()],
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=[decay for _, decay in groups],
        epsilon=args.adam_epsilon,
    )


def train(run: Run, task: Task, trainer: Trainer) -> int:
    """The loop. Returns the number of the signal that ended it early, or 0."""
    args, accelerator, optimizer = run.args, run.accelerator, trainer.optimizer
    progress = start_progress(accelerator, run.script.replace("train_", "").replace("_", "-"), args, run.resumed)
    batches = iter(trainer.loader)
    set_training_mode(task.model)
    with Interrupt() as interrupt:
        for step in range(run.first_step + 1, args.max_train_steps + 1):
            factor = trainer.schedule(step - 1)
            set_learning_rates(optimizer, factor)
            losses = []
            for micro_step in range(args.gradient_accumulation_steps):
                batch = to_device(next(batches), accelerator.device)
                seed_dropout(accelerator, run.seed, step * args.gradient_accumulation_steps + micro_step)
                with accelerator.accumulate(trainer.model):
                    loss = task.loss(trainer.model, batch)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and args.max_grad_norm is not None:
                        accelerator.clip_grad_norm_(list(trainer.parameters.values()), args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.detach())
            progress.add(step, losses, {"lr": args.learning_rate * factor})

            last = step == args.max_train_steps
            checkpoint_due = last or step % args.checkpointing_steps == 0
            evaluation_due = not last and args.evaluation_steps is not None and step % args.evaluation_steps == 0
            # All processes must ask for the others' losses and signals at the same steps.
            alone = accelerator.num_processes == 1
            signal_number = 0
            if checkpoint_due or evaluation_due or step % progress.every == 0 or (alone and interrupt.signal_number):
                signal_number = progress.flush(interrupt.signal_number)
            if accelerator.is_main_process and (checkpoint_due or signal_number):
                save_checkpoint(run, task, trainer, step)
            if signal_number and not last:
                run.logger.info("Signal %d at step %d: --resume_from_checkpoint latest goes on.", signal_number, step)
                progress.close()
                return signal_number
            if evaluation_due:
                metrics = evaluate(run, task, trainer.model)
                if accelerator.is_main_process:
                    log_metrics(run, trainer, step, metrics)
    progress.close()
    return 0


def evaluate(run: Run, task: Task, model: nn.Module) -> dict[str, float]:
    with inference_mode(run, task, model) as inner:
        metrics = task.evaluate(inner)
    run.logger.info("Evaluation: %s", ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    return metrics


@contextlib.contextmanager
def inference_mode(run: Run, task: Task, model: nn.Module) -> Iterator[nn.Module]:
    """Without dropout, gradients, and any trace in training's random numbers.

    Yields:
        `Task.network` without DDP's wrapper, which would make processes wait for each other, but with autocast.
    """
    task.model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield run.accelerator.unwrap_model(model)
    set_training_mode(task.model)


def set_training_mode(model: nn.Module) -> None:
    """Dropout where something learns. What METER's encoders say is fixed while they are frozen, and can be cached."""
    model.train()
    for encoder in (getattr(model.base_model, name, None) for name in ("text_model", "vision_model")):
        if encoder is not None and not any(parameter.requires_grad for parameter in encoder.parameters()):
            encoder.eval()


def log_metrics(run: Run, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
    assert trainer.log is not None  # of the main process
    if step not in [row["step"] for row in read_log(trainer.log.path)]:  # a finished run may be finished again
        trainer.log.append([{"step": step, **metrics}])
    run.accelerator.log(metrics, step=step)


def save_checkpoint(run: Run, task: Task, trainer: Trainer, step: int) -> None:
    state = {
        "step": step,
        "position": run.first_position + (step - run.first_step) * run.positions_per_step,
        "seed": run.seed,
        "settings": provenance.public_settings(vars(run.args)),
    }
    with checkpoints.new_checkpoint(run.output_dir, step) as folder:
        save_trained(task.model, folder, metadata(run, task, step))
        checkpoints.save_training_state(
            folder, trainer.optimizer.optimizer, trainer.parameters, state, run.accelerator.scaler
        )
    checkpoints.prune_checkpoints(run.output_dir, run.args.checkpoints_total_limit, newest=step)
