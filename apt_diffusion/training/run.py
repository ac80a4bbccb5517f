"""How every training run starts: its processes and its checkpoint."""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, is_tensorboard_available

from .checkpoints import Checkpoint, find_checkpoint
from .optimizer_choice import optimizer_class
from .run_config import ASIDE, RunArguments

# Flags that follow from the data or the checkpoint where they are not given.
SETTLED_LATER = ("max_train_steps", "evaluation_steps", "use_classifier_token")

logger = logging.getLogger(__name__)


def make_accelerator(args: RunArguments, script: str) -> Accelerator:
    """Accelerate and logging, from a script's flags; warns where a launcher started fewer processes than intended."""
    accelerator = Accelerator(
        # Said outright, it lets torchrun and `accelerate launch --multi_gpu` start several processes without a GPU.
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_steps=args.gradient_accumulation_steps or 1,
        mixed_precision=args.mixed_precision,
        log_with=_trackers(args.report_to),
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))),
    )
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s")
    for name in (script, "apt_diffusion"):
        logging.getLogger(name).setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if args.of_deepspeed:
        logger.info(args.of_deepspeed)
    if "MASTER_ADDR" in os.environ and accelerator.num_processes == 1:
        logger.warning(
            "A launcher was asked for several processes, but this is the only one. Without GPUs and MPI, `accelerate "
            "launch` starts them with --multi_gpu (on the CPU, too), or use torchrun --nproc_per_node."
        )
    if accelerator.device.type == "cpu":
        logger.info(_cores_in_use(accelerator.num_processes))
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


def _cores_in_use(processes: int) -> str:
    """A sentence on processes and threads; accelerate's launcher gives a process one thread if not told otherwise."""
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = f"On the CPU: {threads} of {cores} cores"
    if processes > 1:
        return f"{said} for each of {processes} processes."
    if threads < cores:
        return f"{said}. `accelerate launch --num_cpu_threads_per_process {cores}`, or OMP_NUM_THREADS, takes more."
    return f"{said}."


def _trackers(report_to: str) -> str | None:
    """`--report_to` without what accelerate would warn of: trackers that are not installed are left out."""
    if report_to == "none" or (report_to == "tensorboard" and not is_tensorboard_available()):
        return None
    return report_to


def find_resumed(args: argparse.Namespace) -> Checkpoint | None:
    """The checkpoint of `--resume_from_checkpoint`, if there is one."""
    if not args.resume_from_checkpoint:
        return None
    resumed = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    logger.info("Resuming from %s.", resumed.folder if resumed else "nothing, as there is no checkpoint yet")
    if resumed is not None:
        _check_optimizer(args, resumed)
    return resumed


def _check_optimizer(args: argparse.Namespace, resumed: Checkpoint) -> None:
    """The state of one optimizer means nothing to another."""
    before, now = resumed.state["settings"].get("optimizer"), getattr(args, "optimizer", None)
    if before is not None and now is not None and _class_of(before) != _class_of(now):
        raise ValueError(
            f"{resumed.folder} was trained with --optimizer {before}, whose state {now} cannot go on with: give "
            f"--optimizer {before}, or begin a new run in another --output_dir."
        )


def _class_of(optimizer: str) -> object:
    try:
        return optimizer_class(optimizer)
    except (ValueError, ImportError):  # the other machine had it
        return optimizer


def report_changes(args: RunArguments, before: dict[str, Any]) -> None:
    """Says which settings a resumed run has that its checkpoint did not have: then it continues, but not exactly."""
    now = {name: value for name, value in vars(args).items() if name not in ASIDE}
    changes = []
    for name in [*before, *(name for name in now if name not in before)]:
        # A flag that the checkpoint's version did not have, or one that is settled once the data is known.
        unknown = name not in now or (name not in before and now[name] == args.parser.get_default(name))
        is_settled_later = name in SETTLED_LATER and now.get(name) is None
        if not (unknown or is_settled_later or before.get(name) == now[name]):
            changes.append(f"{name} {before.get(name)!r} -> {now[name]!r}")
    if changes:
        logger.info("Settings that differ from the checkpoint's: %s.", ", ".join(changes))
