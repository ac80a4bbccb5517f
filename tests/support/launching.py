"""Scripts in two processes on the CPU, as accelerate's launcher starts them."""

import os
import subprocess
import sys

TIMEOUT = 240


def in_two_processes(*words, how=("--multi_gpu",)) -> str:
    """Runs a script with its arguments; returns what both processes print, and fails with it where they fail.

    Args:
        words: the script's path and its arguments.
        how: the launcher's own flags.
    """
    launcher = [
        sys.executable, "-m", "accelerate.commands.launch", *how, "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ]  # fmt: skip
    done = subprocess.run(
        [*launcher, *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_DISABLE_RICH": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout
