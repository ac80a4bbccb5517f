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
from .run_config import RunArguments

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
    return resumed


def report_changes(args: argparse.Namespace, before: dict[str, Any]) -> None:
    """Says which settings a resumed run has that its checkpoint did not have: then it continues, but not exactly."""
    now = vars(args)
    changes = [
        f"{name} {before[name]!r} -> {now[name]!r}" for name in before if now.get(name) not in (None, before[name])
    ]
    if changes:
        logger.info("Settings that differ from the checkpoint's: %s.", ", ".join(changes))
