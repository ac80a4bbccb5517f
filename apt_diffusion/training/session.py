"""One training run: what is the same for every trainer, so that a script holds nothing but its own story.

    with Session.start(args, "train_apt_x") as session:
        ...                                            # checks, models, data: all in the script
        session.plan(epoch_length=len(examples))
        network = session.prepare(network, parameters, optimizer, schedule)
        for batch in session.batches(session.loader(examples, collate)):
            with session.step():
                session.backward(loss(network, batch))
            if session.checkpoint_due:
                session.save_checkpoint(save)
            if session.evaluation_due:
                session.log(evaluate(network))
        session.finish(save, card={...})

The session owns seeds, accumulation, clipping, learning rates, logs, progress, checkpoints, signals, exact resume, and
the agreement of several processes.
"""

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data.order import micro_batches
from ..io.public_names import placeholder
from . import checkpoints, hub, output_folder, processes, provenance, sharding
from .average import Average, MovingAverage, ScheduleFreeAverage, load_trained
from .checkpoints import Checkpoint
from .interrupt import Interrupt
from .loading import make_loader
from .loss_log import LOG_NAME, METRICS_NAME, LossLog, plot_losses, read_log
from .model_card import write_model_card
from .optimizer import Schedule, set_learning_rates, warn_of_untrained
from .optimizer_choice import is_schedule_free
from .progress import Progress
from .run import find_resumed, make_accelerator, report_changes
from .run_config import RunArguments, command_words, write_config
from .seeds import agree_on_seed, seed_dropout


class Session:
    """A run from its first check to its last file; use it as a context manager, after `Session.start`.

    Attributes:
        args: the script's flags. `max_train_steps` is filled in by `plan`.
        accelerator: accelerate's.
        logger: of the script's name.
        command: a command line that makes the same run, without secrets and paths of this machine.
        resumed: the checkpoint that the run continues, or `None`.
        seed: every random choice follows from it.
        is_sharded: whether each process has a shard of the first model only.
        repo_id: where the results will be uploaded, or `None`.
        steps_done: optimizer steps so far, those before a resume included.
        steps_per_epoch: known after `plan`.
        data: what the script says of its data; it is kept in checkpoints.
        checkpoint_due, evaluation_due: whether the script should do this now; `False` between the batches of a step.
            An evaluation may be due before the first batch: the run that is resumed was stopped before it.
    """

    def __init__(
        self,
        args: RunArguments,
        script: str,
        accelerator: Accelerator,
        resumed: Checkpoint | None,
        seed: int,
        is_sharded: bool = False,
    ) -> None:
        self.args = args
        self.script = script
        self.accelerator = accelerator
        self.logger = logging.getLogger(script)
        self.command = provenance.command_line(f"train/{script}.py", command_words(args, seed))
        self.resumed = resumed
        self.seed = seed
        self.is_sharded = is_sharded
        self.repo_id: str | None = None
        self.data: dict[str, Any] = {}
        self.first_step = resumed.step if resumed else 0
        self.steps_done = self.first_step
        self.steps_per_epoch = 0
        self.checkpoint_due = False
        self.evaluation_due = False
        self._evaluates_after: Callable[[int], bool] = lambda step: False
        self._interrupt = Interrupt()
        self._signal_number = 0  # the one that ends the run
        self._batches: Iterator[Any] | None = None
        self._reading = ""  # the place in the data, for errors
        self._losses: list[Tensor] = []  # of the batches of this step
        self._progress: Progress | None = None
        self._average: Average | None = None
        self._metrics_log: LossLog | None = None

    @classmethod
    def start(cls, args: RunArguments, script: str, can_shard: bool = False) -> "Session":
        """Processes, logging, the checkpoint to resume from and the seed; nothing is written yet.

        Args:
            args: the script's flags, of `run_config.parse_args`; their seed is filled in.
            script: its name, as `train_apt_sd`.
            can_shard: whether all processes run the script's evaluations where `evaluates` says so.

        Raises:
            ValueError: for a checkpoint that is not there, or not whole; for shards that the script cannot have.
        """
        accelerator = make_accelerator(args, script)
        is_sharded = sharding.configure(accelerator, script, can_shard)
        resumed = find_resumed(args)
        args.seed = agree_on_seed(args.seed, resumed)
        return cls(args, script, accelerator, resumed, args.seed, is_sharded)

    @property
    def output_dir(self) -> Path:
        """The folder that the run writes to."""
        return Path(self.args.output_dir)

    @property
    def place(self) -> str:
        """Where others find the results: the hub's repository, or what stands for the output folder."""
        return self.repo_id or placeholder(str(self.output_dir))

    @property
    def title(self) -> str:
        """What the results are called: by the hub's repository, or the output folder."""
        return self.repo_id or self.output_dir.resolve().name

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.accelerator.is_main_process

    @property
    def evaluates(self) -> bool:
        """Whether this process runs evaluations: the main one, or all, as each has a shard of the model."""
        return self.is_main or self.is_sharded

    @property
    def examples_per_step(self) -> int:
        """Positions of the data's stream that all processes read together in one optimizer step."""
        args = self.args
        return args.train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps

    def open_output(self) -> None:
        """Makes the output folder with its `config.toml`, and the hub's repository: after all cheap checks."""
        if self.resumed:
            report_changes(self.args, self.resumed.state["settings"])
        if self.is_main:
            output_folder.make(self.output_dir)
            write_config(self.args, self.seed, self.command)
            if self.args.push_to_hub:
                name = self.args.hub_model_id or self.output_dir.resolve().name
                self.repo_id = hub.create_repository(name, self.args.hub_token)

    # Before the first step

    def plan(self, epoch_length: int, evaluates_after: Callable[[int], bool] | None = None) -> None:
        """How many steps the run has: `--max_train_steps`, or `--num_train_epochs`.

        Args:
            epoch_length: examples that an epoch shows.
            evaluates_after: whether `evaluation_due` is set after the step of this number; never after the last one.
        """
        args = self.args
        self.accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
        self.steps_per_epoch = math.ceil(epoch_length / self.examples_per_step)
        args.max_train_steps = args.max_train_steps or args.num_train_epochs * self.steps_per_epoch
        if args.max_train_steps < self.first_step:
            self.logger.warning(
                "The checkpoint has %d steps, more than the %d of --max_train_steps: nothing is trained.",
                self.first_step, args.max_train_steps,
            )  # fmt: skip
        if evaluates_after is not None:
            self._evaluates_after = evaluates_after
        self.logger.info(
            "%d examples per epoch; %d steps per epoch with %d examples each; %d steps in all.",
            epoch_length, self.steps_per_epoch, self.examples_per_step, args.max_train_steps,
        )  # fmt: skip

    @property
    def positions(self) -> list[range]:
        """Places in the data's endless stream, one range per batch of this process, from here to the last step."""
        first = self.resumed.state["position"] if self.resumed else 0
        steps = max(0, self.args.max_train_steps - self.first_step)
        return micro_batches(
            first,
            steps * self.args.gradient_accumulation_steps,
            self.args.train_batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )

    def loader(self, examples: Dataset, collate: Callable[[list[Any]], Any]) -> DataLoader:
        """All batches of this process from here to the last step.

        Args:
            examples: by position in the endless stream of training. An `examples.describe(position)` says in errors
                what stands there.
            collate: examples to a batch: a dict of tensors, or an object with `to(device)`.
        """
        pin_memory = self.accelerator.device.type == "cuda"
        return make_loader(examples, self.positions, collate, self.args.dataloader_num_workers, pin_memory)

    def prepare(
        self,
        models: dict[str, nn.Module],
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        rates: dict[str, float] | None = None,
        average_decay: float | None = None,
    ) -> dict[str, nn.Module]:
        """Makes all ready for the first step: the processes' wrappers, the checkpoint's state, logs, progress bar.

        Args:
            models: all that a step runs, by a name of the script's choice. The first may be sharded.
            parameters: those that are trained, by name.
            optimizer: over them.
            schedule: the factor on all learning rates, from the number of steps done.
            rates: learning rates by the name under which they are logged; `{"lr": args.learning_rate}` if `None`.
            average_decay: of the moving average of the parameters, which is saved in their place; none if `None`.

        Returns:
            The models as accelerate wraps them, by the same names.

        Raises:
            ValueError: where the checkpoint's optimizer had other parameters.
        """
        accelerator = self.accelerator
        if self.is_sharded:
            first, *others = models.values()
            first, self._optimizer = sharding.shard(accelerator, first, optimizer)
            wrapped, self._trained = dict(zip(models, (first, *others), strict=True)), [first]
        else:
            wrapped, self._trained, self._optimizer = processes.wrap(accelerator, models, optimizer)
        self._parameters, self._schedule = parameters, schedule
        self._rates = {"lr": self.args.learning_rate} if rates is None else rates
        if is_schedule_free(optimizer):
            self._average = ScheduleFreeAverage(parameters, optimizer)
        elif average_decay is not None:
            self._average = MovingAverage(parameters, average_decay)
        self._group_settings = copy.deepcopy(checkpoints.group_settings(optimizer))
        if self.resumed:
            checkpoints.load_training_state(self.resumed, self._optimizer.optimizer, parameters, accelerator.scaler)
            load_trained(self.resumed.folder, parameters)
            if self._average is not None:
                self._average.resume(self.resumed.state)
            self.evaluation_due = self.resumed.evaluation_due and self.first_step < self.args.max_train_steps
        self._start_logs()
        return wrapped

    def _start_logs(self) -> None:
        """Trackers, progress bar and loss log; a resumed run continues the log of the one that it resumes."""
        args, accelerator = self.args, self.accelerator
        settings = provenance.public_settings(vars(args)).items()
        project = self.script.removeprefix("train_").replace("_", "-")
        accelerator.init_trackers(
            project,
            config={key: value if isinstance(value, int | float | str) else str(value) for key, value in settings},
        )
        if self.is_main:
            output_folder.settle(self.output_dir, self.resumed)
        log = self._continued_log(LOG_NAME) if self.is_main else None
        self._progress = Progress(accelerator, log, self.first_step, args.max_train_steps)

    def _continued_log(self, name: str) -> LossLog:
        source = self.resumed.folder.resolve().parent / name if self.resumed else None
        return LossLog(self.output_dir, self.first_step, source, name)

    # The loop

    def batches(self, loader: DataLoader) -> Iterator[Any]:
        """The batches of `loader` on the run's device, up to the last step, each to be used in `with session.step()`.

        Learning rates are set before every step, and dropout is seeded for every batch. After Ctrl-C or SIGTERM it
        raises `SystemExit` with 130 or 143 once the step is done and the script has had its turn to save.
        """
        accelerator, accumulation = self.accelerator, self.args.gradient_accumulation_steps
        self._batches = iter(loader)
        places = iter(loader.batch_sampler)
        describe = getattr(loader.dataset, "describe", "example {}".format)
        with self._interrupt, logging_redirect_tqdm():
            for step in range(self.first_step + 1, self.args.max_train_steps + 1):
                set_learning_rates(self._optimizer, self._schedule(step - 1))
                for micro_step in range(accumulation):
                    self._reading = ", ".join(describe(position) for position in next(places))
                    batch = send_to_device(next(self._batches), accelerator.device, non_blocking=True)
                    seed_dropout(accelerator, self.seed, step * accumulation + micro_step)
                    yield batch
                if self._signal_number:
                    self.logger.info(
                        "Signal %d at step %d: --resume_from_checkpoint latest goes on.", self._signal_number, step
                    )
                    raise SystemExit(128 + self._signal_number)  # what a shell reports of a process that it ended
        self._reading = ""
        self._close_progress()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Context manager of one batch: call `backward` in it. After the last batch of a step, the optimizer steps."""
        accelerator, optimizer = self.accelerator, self._optimizer
        if self.evaluation_due and self.is_main:
            checkpoints.note_evaluation(self.output_dir, self.steps_done)
        with accelerator.accumulate(*self._trained):
            yield
            if accelerator.sync_gradients:
                if self.is_sharded:
                    sharding.average_gradients(self._parameters)
                if self.steps_done == self.first_step:
                    warn_of_untrained(self._parameters, self.logger)
                if self.args.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(list(self._parameters.values()), self.args.max_grad_norm)
            optimizer.step()
            if self._average is not None and accelerator.sync_gradients:
                self._average.step()
            optimizer.zero_grad()
        self.checkpoint_due = self.evaluation_due = False
        if len(self._losses) == self.args.gradient_accumulation_steps:
            self._end_step()

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Context manager: what is trained has its average's weights inside; nothing changes in a run without one."""
        return contextlib.nullcontext() if self._average is None else self._average.applied()

    def backward(self, loss: Tensor) -> None:
        """Gradients of a batch's loss, a number, and a note of it for the log."""
        self.accelerator.backward(loss)
        self._losses.append(loss.detach())

    def _end_step(self) -> None:
        """Decides, for all processes alike, what is due after this step."""
        assert self._progress is not None
        progress, accelerator = self._progress, self.accelerator
        self.steps_done = step = self.steps_done + 1
        factor = self._schedule(step - 1)
        progress.add(step, self._losses, {name: rate * factor for name, rate in self._rates.items()})
        self._losses = []
        last = step == self.args.max_train_steps
        self.checkpoint_due = last or step % self.args.checkpointing_steps == 0
        self.evaluation_due = not last and self._evaluates_after(step)
        # All processes must ask for the others' losses and signals at the same steps.
        alone = accelerator.num_processes == 1
        signalled = alone and self._interrupt.signal_number is not None
        if self.checkpoint_due or self.evaluation_due or step % progress.every == 0 or signalled:
            signal_number = progress.flush(self._interrupt.signal_number)
            if signal_number and not last:
                self._signal_number = signal_number
                self.checkpoint_due, self.evaluation_due = True, False

    def save_checkpoint(self, save: Callable[[Path], Any]) -> None:
        """Writes `checkpoint-N`, whole or not at all, and removes old ones; the main process does.

        Args:
            save: writes what is trained into the folder that it gets.
        """
        checkpoints.check_finite(self._parameters, self.steps_done)
        if not self.is_main:
            return
        first = self.resumed.state["position"] if self.resumed else 0
        state = {
            "step": self.steps_done,
            "position": first + (self.steps_done - self.first_step) * self.examples_per_step,
            "seed": self.seed,
            "settings": provenance.kept_settings(vars(self.args)),
            "data": self.data,
            checkpoints.EVALUATION: self.steps_done < self.args.max_train_steps
            and self._evaluates_after(self.steps_done),
        }
        with checkpoints.new_checkpoint(self.output_dir, self.steps_done) as folder:
            if self._average is not None:
                state |= self._average.save(folder)
            with self.averaged():
                save(folder)
            optimizer, scaler = self._optimizer.optimizer, self.accelerator.scaler
            checkpoints.save_training_state(folder, optimizer, self._parameters, state, scaler, self._group_settings)
        checkpoints.prune_checkpoints(self.output_dir, self.args.checkpoints_total_limit, newest=self.steps_done)

    def log(self, metrics: dict[str, float]) -> None:
        """Metrics of the model as it is now: to the terminal, `metrics.jsonl` and the trackers."""
        self.logger.info("Evaluation: %s", ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        if self.is_main:
            if self._metrics_log is None:
                self._metrics_log = self._continued_log(METRICS_NAME)
            # A finished run may be finished again.
            if self.steps_done not in [row["step"] for row in read_log(self._metrics_log.path)]:
                self._metrics_log.append([{"step": self.steps_done, **metrics}])
        self.accelerator.log(metrics, step=self.steps_done)

    def _close_progress(self) -> None:
        if self._progress is not None:
            self._progress.close()

    # The end

    def header(self, **known: str) -> dict[str, str]:
        """Strings for the header of the trained weights' file: settings, command line and versions, and `known`."""
        return provenance.adapter_metadata(vars(self.args), self.command, self.steps_done, **known)

    def finish(self, save: Callable[[Path], Any], card: dict[str, Any]) -> None:
        """The trained weights, the plot of the loss and the model card in the output folder; the main process writes.

        Args:
            save: writes what is trained into the folder that it gets.
            card: arguments of `write_model_card` that only the script knows.
        """
        checkpoints.check_finite(self._parameters, self.steps_done)
        if not self.is_main:
            return
        with self.averaged():
            save(self.output_dir)
        self.logger.info("The trained weights are in %s.", self.output_dir)
        write_model_card(
            self.output_dir,
            title=self.title,
            command=self.command,
            loss_plot=plot_losses(self.output_dir),
            **card,
        )

    def upload(self) -> None:
        """Sends the output folder to the hub where `--push_to_hub` was given."""
        if self.repo_id is not None:
            hub.upload(self.repo_id, self.output_dir, self.args.hub_token)

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interrupt.restore()
        self._batches = None  # ends the loader's workers
        self._close_progress()
        if error is None or self._signal_number:
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()
        elif self._reading:
            # The other processes may wait for this one: it must not wait for them.
            self.logger.error("The run failed after step %d. Examples read last: %s.", self.steps_done, self._reading)
