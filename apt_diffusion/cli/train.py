"""`apt-diffusion train`: one of the five trainers, in this process or in several that accelerate starts."""

import importlib
import sys
import textwrap

from ..training.scripts import TRAINERS, scripts_folder, trainer_script
from . import unknown

# Flags of `accelerate launch`, with the number of values that each takes. No trainer has one of these names.
LAUNCH_FLAGS = {
    "--config_file": 1,
    "--num_processes": 1,
    "--num_machines": 1,
    "--machine_rank": 1,
    "--main_process_ip": 1,
    "--main_process_port": 1,
    "--gpu_ids": 1,
    "--num_cpu_threads_per_process": 1,
    "--multi_gpu": 0,
    "--cpu": 0,
}


def usage(prog: str) -> str:
    """What `apt-diffusion train --help` prints."""
    rows = [f"  {name:<12}{summary}" for name, summary in TRAINERS.items()]
    return "\n".join(
        [
            f"usage: {prog} [LAUNCHER FLAGS] TRAINER [FLAGS]",
            "",
            "trainers (each has --help):",
            *rows,
            "",
            "In one process by default. With one of accelerate's flags, `accelerate launch` starts the processes:",
            f"  {prog} --num_processes 2 sd --instance_data_dir pictures ...",
            "Before the trainer's name every flag of `accelerate launch` is passed on, after it these:",
            textwrap.fill(
                " ".join(LAUNCH_FLAGS), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
            ),
        ]
    )


def split(words: list[str]) -> tuple[list[str], str | None, list[str]]:
    """Flags for `accelerate launch`, the trainer's name (`None` where there is none), and the trainer's own flags."""
    for index, word in enumerate(words):
        is_value = index > 0 and words[index - 1].startswith("--") and "=" not in words[index - 1]
        if word in TRAINERS and not (is_value and LAUNCH_FLAGS.get(words[index - 1])):
            launch, rest = taken(words[index + 1 :])
            return words[:index] + launch, word, rest
    return [], None, words


def taken(words: list[str]) -> tuple[list[str], list[str]]:
    """Splits what follows the trainer's name into flags of `accelerate launch` and all others."""
    launch: list[str] = []
    rest: list[str] = []
    index = 0
    while index < len(words):
        name, equals, _ = words[index].partition("=")
        count = 1 + (LAUNCH_FLAGS[name] if name in LAUNCH_FLAGS and not equals else 0)
        (launch if name in LAUNCH_FLAGS else rest).extend(words[index : index + count])
        index += count
    return launch, rest


def main(argv: list[str], prog: str) -> int:
    """Trains. What goes wrong in the trainer is raised as the trainer raises it."""
    launch, name, rest = split(argv)
    if name is None:
        if not argv or argv[0] in ("-h", "--help"):
            print(usage(prog))
            return 0 if argv else 2
        given = next((word for word in argv if not word.startswith("-")), argv[0])
        print(unknown("trainer", given, list(TRAINERS), f"{prog} --help"), file=sys.stderr)
        return 2
    if launch and not {"-h", "--help"} & set(rest):
        from accelerate.commands.launch import launch_command, launch_command_parser

        launch_command(launch_command_parser().parse_args([*launch, str(trainer_script(name)), *rest]))
        return 0
    # As `python train_apt_sd.py` would: the folder is importable, so that a worker process finds what it unpickles.
    sys.path.insert(0, str(scripts_folder()))
    sys.argv = [f"{prog} {name}", *rest]
    importlib.import_module(f"train_apt_{name}").main()
    return 0
