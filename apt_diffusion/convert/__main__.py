"""Converts an official checkpoint of METER, ViLT or APT (a Lightning file) into a folder for `from_pretrained`.

    python -m apt_diffusion.convert meter_clip16_288_roberta_pretrain.ckpt models/meter-384 --image_size 384 \\
        --tokenizer roberta-base
    python -m apt_diffusion.convert vilt_200k_mlm_itm.ckpt models/vilt --tokenizer bert-base-uncased
    python -m apt_diffusion.convert apt_vqa.ckpt models/vilt-apt-vqa
    python -m apt_diffusion.convert some.ckpt --dry_run

Only tensors are read from the file; none of its code is run. Every key is accounted for, in the folder's
conversion.txt. A checkpoint with APT also gives pytorch_apt_weights.safetensors (prompts and heads), one with the head
of image-text matching also matching_head.safetensors, from which retrieval starts.
"""

import argparse
import sys

from .conversion import TASKS, convert


def main(arguments: list[str] | None = None, prog: str = "python -m apt_diffusion.convert") -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="the official file")
    parser.add_argument("output", nargs="?", help="a new folder")
    parser.add_argument("--task", choices=TASKS, help="which class of model (default: that of the checkpoint's head)")
    parser.add_argument(
        "--image_size", type=int, help="of METER, to which image positions are resized (default: the checkpoint's)"
    )
    parser.add_argument("--tokenizer", help="roberta-base (METER), bert-base-uncased (ViLT): to write a processor too")
    parser.add_argument("--dry_run", action="store_true", help="say what would become of each key, write nothing")
    args = parser.parse_args(arguments)
    if args.output is None and not args.dry_run:
        parser.error("give an output folder, or --dry_run")
    try:
        account = convert(
            args.checkpoint, None if args.dry_run else args.output, args.task, args.image_size, args.tokenizer
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.dry_run:
        print(account)
    print(account.summary())
    if not args.dry_run:
        print(f"Written: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
