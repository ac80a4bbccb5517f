"""Draw a vision-language task and write it to disk, in the layout of the real data set.

    python -m apt_diffusion.miniature.tasks vqa --output_dir data/vqa
    python -m apt_diffusion.miniature.tasks nlvr2 --output_dir data/nlvr2 --train 2000
    python -m apt_diffusion.miniature.tasks retrieval --output_dir data/flickr30k
    python -m apt_diffusion.miniature.tasks classification --output_dir data/classes

vqa             VQAv2: questions, ten answers each, COCO-named pictures; four questions per picture
nlvr2           NLVR2: JSON lines and pairs of pictures; every statement with a true and a false pair
retrieval       Flickr30K: Karpathy's JSON, five captions per picture, four of them worded as pre-training never did
classification  CoOp: image folders and split_zhou_DrawnShapes.json; classes 0 to 11 are base, 12 to 23 new
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from .files import WRITERS, write

DEFAULTS = {  # train, val, test; test splits are those that docs/miniature.md reports on
    "vqa": (1500, 500, 1000),
    "nlvr2": (6000, 1000, 2000),
    "retrieval": (2000, 200, 500),
    "classification": (768, 240, 2400),
}
ITEMS = {"vqa": "pictures", "nlvr2": "statements", "retrieval": "pictures", "classification": "pictures"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m apt_diffusion.miniature.tasks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=list(WRITERS))
    parser.add_argument("--output_dir", required=True, type=Path, help="a new folder")
    for index, split in enumerate(("train", "val", "test")):
        counts = ", ".join(f"{values[index]} {ITEMS[task]} of {task}" for task, values in DEFAULTS.items())
        parser.add_argument(f"--{split}", type=int, metavar="N", help=f"items (default: {counts})")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the training data; val and test are fixed (default: 0)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The command: draws the task and writes it."""
    args = parse_args(argv)
    sizes = dict(zip(("train", "val", "test"), DEFAULTS[args.task], strict=True))
    sizes |= {split: value for split in sizes if (value := getattr(args, split)) is not None}
    try:
        with tqdm(total=sum(sizes.values()), desc=args.task, unit=" items") as bar:
            write(args.task, args.output_dir, sizes, args.seed, bar.update)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.output_dir}: {', '.join(f'{split} {size}' for split, size in sizes.items())} {ITEMS[args.task]}")


if __name__ == "__main__":
    main()
