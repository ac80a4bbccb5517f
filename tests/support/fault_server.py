"""Runs scripts that are made to fail, each in processes of its own, without importing torch anew for each.

Reads cases as JSON lines from stdin and answers each with a JSON line. A case is

    {"script": path, "arguments": [...], "processes": 1, "fault": {...}, "log": path,
     "reach": seconds from the start to the fault, "end": seconds from the fault to the end}

and its answer `{"codes": [exit status of each process, null where it had to be killed], "seconds": ...}`. What the
processes print is in the file `log`; a file `log`.fault appears when the fault happens. Several processes find each
other as those of any launcher do, by environment variables; no launcher ends the others when one of them fails.

A fault is `{"call": "module:Class.function", "number": n, "rank": r}`: the n-th call of this function in the process
of rank r raises; or `{"corrupt": path}`: this file is cut in half when the first loader starts.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

WARM_UP = ("torch", "diffusers", "transformers", "accelerate", "torch.utils.data", "matplotlib.figure")
MESSAGE = "a fault that a test made"


def main() -> None:
    for name in WARM_UP:
        importlib.import_module(name)
    from diffusers import DDIMScheduler, StableDiffusionPipeline  # noqa: F401 (lazy modules load what they name)
    from transformers import AutoConfig, CLIPModel, ViltForQuestionAnswering  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        port = free_port()
        start = time.monotonic()
        children = []
        for rank in range(case["processes"]):
            child = os.fork()
            if child == 0:
                return run(case, rank, port)  # and on to the interpreter's usual end, whatever is raised
            children.append(child)
        codes = wait_for(children, happened(case["log"]), case["reach"], case["end"])
        print(json.dumps({"codes": codes, "seconds": time.monotonic() - start}), flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def happened(log: str) -> Path:
    """A file that is there from the moment of the fault on."""
    return Path(f"{log}.fault")


def wait_for(children: list[int], fault: Path, reach: float, end: float) -> list[int | None]:
    """Exit statuses. Processes that outlive the deadline are killed with their group, and have none."""
    codes: dict[int, int | None] = {}
    deadline, is_reached = time.monotonic() + reach, False
    while len(codes) < len(children):
        if not is_reached and (fault.exists() or codes):  # an end before the fault is one that the others must notice
            deadline, is_reached = time.monotonic() + end, True
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.killpg(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    codes[child] = None
        time.sleep(0.02)
    return [codes[child] for child in children]


def run(case: dict, rank: int, port: int) -> None:
    os.setsid()
    log = os.open(case["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    if case["processes"] > 1:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case["processes"], "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"})
    make_fault(case["fault"], rank, happened(case["log"]))
    sys.argv = [case["script"], *case["arguments"]]
    sys.path.insert(0, str(Path(case["script"]).parent))
    runpy.run_path(case["script"], run_name="__main__")


def make_fault(fault: dict, rank: int, mark: Path) -> None:
    """Prepares the fault; `mark` is made when it happens."""
    if "corrupt" in fault:
        from torch.utils.data import DataLoader

        original, file = DataLoader.__iter__, Path(fault["corrupt"])

        def iterate(loader):
            if rank == 0:
                os.truncate(file, file.stat().st_size // 2)
                mark.touch()
            return original(loader)

        DataLoader.__iter__ = iterate
    elif rank == fault["rank"]:
        module, _, path = fault["call"].partition(":")
        owner = importlib.import_module(module)
        *classes, name = path.split(".")
        for part in classes:
            owner = getattr(owner, part)
        original_call, calls = getattr(owner, name), []

        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == fault["number"]:
                mark.touch()
                raise RuntimeError(MESSAGE)
            return original_call(*args, **kwargs)

        setattr(owner, name, call)


if __name__ == "__main__":
    main()
