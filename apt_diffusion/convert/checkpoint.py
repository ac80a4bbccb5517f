"""Reading a Lightning checkpoint: its tensors and nothing else. No code of the file is ever run."""

import pickle
import re
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

# Frameworks whose classes Lightning files hold next to the tensors (callbacks, AttributeDict, ...). Their objects are
# read as plain dicts, so that neither the framework nor any code of the file is needed.
FRAMEWORKS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "sacred.", "argparse.Namespace")
# Torch's messages for a file that needs a class or function to be called.
_NEEDS_CODE = re.compile(
    r"GLOBAL [\w.]+|[^.]*call reduce for unrecognized function[^.]*|Can only (?:build|create)[^.]*"
)


class _Shell:
    """Stands for a class of a framework; every instance is an empty dict, whatever it was made from."""

    def __new__(cls, *args: object) -> OrderedDict:  # type: ignore[misc]  # the one dict that torch lets have state
        return OrderedDict()


def read_checkpoint(file: str | Path) -> dict[str, Tensor]:
    """The `state_dict` of a Lightning checkpoint, or of a file that is a plain dict of tensors, on the CPU.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for another kind of file, one that is cut off, or one that could only be read by running its code.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        shells = [(_Shell, name) for name in names if name.startswith(FRAMEWORKS)]
        with torch.serialization.safe_globals(shells):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        code = _NEEDS_CODE.search(str(error))
        if code is None:
            raise ValueError(
                f"{file} cannot be read as a PyTorch checkpoint: it is cut off, damaged or of another format. Copy it "
                f"again. ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            ) from error
        raise ValueError(
            f"{file} holds more than tensors and plain values, and reading it would run code from the file "
            f"({code[0]}). If you trust where it is from, keep its tensors only: "
            "torch.save({'state_dict': torch.load(old, weights_only=False)['state_dict']}, new)."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds no `state_dict` of tensors: it is no Lightning checkpoint of a model.")
    return dict(state)
