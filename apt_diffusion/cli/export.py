"""`apt-diffusion export`: the denoiser of a base with adapters, for onnxruntime or as a program of `torch.export`."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from .generate import parse_adapter

EXAMPLES = """\
examples:
  adapters as constants of the graph, mixed by their weights:
    apt-diffusion export --adapter out:0.8 --output exported
  one graph for many adapters: the graph takes the adapter as input
    apt-diffusion export --adapter out --adapter_inputs --output exported
  the inputs of one more adapter for that graph, without the base model:
    apt-diffusion export --add_to exported --adapter other
"""


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog,
        description="Write the denoiser of a diffusion model, with APT adapters, for other runtimes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="miniature", help="hub id or folder of a diffusers pipeline (default: the embedded model)")
    add("--revision", help="of a hub model")
    add("--variant", help="of the model's files, such as fp16")
    add(
        "--adapter",
        action="append",
        required=True,
        metavar="PATH[:WEIGHT]",
        help="folder, file or hub repository of an adapter, with its weight (default: 1); may be repeated",
    )
    add("--format", choices=("onnx", "torch"), default="onnx", help="default: %(default)s")
    add(
        "--adapter_inputs",
        action="store_true",
        help="the graph takes an adapter as input, and adapters/ has the inputs for each --adapter; without this flag "
        "they are constants of the graph",
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--output", type=Path, metavar="FOLDER", help="a new folder: the graph, and what it takes")
    place.add_argument(
        "--add_to",
        type=Path,
        metavar="FOLDER",
        help="a folder that was exported with --adapter_inputs: write the inputs of each --adapter into it, no graph",
    )
    add("--dtype", choices=("float32", "float16"), default="float32", help="of the weights (default: %(default)s)")
    add("--height", type=int, help="in pixels, of the traced call (default: the model's)")
    add("--width", type=int, help="in pixels, of the traced call (default: the model's)")
    add("--no_verify", action="store_true", help="do not run the graph once to compare it with the model")
    add("--overwrite", action="store_true", help="replace an exported folder, or with --add_to an adapter's inputs")
    return parser


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, float]:
    """`{adapter: weight}`; refuses numbers that cannot be used and flags without effect. `ValueError`."""
    for name in ("height", "width"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    adapters = dict(map(parse_adapter, args.adapter))
    if len(adapters) < len(args.adapter):
        raise ValueError("--adapter names one adapter twice: give each once.")
    for place, weight in adapters.items():
        if not math.isfinite(weight):
            raise ValueError(f"The weight of an adapter must be a finite number, got {place}:{weight}.")
    if args.add_to is not None:
        kept = {"adapter", "add_to", "overwrite"}
        idle = [name for name, value in vars(args).items() if name not in kept and value != parser.get_default(name)]
        if idle:
            raise ValueError(f"--{idle[0]} has no effect with --add_to, which writes no graph: leave it out.")
    return adapters


def load_pipeline(args: argparse.Namespace) -> Any:
    """The base, on the CPU."""
    from ..quiet import hide_torchvision_notices

    hide_torchvision_notices()
    import diffusers
    import torch

    from ..miniature import resolve_model

    return diffusers.DiffusionPipeline.from_pretrained(
        resolve_model(args.model), dtype=getattr(torch, args.dtype), revision=args.revision, variant=args.variant
    )


def add_inputs(args: argparse.Namespace, adapters: dict[str, float]) -> list[Path]:
    """Writes the inputs of adapters into an exported folder; all of them fit, or none is written."""
    from ..export import Manifest, adapter_inputs, write_inputs

    manifest = Manifest.read(args.add_to)
    for place, weight in adapters.items():
        adapter_inputs(place, manifest, weight)
    return [write_inputs(args.add_to, place, weight, overwrite=args.overwrite) for place, weight in adapters.items()]


def export(args: argparse.Namespace, adapters: dict[str, float]) -> list[Path]:
    """Writes the exported folder, and says what is not in it."""
    from ..export.writing import check_free, check_libraries, export_denoiser
    from ..io.files import read_adapter_file, resolve_adapter_file

    check_libraries(args.format, not args.no_verify)
    check_free(args.output, args.overwrite)
    parts = {part for place in adapters for part in read_adapter_file(resolve_adapter_file(place)).configs or ()}
    pipe = load_pipeline(args)
    pipe.set_progress_bar_config(disable=True)
    size = {name: getattr(args, name) for name in ("height", "width") if getattr(args, name) is not None}
    manifest = export_denoiser(
        pipe, args.output, adapters, args.format, args.adapter_inputs, args.model, args.overwrite,
        not args.no_verify, **size,
    )  # fmt: skip
    others = sorted(parts - {manifest.component, ""})
    if others:
        print(
            f"note: the graph is the {manifest.component}; what the adapters change in {', '.join(others)} is not in "
            f"it: load_apt_weights(pipe, adapter, components={others}).",
            file=sys.stderr,
        )
    return sorted(path for path in args.output.rglob("*") if path.is_file())


def main(argv: list[str], prog: str) -> int:
    """Exports; returns 1, after one sentence, for what cannot be exported."""
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    try:
        adapters = check(args, parser)
        files = export(args, adapters) if args.add_to is None else add_inputs(args, adapters)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(map(str, files)))
    return 0
