"""`apt-diffusion generate`: pictures of a prompt, with a diffusion model and any number of adapters."""

import argparse
import inspect
import math
import sys
from pathlib import Path
from typing import Any

from ..io.atomic import replacing
from ..miniature import TEXT_TO_IMAGE

# Names that people know schedulers by, and diffusers' classes.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
DTYPES = ("float32", "float16", "bfloat16")
EXAMPLES = """\
examples:
  the embedded model, offline:
    apt-diffusion generate "a red circle on a plain blue background" --output circle.png
  with an adapter, four pictures and a sheet of them:
    apt-diffusion generate "a sks glyph" --adapter out --num_images 4 --output glyphs/ --grid glyphs/sheet.png
  two adapters, mixed:
    apt-diffusion generate "a sks glyph" --adapter out:0.7 --adapter other:0.5
  a real Stable Diffusion:
    apt-diffusion generate "a photo of sks dog" --model stable-diffusion-v1-5/stable-diffusion-v1-5 --adapter out

The same seed gives the same picture: picture N of a prompt is drawn from the noise of seed + N.
"""


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog,
        description="Draw pictures with a diffusion model and APT adapters.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT", help="what to draw; each prompt has its own pictures")
    add(
        "--model",
        default="miniature",
        help="hub id or folder of a diffusers pipeline, or one file of a base (default: the embedded model)",
    )
    add("--base_config", metavar="PLACE", help="hub id or folder with the configuration of a base in one file")
    add("--revision", help="of a hub model")
    add("--variant", help="of the model's files, such as fp16")
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="PATH[:WEIGHT]",
        help="folder, file or hub repository of an adapter, with its weight (default: 1); may be repeated: the "
        "corrections are added",
    )
    add("--negative_prompt", help="what the pictures shall not show")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--num_images", type=int, default=1, metavar="N", help="pictures per prompt (default: %(default)s)")
    add("--batch_size", type=int, default=4, help="pictures drawn at a time (default: %(default)s)")
    add("--steps", type=int, help="denoising steps (default: the model's; 15 for the embedded one)")
    add("--guidance_scale", type=float, help="default: the model's; 3 for the embedded one")
    add("--height", type=int, help="in pixels (default: the model's)")
    add("--width", type=int, help="in pixels (default: the model's)")
    add("--scheduler", choices=sorted(SCHEDULERS), help="default: the model's")
    add(
        "--output",
        type=Path,
        default=Path("picture.png"),
        metavar="PATH",
        help="a file for one picture; more are numbered (picture-1.png, ...). A folder gets numbered files "
        "(default: %(default)s)",
    )
    add("--grid", type=Path, metavar="FILE", help="also a PNG with all pictures, labelled")
    add("--overwrite", action="store_true", help="replace files that are there")
    add("--device", help="such as cuda, mps or cpu (default: the first of these that is there)")
    add("--dtype", choices=DTYPES, help="default: float16 on cuda, else float32")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuses numbers that cannot be used. `ValueError` with cause and remedy."""
    for name in ("num_images", "batch_size", "steps", "height", "width"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    if not 0 <= args.seed < 2**63 - args.num_images:
        raise ValueError(f"--seed must be from 0 to 2**63 - 1, got {args.seed}.")
    for text in args.adapter:
        if not math.isfinite(parse_adapter(text)[1]):
            raise ValueError(f"The weight of an adapter must be a finite number, got {text}.")
    for prompt in args.prompts:
        if not prompt.strip():
            raise ValueError("A prompt is empty: write what the pictures shall show.")


def parse_adapter(text: str) -> tuple[str, float]:
    """`("out", 0.7)` of "out:0.7"; the weight is 1 where there is none."""
    place, colon, weight = text.rpartition(":")
    try:
        return (place, float(weight)) if colon and place else (text, 1.0)
    except ValueError:  # the colon belongs to the path
        return text, 1.0


def output_files(output: Path, count: int) -> list[Path]:
    """Where the pictures go: see `--output`. `ValueError` for a file name that is no picture's."""
    from PIL import Image

    if output.is_dir() or not output.suffix:
        return [output / f"picture-{index + 1:0{len(str(count))}d}.png" for index in range(count)]
    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{output}: pictures cannot be written as {output.suffix}; use .png, .jpg or .webp.")
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{index + 1:0{len(str(count))}d}") for index in range(count)]


def check_free(files: list[Path], overwrite: bool) -> None:
    """`FileExistsError` for files that would be lost."""
    there = [str(file) for file in files if file.exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise FileExistsError(f"{there[0]}{more} would be replaced: choose another --output, or add --overwrite.")


def load_pipeline(args: argparse.Namespace, adapters: list[tuple[str, float]]) -> Any:
    """The pipeline with its adapters. Adapter files are found before the model is loaded."""
    from ..quiet import hide_torchvision_notices

    hide_torchvision_notices()
    import diffusers
    import torch

    from .. import load_apt_weights, set_apt_adapters
    from ..convert.single_file import base_folder
    from ..io.files import resolve_adapter_file
    from ..miniature import resolve_model

    files = [resolve_adapter_file(place) for place, _ in adapters]
    device = args.device or default_device()
    dtype = getattr(torch, args.dtype or ("float16" if device.startswith("cuda") else "float32"))
    place = resolve_model(base_folder(args.model, args.base_config))
    if args.negative_prompt is not None:
        index = diffusers.DiffusionPipeline.load_config(place, revision=args.revision)
        check_negative_prompt(getattr(diffusers, index["_class_name"], None))
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        place, dtype=dtype, revision=args.revision, variant=args.variant
    )
    if args.scheduler:
        pipe.scheduler = make_scheduler(args.scheduler, pipe.scheduler)
    names = [f"adapter{index}" for index in range(len(files))]
    for name, file in zip(names, files, strict=True):
        load_apt_weights(pipe, file, adapter_name=name)
    if names:
        set_apt_adapters(pipe, names, [weight for _, weight in adapters])
    return pipe.to(device)


def check_negative_prompt(pipeline_class: type | None) -> None:
    """`ValueError` for a class of diffusers that has no use for `--negative_prompt`."""
    if pipeline_class is None:  # not one of diffusers
        return
    call: Any = vars(pipeline_class).get("__call__", pipeline_class)
    arguments = inspect.signature(call).parameters
    guidance = arguments.get("true_cfg_scale")
    if "negative_prompt" not in arguments:
        reason = "takes none"
    elif guidance is not None and guidance.default <= 1:
        reason = "reads it only with true_cfg_scale above 1, which this command does not set"
    else:
        return
    raise ValueError(f"--negative_prompt has no effect: {pipeline_class.__name__} {reason}. Leave it out.")


def default_device() -> str:
    """The fastest device that torch can use here."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def make_scheduler(name: str, present: Any) -> Any:
    """The scheduler of this name with the settings of the present one. `ValueError` where the model cannot use it."""
    import diffusers

    scheduler_class = getattr(diffusers, SCHEDULERS[name])
    usable = {one.__name__ for one in present.compatibles} | {type(present).__name__}
    if scheduler_class.__name__ not in usable:
        known = ", ".join(short for short, full in SCHEDULERS.items() if full in usable)
        raise ValueError(f"This model cannot be sampled with --scheduler {name}; these go: {known}.")
    return scheduler_class.from_config(present.config)


def draw(pipe: Any, args: argparse.Namespace, wanted: list[tuple[str, int]]) -> list[Any]:
    """One picture per prompt and seed. Each has a generator of its own, so that the batch size does not matter."""
    import torch

    is_embedded = args.model in TEXT_TO_IMAGE
    settings = {
        "num_inference_steps": args.steps or (15 if is_embedded else None),
        "guidance_scale": 3.0 if is_embedded and args.guidance_scale is None else args.guidance_scale,
        "height": args.height,
        "width": args.width,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    pictures: list[Any] = []
    for start in range(0, len(wanted), args.batch_size):
        part = wanted[start : start + args.batch_size]
        if args.negative_prompt is not None:
            settings["negative_prompt"] = [args.negative_prompt] * len(part)
        generators = [torch.Generator().manual_seed(seed) for _, seed in part]
        # By name: pipelines that also edit pictures, such as Flux.2's, take a picture first.
        pictures += pipe(prompt=[prompt for prompt, _ in part], generator=generators, **settings).images
    return pictures


def labels(prompts: list[str], wanted: list[tuple[str, int]]) -> tuple[list[str], str]:
    """A short label for each picture of the grid, and the title: the prompts, numbered where there are several."""
    if len(prompts) == 1:
        return [f"seed {seed}" for _, seed in wanted], prompts[0]
    title = "; ".join(f"{number}: {prompt}" for number, prompt in enumerate(prompts, 1))
    count = len(wanted) // len(prompts)
    return [f"{index // count + 1}, seed {seed}" for index, (_, seed) in enumerate(wanted)], title


def save(picture: Any, file: Path) -> None:
    """Writes under a temporary name and renames: the file is whole or not there."""
    with replacing(file) as temporary:
        picture.save(temporary)


def main(argv: list[str], prog: str) -> int:
    """Draws and writes; returns 1, after one sentence, for what cannot be drawn."""
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    try:
        check(args)
        wanted = [(prompt, args.seed + index) for prompt in args.prompts for index in range(args.num_images)]
        files = output_files(args.output, len(wanted))
        check_free([*files, *([args.grid] if args.grid else [])], args.overwrite)
        pipe = load_pipeline(args, [parse_adapter(text) for text in args.adapter])
        pictures = draw(pipe, args, wanted)
        for picture, file in zip(pictures, files, strict=True):
            save(picture, file)
        if args.grid:
            from ..training.grids import save_grid

            save_grid(pictures, *labels(args.prompts, wanted), args.grid)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(map(str, [*files, *([args.grid] if args.grid else [])])))
    return 0
