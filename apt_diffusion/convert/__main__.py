"""Converts an official checkpoint of METER, ViLT or APT (a Lightning file) into a folder for `from_pretrained`.

    python -m apt_diffusion.convert meter_clip16_288_roberta_pretrain.ckpt models/meter-384 --image_size 384 \\
        --tokenizer roberta-base
    python -m apt_diffusion.convert vilt_200k_mlm_itm.ckpt models/vilt --tokenizer bert-base-uncased
    python -m apt_diffusion.convert apt_vqa.ckpt models/vilt-apt-vqa
    python -m apt_diffusion.convert some.ckpt --dry_run
    python -m apt_diffusion.convert out peft-folder --to peft
    python -m apt_diffusion.convert peft-folder out --to apt

With --to, an adapter is rewritten: a file of `save_apt_weights` as PEFT's folder, or PEFT's folder as such a file.

Of a checkpoint, only tensors are read; none of its code is run. Every key is accounted for, in the folder's
conversion.txt. A checkpoint with APT also gives pytorch_apt_weights.safetensors (prompts and heads), one with the head
of image-text matching also matching_head.safetensors, from which retrieval starts.
"""

import argparse
import sys

from .conversion import TASKS, convert


def main(arguments: list[str] | None = None, prog: str = "python -m apt_diffusion.convert") -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="the official file; with --to an adapter")
    parser.add_argument("output", nargs="?", help="a new folder; with --to apt also a .safetensors file")
    parser.add_argument("--task", choices=TASKS, help="which class of model (default: that of the checkpoint's head)")
    parser.add_argument(
        "--image_size", type=int, help="of METER, to which image positions are resized (default: the checkpoint's)"
    )
    parser.add_argument("--tokenizer", help="roberta-base (METER), bert-base-uncased (ViLT): to write a processor too")
    parser.add_argument("--to", choices=("peft", "apt"), help="rewrite an adapter for PEFT, or one of PEFT for us")
    parser.add_argument("--dry_run", action="store_true", help="say what would become of each key, write nothing")
    args = parser.parse_args(arguments)
    if args.output is None and not args.dry_run:
        parser.error("give an output folder, or --dry_run")
    if args.to is not None:
        return _rewrite_adapter(parser, args)
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


def _rewrite_adapter(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.output is None:
        parser.error("--to needs an output")
    try:
        from .peft import apt_to_peft, peft_to_apt
    except ImportError as error:
        print(f"error: {error}. PEFT is an extra: pip install 'apt-diffusion[peft]'", file=sys.stderr)
        return 1
    try:
        written = (
            apt_to_peft(args.checkpoint, args.output)
            if args.to == "peft"
            else [peft_to_apt(args.checkpoint, args.output)]
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(f"Written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
