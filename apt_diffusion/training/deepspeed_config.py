"""DeepSpeed's config, followed without its engine: `accelerate launch --use_deepspeed`, with or without a file.

What ZeRO's stages 1 and 2 share out, the gradients and the optimizer states of what is trained, is a few MiB for an
adapter. Its flat shards would also change what optimizers compute that look at whole matrices or at all parameters
together (Muon, Adafactor, Prodigy). So with these stages a run is a plain one in several processes; with stage 3 the
frozen base is cut into shards by FSDP2. Numbers of the config hold, or are refused where flags say otherwise.
"""

import argparse
import json
import math
import os
from typing import Any

from ..data.settings_file import read_text

_ASKED = "ACCELERATE_USE_DEEPSPEED"  # this and the names below are set by `accelerate launch`
_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
_STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
_OFFLOAD = "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"
_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
_CLIPPING = "ACCELERATE_GRADIENT_CLIPPING"
_FLAGS = {
    "train_micro_batch_size_per_gpu": "train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
_SECTIONS = ("zero_optimization", "fp16", "bf16")
_REPLACED = {"optimizer": "--optimizer and --learning_rate", "scheduler": "--lr_scheduler"}
_KNOWN = {*_FLAGS, *_SECTIONS, "train_batch_size", "steps_per_print"}
_FLAG = "--deepspeed_config_file"


def follow(args: argparse.Namespace) -> str | None:
    """Where the launcher asked for DeepSpeed, has accelerate do the same by PyTorch's means; call it before it starts.

    Flags without a value, and the precision, become the config's.

    Args:
        args: the script's flags.

    Returns:
        A sentence on what is done in its place; `None` where DeepSpeed was not asked for.

    Raises:
        ValueError: for a file that is no config; with all numbers that differ from the flags; for sections that other
            flags replace; for weights offloaded to a disk.
    """
    if os.environ.get(_ASKED, "false").lower() != "true":
        return None
    config = _read()
    stage, offload = _stage_and_offload(config["zero_optimization"])
    _follow_precision(config, args)
    _follow_numbers(config, args)
    os.environ[_ASKED] = "false"
    if stage == 3:
        os.environ.update(
            ACCELERATE_USE_FSDP="true",
            FSDP_VERSION="2",
            FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
            FSDP_OFFLOAD_PARAMS=str(offload == "cpu").lower(),
        )
        done = "FSDP2 cuts the frozen base into shards, as stage 3 does"
        done += ", and keeps them in main memory" if offload == "cpu" else ""
    else:
        done = f"stage {stage} has next to nothing to share out of an adapter, so every process has all of it"
    aside = sorted(config.keys() - _KNOWN)
    without = f" Not followed: {', '.join(aside)}." if aside else ""
    return f"DeepSpeed's config is followed without its engine: {done}.{without}"


def _read() -> dict[str, Any]:
    """The config of the file, or that of the launcher's own flags; it has `zero_optimization`."""
    file = os.environ.get(_FILE, "none")
    if file == "none":
        zero = {
            "stage": int(os.environ.get(_STAGE, "2")),
            "offload_param": {"device": os.environ.get(_OFFLOAD, "none")},
        }
        steps, clipping = (os.environ.get(name, "auto") for name in (_ACCUMULATION, _CLIPPING))
        return {
            "zero_optimization": zero,
            "gradient_accumulation_steps": steps if steps == "auto" else int(steps),
            "gradient_clipping": clipping if clipping == "auto" else float(clipping),
        }
    text = read_text(_FLAG, file)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:  # also for a number of thousands of digits
        raise ValueError(f"{_FLAG}: {file} is no JSON: {error}.") from error
    if not isinstance(config, dict) or not all(isinstance(config.get(key, {}), dict) for key in _SECTIONS):
        raise ValueError(f"{_FLAG}: {file} is no config of DeepSpeed: an object whose sections are objects.")
    for section in config.keys() & _REPLACED:
        raise ValueError(f"{_FLAG}: {file} has {section!r}: take it out, and give {_REPLACED[section]}.")
    return {"zero_optimization": {}} | config


def _stage_and_offload(zero: dict[str, Any]) -> tuple[int, str]:
    stage, offload = zero.get("stage", 0), zero.get("offload_param") or {}
    device = offload.get("device", "none") if isinstance(offload, dict) else offload
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"DeepSpeed's stage is {stage!r}: it can be 0, 1, 2 or 3.")
    if device not in ("none", "cpu"):
        raise ValueError(f"DeepSpeed's offload_param is {device!r}: frozen weights can be kept by 'cpu' or 'none'.")
    return stage, device


def _follow_precision(config: dict[str, Any], args: argparse.Namespace) -> None:
    asked = []
    for name in ("fp16", "bf16"):
        enabled = config.get(name, {}).get("enabled", "auto")
        if enabled != "auto" and not isinstance(enabled, bool):
            raise ValueError(f'DeepSpeed\'s {name}.enabled is {enabled!r}: true, false or "auto".')
        asked += [name] if enabled is True else []
    chosen = {*asked} | ({args.mixed_precision} - {None})
    if len(asked) == 2 or (asked and len(chosen) == 2):
        flag = f", --mixed_precision says {args.mixed_precision}" if args.mixed_precision else ""
        raise ValueError(f"DeepSpeed's config enables {' and '.join(asked)}{flag}: a run has one precision.")
    args.mixed_precision = next(iter(asked), args.mixed_precision)


def _follow_numbers(config: dict[str, Any], args: argparse.Namespace) -> None:
    wrong = []
    for key, flag in _FLAGS.items():
        value, now = _number(config, key), getattr(args, flag)
        if value is None or value == now:
            continue
        if now is None:
            setattr(args, flag, value)
        else:
            wrong.append(f"{key} is {value} and --{flag} {now}")
    total, counts = _number(config, "train_batch_size"), (args.train_batch_size, args.gradient_accumulation_steps)
    if total is not None and None not in counts:
        batch = counts[0] * counts[1] * int(os.environ.get("WORLD_SIZE", "1"))
        wrong += [] if total == batch else [f"train_batch_size is {total} and that of all processes {batch}"]
    if wrong:
        raise ValueError(
            f'DeepSpeed\'s config and the flags differ: {"; ".join(wrong)}. Change one, or write "auto" in the config.'
        )


def _number(config: dict[str, Any], key: str) -> float | None:
    """A number of the config; `None` for "auto", none, and a clipping of 0, which is none."""
    value, whole = config.get(key), key != "gradient_clipping"
    if value in (None, "auto") or (not whole and value == 0):
        return None
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not 0 < value < math.inf:
        raise ValueError(f'DeepSpeed\'s {key} is {value!r}: a number above 0{", whole" if whole else ""}, or "auto".')
    return value
