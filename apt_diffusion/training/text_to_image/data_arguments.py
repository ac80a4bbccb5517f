"""Flags of `train_apt_sd.py` on pictures and captions."""

import argparse

from ...data.buckets import parse_buckets
from ...data.captions import CaptionOptions
from ...data.dataset_config import KEYS, DatasetConfig, read_dataset_config
from ...data.pictures import INTERPOLATIONS
from ...data.rows import CAPTION_COLUMN, IMAGE_COLUMN
from .encoder_outputs import check_folder
from .number_types import count, fraction, positive_int

# Keys of the TOML file whose values on the command line are no defaults for folders.
OF_A_FOLDER = ("instance_data_dir", "mask_data_dir", "class_data_dir", "class_prompt", "repeats", "weight")
NOT_BESIDE_A_FILE = ("instance_data_dir", "dataset_name", "mask_data_dir", "class_data_dir", "class_prompt")


def data_flags(add) -> None:
    """Adds them to the parser of the trainer."""
    add("--instance_data_dir", help="Folder with pictures of the subject.")
    add("--instance_prompt", help="The prompt that names the subject, for pictures without a caption.")
    add(
        "--dataset_config",
        help="A TOML file that names several folders, each with its own prompt, class, captions, masks, repeats and "
        "weight (docs/data.md), in place of --instance_data_dir.",
    )
    add(
        "--recursive",
        action="store_true",
        help="Read the subfolders of all picture folders, too. Those named as kohya's trainer has them, such as "
        "'10_sks dog', are always read.",
    )
    add(
        "--allow_changed_data",
        action="store_true",
        help="Resume although pictures, masks or captions are not those of the checkpoint; no longer exactly.",
    )
    add("--check_data", action="store_true", help="Print a table of all pictures, and end before models are loaded.")
    add(
        "--caption_column",
        help="Key of the caption in a metadata.jsonl next to the pictures, or the column of --dataset_name; 'text' if "
        "not set.",
    )
    add(
        "--dataset_name",
        help="A data set of the hub, or a folder that `datasets` loads, in place of --instance_data_dir: its split "
        "'train'.",
    )
    add("--dataset_config_name", help="Which of its configurations, if --dataset_name has several.")
    add("--image_column", default=IMAGE_COLUMN, help="The column of --dataset_name with the pictures.")
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
        "--mask_data_dir",
        help="A folder with the masks for --masked_loss, each with the name of its picture, instead of beside them.",
    )
    add(
        "--resolution",
        type=positive_int,
        help="Size of the training squares. Default: the model's own, at most 512 (1024 for SDXL and transformers).",
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
        "--cache_encoder_outputs",
        metavar="FOLDER",
        help="Keep latents and text embeddings in this folder, for other runs, too; where all prompts are there, text "
        "encoders are not loaded.",
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
    add(
        "--keep_tokens_separator",
        default="",
        help="In place of --keep_tokens: tags before this, and behind a second one, stay where they are.",
    )
    add("--secondary_separator", default="", help="What stands between tags that are moved and dropped as one.")
    add(
        "--enable_wildcard",
        action="store_true",
        help="Of '{red|green}' in a caption, and of several lines, each sample has one.",
    )
    add("--caption_separator", default=",", help="What stands between the tags of a caption.")
    add(
        "--caption_tag_dropout_rate",
        type=fraction,
        default=0.0,
        help="How often each tag is left out, but for those of --keep_tokens.",
    )
    add("--caption_prefix", default="", help="Words before each caption of the subject; they are never moved.")
    add("--trigger_word", default="", help="What '[trigger]' in captions stands for, as in ai-toolkit.")
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
        trigger=args.trigger_word.strip(),
        wildcards=args.enable_wildcard,
        keep_separator=args.keep_tokens_separator.strip(),
        inner_separator=args.secondary_separator.strip(),
    )


def dataset_config(args: argparse.Namespace) -> DatasetConfig:
    """The folders of `--dataset_config`."""
    given = vars(args)
    defaults = {key: given[key] for key in KEYS if key in given and key not in OF_A_FOLDER}
    defaults["caption_column"] = args.caption_column or CAPTION_COLUMN
    return read_dataset_config(args.dataset_config, defaults)


def _check_sources(args: argparse.Namespace) -> None:
    """Where pictures come from; what the TOML file says of the run is written to `args`."""
    if args.dataset_config is None:
        sources = [name for name in ("instance_data_dir", "dataset_name") if getattr(args, name) is not None]
        if not sources:
            raise ValueError("Where are the pictures? Give --instance_data_dir, --dataset_name or --dataset_config.")
        if len(sources) > 1:
            raise ValueError("--instance_data_dir and --dataset_name both say where the pictures are: give one.")
        if args.instance_prompt is None:
            raise ValueError(f"--{sources[0]} needs --instance_prompt, for pictures without a caption.")
        return
    for flag in NOT_BESIDE_A_FILE:
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag} has no place beside --dataset_config, whose file says it for each folder.")
    config = dataset_config(args)
    args.instance_prompt = args.instance_prompt or config.folders[0].prompt
    if args.with_prior_preservation and not config.of_class:
        raise ValueError(f"--with_prior_preservation: no folder of {args.dataset_config} has a class_data_dir.")
    args.with_prior_preservation = bool(config.of_class)


def changing_captions(args: argparse.Namespace) -> bool:
    """Whether samples of one picture have different captions."""
    if args.dataset_config is None:
        return caption_options(args).varies
    return any(folder.options.captions.varies for folder in dataset_config(args).folders)


def check_data_flags(args: argparse.Namespace) -> None:
    """Settles what depends on the data; `ValueError` for what cannot work."""
    _check_sources(args)
    if not args.caption_separator.strip(" "):
        raise ValueError("--caption_separator must be more than spaces: tags may have spaces in them.")
    if args.cache_encoder_outputs is not None:
        check_folder(args.cache_encoder_outputs)
    if args.aspect_ratio_buckets not in (None, "auto"):
        parse_buckets(args.aspect_ratio_buckets)
    if changing_captions(args):
        if args.cache_text_embeddings or args.pre_compute_text_embeddings:
            raise ValueError(
                "--cache_text_embeddings keeps one text for each picture, but with shuffle_caption, "
                "caption_tag_dropout_rate or enable_wildcard each sample has its own: leave one of them out."
            )
        args.cache_text_embeddings = False
