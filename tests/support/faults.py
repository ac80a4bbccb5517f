"""Trainers that are made to fail, in processes of their own; see `fault_server`."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.fault_server import MESSAGE

SERVER = Path(__file__).with_name("fault_server.py")
TRAIN = Path(__file__).parents[2] / "train"
REACH = 600  # seconds to the fault: loading models and finding each other takes long on a busy machine
END = 60  # seconds from the fault: a process that is still there by then hangs


@dataclass(frozen=True)
class End:
    """How a case ended: exit status of each process, `None` for those that hung, and what they printed."""

    codes: list[int | None]
    output: str


class FaultServer:
    """Runs one case after the other."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        assert process.stdout.readline() == "ready\n"

    def run(self, script: str, arguments: list[str], log: Path, fault: dict, processes: int = 1) -> End:
        """Runs `train/<script>.py` with `fault` (see `fault_server`) in so many processes; `log` gets the output."""
        case = {
            "script": str(TRAIN / f"{script}.py"), "arguments": arguments, "processes": processes, "fault": fault,
            "reach": REACH, "end": END, "log": str(log),
        }  # fmt: skip
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return End(answer["codes"], log.read_text())


@contextlib.contextmanager
def fault_server() -> Iterator[FaultServer]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_DISABLE_RICH": "1"}
    with subprocess.Popen(
        [sys.executable, str(SERVER)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield FaultServer(process)
        process.stdin.close()


def assert_ended(end: End, *named: str) -> None:
    """Every process ended by itself, in failure, and the output holds each of `named`."""
    assert None not in end.codes, f"hung, after this output:\n{end.output[-4000:]}"
    assert all(code != 0 for code in end.codes), (end.codes, end.output[-4000:])
    for text in named:
        assert text in end.output, f"{text!r} is not in:\n{end.output[-4000:]}"


__all__ = ["MESSAGE", "End", "FaultServer", "assert_ended", "fault_server"]
