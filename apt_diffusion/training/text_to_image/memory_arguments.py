"""Flags of `train_apt_sd.py` on what stays in the device's memory."""

import argparse

from .. import sharding
from .base_precision import base_precision, check_precision


def memory_flags(add) -> None:
    """Adds them to the parser of the trainer."""
    add(
        "--base_precision",
        type=base_precision,
        help="The frozen denoiser in 4 or 8 bits: nf4 (bitsandbytes), int8 or fp8 (torchao), or the path of a GGUF "
        "file with its weights.",
    )
    add("--gradient_checkpointing", action="store_true", help="Less memory, slower steps.")
    add(
        "--gradient_checkpointing_blocks",
        nargs="+",
        metavar="NAME",
        help="The same for the denoiser's blocks whose names begin so only, as up_blocks or transformer_blocks.3.",
    )
    add(
        "--group_offload",
        action="store_true",
        help="Keep the frozen weights of the denoiser's blocks in main memory, each on the device only while it is "
        "used; needs --gradient_checkpointing.",
    )


def check_memory_flags(args: argparse.Namespace) -> None:
    """`ValueError`, `ImportError` or `FileNotFoundError` for what cannot work."""
    _check_offload(args)
    if args.base_precision is not None:
        check_precision(args.base_precision)


def _check_offload(args: argparse.Namespace) -> None:
    if not args.group_offload:
        return
    if not args.gradient_checkpointing or args.gradient_checkpointing_blocks:
        raise ValueError(
            "--group_offload needs --gradient_checkpointing of all blocks: without it every block's weights stay on "
            "the device until the backward pass."
        )
    if args.base_precision is not None:
        raise ValueError(
            "--group_offload and --base_precision exclude each other: quantised weights stay on the device. Leave one "
            "of them out."
        )
    if sharding.is_asked_for():
        raise ValueError(
            "--group_offload and the launcher's shards (--use_fsdp, DeepSpeed's stage 3) exclude each other: "
            "shards have an offloading of their own (--fsdp_offload_params true)."
        )
