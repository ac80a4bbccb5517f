"""Flags of `train_apt_sd.py` on pictures and captions."""

import argparse

from ...data.buckets import parse_buckets
from ...data.captions import CaptionOptions
from ...data.pictures import INTERPOLATIONS
from .number_types import count, fraction, positive_int


def data_flags(add) -> None:
    """Adds them to the parser of the trainer."""
    add("--instance_data_dir", required=True, help="Folder with pictures of the subject.")
    add("--instance_prompt", required=True, help="The prompt that names the subject, for pictures without a caption.")
    add(
        "--recursive",
        action="store_true",
        help="Read the subfolders of all picture folders, too. Those named as kohya's trainer has them, such as "
        "'10_sks dog', are always read.",
    )
    add("--check_data", action="store_true", help="Print a table of all pictures, and end before models are loaded.")
    add("--caption_column", default="text", help="Key of the caption in a metadata.jsonl next to the pictures.")
    add(
        "--caption_dropout_rate",
        type=fraction,
        default=0.0,
        help="How often a sample is trained without its caption, for guidance.",
    )
    _caption_flags(add)
    add(
        "--masked_loss",
        action="store_true",
        help="Train on the parts of the subject's pictures that masks show: dog-mask.png beside dog.jpg, white where "
        "it counts, or the transparency of a picture.",
    )
    add(
        "--resolution",
        type=positive_int,
        help="Size of the training squares. Default: the model's own, at most 512 (1024 for SDXL).",
    )
    add(
        "--aspect_ratio_buckets",
        help='Sizes to train at, "height,width;height,width;...": each picture is cropped to the nearest, and a batch '
        "has one. 'auto' makes some of about --resolution squared pixels.",
    )
    add("--center_crop", action="store_true", help="Cut the middle of the picture instead of a random place.")
    add("--random_flip", action="store_true", help="Mirror half of the samples.")
    add("--repeats", type=positive_int, default=1, help="How often an epoch shows each picture of the subject.")
    add(
        "--image_interpolation_mode",
        default="lanczos",
        choices=sorted(INTERPOLATIONS),
        help="How pictures are resized.",
    )
    add("--dataloader_num_workers", type=count, default=0, help="Loader processes; 0 loads in the main one.")
    add(
        "--cache_latents",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Encode every cut that this run will draw before the first step, then free the VAE.",
    )
    add(
        "--cache_text_embeddings",
        action=argparse.BooleanOptionalAction,
        help="Encode all prompts before the first step, then free the text encoder; on unless it is trained.",
    )
    add("--pre_compute_text_embeddings", action="store_true", help="The same as --cache_text_embeddings.")


def _caption_flags(add) -> None:
    add("--shuffle_caption", action="store_true", help="Put the tags of the subject's captions in a random order.")
    add("--keep_tokens", type=count, default=0, help="How many first tags of a caption stay where they are.")
    add("--caption_separator", default=",", help="What stands between the tags of a caption.")
    add(
        "--caption_tag_dropout_rate",
        type=fraction,
        default=0.0,
        help="How often each tag is left out, but for those of --keep_tokens.",
    )
    add("--caption_prefix", default="", help="Words before each caption of the subject; they are never moved.")
    add("--caption_suffix", default="", help="Words behind each caption of the subject; they are never moved.")


def caption_options(args: argparse.Namespace) -> CaptionOptions:
    """What becomes of the subject's captions."""
    return CaptionOptions(
        shuffle=args.shuffle_caption,
        keep_tokens=args.keep_tokens,
        separator=args.caption_separator,
        tag_dropout=args.caption_tag_dropout_rate,
        prefix=args.caption_prefix.strip(),
        suffix=args.caption_suffix.strip(),
    )


def check_data_flags(args: argparse.Namespace) -> None:
    """Settles what depends on captions; `ValueError` for what cannot work."""
    if not args.caption_separator.strip(" "):
        raise ValueError("--caption_separator must be more than spaces: tags may have spaces in them.")
    if args.aspect_ratio_buckets not in (None, "auto"):
        parse_buckets(args.aspect_ratio_buckets)
    if caption_options(args).varies:
        if args.cache_text_embeddings or args.pre_compute_text_embeddings:
            raise ValueError(
                "--cache_text_embeddings keeps one text for each picture, but with --shuffle_caption or "
                "--caption_tag_dropout_rate each sample has its own: leave one of them out."
            )
        args.cache_text_embeddings = False
