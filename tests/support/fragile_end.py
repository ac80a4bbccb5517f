"""Runs a script as `fragile_end.py SCRIPT ARGS`, in an interpreter that aborts when it is taken down."""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path


class Fragile:
    """Stands for a thread of gloo that lets go of a tensor too late."""

    def __del__(self, abort: Callable[[], None] = os.abort) -> None:
        abort()


sys.fragile = Fragile()  # the last module to go
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
