"""The command line of `train_apt_sd.py`: every flag of diffusers' `train_dreambooth_lora.py`, and those of APT.

Invalid values and combinations raise errors here, before anything is loaded.
"""

import argparse
import importlib.util
import os
import re
import warnings

import torch
from torch import nn

from ... import APTConfig
from ...config import INITS, QUERY_SOURCES, STREAMS
from ...io.single_file import is_single_file
from ...words import CHILD
from .. import run_config
from ..model_card import LICENSE_HELP, license_id
from ..optimizer_choice import NAMED, check_step, is_schedule_free, make_optimizer, parse_settings, usual_settings
from ..run_config import RunArguments
from .data_arguments import check_data_flags, data_flags
from .flow import WEIGHTING_SCHEMES, Weighting
from .losses import LOSS_TYPES
from .memory_arguments import check_memory_flags, memory_flags
from .new_words import check_new_word_flags, new_word_flags
from .number_types import count, finite, fraction, not_negative, positive, positive_int
from .rates import KINDS, parameter_groups

EXAMPLES = """
examples:
  the embedded model, offline, in two minutes:
    accelerate launch train/train_apt_sd.py --pretrained_model_name_or_path miniature \\
        --instance_data_dir examples/subject --instance_prompt "a sks glyph" --train_text_encoder \\
        --max_train_steps 400 --output_dir out/glyph
  Stable Diffusion, with pictures of the class against forgetting, and samples while it learns:
    accelerate launch train/train_apt_sd.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --instance_data_dir dog/ \\
        --instance_prompt "a photo of sks dog" --train_text_encoder \\
        --with_prior_preservation --class_data_dir dogs/ --class_prompt "a photo of a dog" \\
        --max_train_steps 800 --validation_prompt "a sks dog in snow" --validation_steps 100 --mixed_precision bf16
  a run that was stopped goes on: the same command and --resume_from_checkpoint latest

docs/training.md says more.
"""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Names the defaults that say something: not `None`, not that a switch is off, and no empty text."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False or action.default == ""
        return action.help if says_nothing else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The flags of the trainer."""
    parser = argparse.ArgumentParser(
        description="Teach a text-to-image model a subject from a few pictures, as an APT adapter.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    _model_flags(parser.add_argument_group("model").add_argument)
    _adapter_flags(parser.add_argument_group("adapter").add_argument)
    data_flags(parser.add_argument_group("pictures and captions").add_argument)
    _prior_flags(parser.add_argument_group("prior preservation").add_argument)
    _length_flags(parser.add_argument_group("steps and checkpoints").add_argument)
    _optimizer_flags(parser.add_argument_group("loss and optimizer").add_argument)
    _sample_flags(parser.add_argument_group("samples while training").add_argument)
    _output_flags(parser.add_argument_group("output").add_argument)
    _hardware_flags(parser.add_argument_group("hardware").add_argument)
    return parser


def _model_flags(add) -> None:
    run_config.add_config_flag(add)
    add(
        "--pretrained_model_name_or_path",
        required=True,
        help="Hub id or folder of a base model, a .safetensors or .ckpt file of a whole one, or 'miniature'.",
    )
    add(
        "--base_config",
        help="Hub id or folder in diffusers' layout with configuration and tokenizers for a base in one file; that of "
        "the hub's usual model if not set.",
    )
    add("--revision", help="Revision of the base model on the hub.")
    add("--variant", help="Variant of the base model's files, for example fp16.")
    add(
        "--pretrained_vae_model_name_or_path",
        help="Hub id or folder of another VAE, for example one of SDXL's that is stable in half precision.",
    )
    add("--tokenizer_name", help="Hub id or folder of another tokenizer.")
    add("--tokenizer_max_length", type=positive_int, help="Tokens per prompt; the tokenizer's own maximum if not set.")
    add(
        "--max_sequence_length",
        type=positive_int,
        help="Tokens that T5 or a language model reads; as its pipeline if not set: 256 for SD3, 512 for the others.",
    )
    add(
        "--text_encoder_out_layers",
        type=positive_int,
        nargs="+",
        help="Layers of the language model whose states are the text (Flux.2); as its pipeline if not set.",
    )
    add(
        "--guidance_embedding",
        type=not_negative,
        default=3.5,
        help="The guidance that a transformer is given in training, where it was distilled to take one (Flux). It is "
        "--guidance_scale of diffusers' trainers; here that is the guidance of images that are drawn.",
    )
    add("--text_encoder_use_attention_mask", action="store_true", help="Hide padding from the text encoder.")
    add(
        "--class_labels_conditioning",
        choices=["timesteps"],
        help="What the UNet gets as class labels, where it has a class embedding.",
    )


def _adapter_flags(add) -> None:
    add("--rank", type=positive_int, default=4, help="Rank of the map that turns prompts into keys.")
    add("--num_prompts", type=positive_int, default=APTConfig.num_prompts, help="Prompts per attention module.")
    add(
        "--target_modules",
        nargs="+",
        help="Attention modules to adapt: name suffixes such as attn2, or one regular expression for full names. "
        "Default: the UNet's cross-attention (attn2), and the text encoder's self-attention where it is trained.",
    )
    add("--init", choices=INITS, help="How prompts start; 'identity' if not set: the first step sees the base model.")
    add(
        "--query_source",
        choices=QUERY_SOURCES,
        help="Queries of the UNet's adapter: the attention's input (the paper, the default) or its output.",
    )
    add(
        "--streams",
        nargs="+",
        choices=STREAMS,
        help="What is corrected in the denoiser. If unset the query, which is the image; "
        "in Stable Diffusion 3 the text, too, unless --target_modules is given.",
    )
    add("--dropout", "--lora_dropout", type=fraction, default=0.0, help="Dropout on the affinities to the prompts.")
    new_word_flags(add)
    add("--train_text_encoder", action="store_true", help="Adapt CLIP, too (both in SDXL and SD3).")
    add("--no_train_unet", action="store_true", help="With --train_text_encoder: adapt the text encoder alone.")


def _prior_flags(add) -> None:
    add(
        "--with_prior_preservation",
        action="store_true",
        help="Train on pictures of the class too, against forgetting.",
    )
    add("--class_data_dir", help="Folder with pictures of the class; missing ones are drawn by the base model.")
    add("--class_prompt", help="The prompt for pictures of the class without a caption.")
    add("--num_class_images", type=positive_int, default=100, help="How many pictures of the class to use.")
    add("--prior_loss_weight", type=not_negative, default=1.0, help="Weight of the class pictures' loss.")
    add("--sample_batch_size", type=positive_int, default=4, help="Class pictures drawn at once, per process.")
    add(
        "--prior_generation_precision",
        choices=["no", "fp32", "fp16", "bf16"],
        help="Precision for drawing class pictures; fp16 on a GPU, else fp32, if not set.",
    )


def _length_flags(add) -> None:
    add("--train_batch_size", type=positive_int, default=4, help="Pictures of the subject per batch and process.")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="Batches per step.")
    add("--num_train_epochs", type=positive_int, default=1, help="Rounds through the pictures.")
    add("--max_train_steps", type=positive_int, help="Steps in all; overrides --num_train_epochs.")
    add(
        "--checkpointing_steps",
        type=positive_int,
        default=500,
        help="Steps between checkpoints; the last step has one.",
    )
    add("--checkpoints_total_limit", type=positive_int, help="How many checkpoints to keep.")
    add("--resume_from_checkpoint", help="'latest', the name of a checkpoint in --output_dir, or a path.")


def _optimizer_flags(add) -> None:
    add(
        "--learning_rate",
        type=not_negative,
        default=1.5e-3,
        help="Learning rate after the warmup. The default is the mean of what did best in our sweep, 3e-3 with "
        "--lr_scheduler cosine (docs/miniature.md); diffusers' for LoRA is 5e-4.",
    )
    add(
        "--text_encoder_lr",
        type=not_negative,
        help="Learning rate of the text encoder's adapter; --learning_rate if not set.",
    )
    ratio = {"type": not_negative, "default": 1.0}
    add("--prompts_lr_ratio", **ratio, help="Times the learning rate, for the prompts P; 0 keeps them as they start.")
    add("--keys_lr_ratio", **ratio, help="The same for the map from prompts to keys, D and U.")
    add("--log_scale_lr_ratio", **ratio, help="The same for the scale s of the output.")
    add("--gate_lr_ratio", **ratio, help="The same for the factor on the update that --init identity starts at 0.")
    add("--scale_lr", action="store_true", help="Multiply learning rates by processes, accumulation and batch size.")
    add(
        "--lr_scheduler",
        default="constant",
        choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"],
        help="The schedule of the learning rate.",
    )
    add("--lr_warmup_steps", type=count, default=500, help="Warmup steps, for schedules that have one.")
    add("--lr_num_cycles", type=positive_int, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=positive, default=1.0, help="Power of polynomial.")
    add(
        "--loss_type",
        default="l2",
        choices=LOSS_TYPES,
        help="How an error counts: squared, absolute, or pseudo-Huber, which is squared below --huber_c.",
    )
    add("--huber_c", type=positive, default=0.1, help="Where pseudo-Huber turns from squared to absolute.")
    add(
        "--weighting_scheme",
        choices=WEIGHTING_SCHEMES,
        default=Weighting.scheme,
        help="Of flow matching (all transformers): which noise levels are drawn more often, or count more.",
    )
    add("--logit_mean", type=finite, default=Weighting.logit_mean, help="Mean of logit_normal.")
    add("--logit_std", type=positive, default=Weighting.logit_std, help="Deviation of logit_normal.")
    add("--mode_scale", type=finite, default=Weighting.mode_scale, help="Scale of mode.")
    add("--snr_gamma", type=positive, help="Min-SNR weighting of the loss (5 in its paper); off if not set.")
    add(
        "--noise_offset",
        type=not_negative,
        default=0.0,
        help="Size of a random offset of the noise per channel.",
    )
    add(
        "--optimizer",
        default="adamw",
        help=f"{', '.join(NAMED)}, or the path of a class such as torch.optim.NAdam. Prodigy finds its own rate: give "
        "it --learning_rate 1; schedulefree needs no schedule; muon has AdamW for what is no matrix.",
    )
    add("--optimizer_args", nargs="+", default=[], metavar="NAME=VALUE", help="More arguments of the optimizer.")
    add("--use_8bit_adam", action="store_true", help="The same as --optimizer adamw8bit; needs bitsandbytes.")
    add("--adam_beta1", type=fraction, default=0.9, help="AdamW's β1.")
    add("--adam_beta2", type=fraction, default=0.999, help="AdamW's β2.")
    add("--adam_weight_decay", type=not_negative, default=1e-2, help="AdamW's weight decay.")
    add("--adam_epsilon", type=positive, default=1e-8, help="AdamW's ε.")
    add(
        "--use_ema",
        action="store_true",
        help="Save, measure and draw with the moving average of the adapter's weights over the steps.",
    )
    add(
        "--ema_decay",
        type=fraction,
        default=0.9999,
        help="Largest share of the average that a step keeps; step n keeps (1 + n) / (10 + n) before that.",
    )
    add("--max_grad_norm", type=positive, default=1.0, help="Gradients are clipped to this norm.")


def _sample_flags(add) -> None:
    add(
        "--validation_prompt",
        help="Draw samples with this prompt while training. At the end samples are always drawn.",
    )
    add(
        "--sample_prompts",
        metavar="FILE",
        help="Draw these prompts, too, or instead where there is no --validation_prompt: one a line, with options "
        "--w, --h, --d (seed), --s (steps), --l (guidance), --n (negative prompt), --a (weight of the adapter).",
    )
    add("--contact_sheet", action="store_true", help="All pictures of --sample_prompts on one, by prompt and step.")
    add("--num_validation_images", type=count, default=4, help="Images per sample grid; 0 draws no grid, ever.")
    add("--validation_epochs", type=positive_int, default=50, help="Epochs between samples.")
    add("--validation_steps", type=positive_int, help="Steps between samples; overrides --validation_epochs.")
    add(
        "--validation_split",
        type=fraction,
        default=0.0,
        help="Share of the subject's pictures that is held out: their loss, at fixed noise and timesteps, is measured "
        "as often as samples are drawn (--validation_steps, --validation_epochs).",
    )
    add("--validation_data_dir", help="A folder of held-out pictures in place of --validation_split.")
    add(
        "--keep_best", action="store_true", help="The adapter with the lowest loss on held-out pictures goes to best/."
    )
    add("--validation_images", nargs="+", help="Pictures to start the samples from (image to image).")
    add(
        "--num_inference_steps",
        type=positive_int,
        help="Denoising steps of all images drawn here; 25 if not set, fewer for a distilled base (LCM, Turbo, ...).",
    )
    add(
        "--guidance_scale",
        type=finite,
        help="Guidance of all images drawn here. If not set: none for a distilled base, else 7.5, or what "
        "the pipelines of Flux, Qwen-Image and Z-Image have.",
    )


def _output_flags(add) -> None:
    add("--output_dir", default="lora-dreambooth-model", help="Folder for adapter, card, samples, logs, checkpoints.")
    add("--seed", type=int, help="Everything random follows from it; drawn, and kept in checkpoints, if not set.")
    add("--logging_dir", default="logs", help="Folder of the trackers' logs inside --output_dir.")
    add(
        "--report_to",
        default="tensorboard",
        choices=["tensorboard", "wandb", "comet_ml", "all", "none"],
        help="Tracker for losses and samples. tensorboard is skipped where it is not installed.",
    )
    add("--license", type=license_id, help=LICENSE_HELP)
    add("--push_to_hub", action="store_true", help="Upload adapter, card and samples at the end.")
    add("--hub_token", help="Token for the hub; that of `hf auth login` if not set.")
    add("--hub_model_id", help="Repository on the hub; the name of --output_dir if not set.")


def _hardware_flags(add) -> None:
    add(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="Precision of the frozen weights and of the computation; accelerate's setting if not set.",
    )
    memory_flags(add)
    add("--allow_tf32", action="store_true", help="TF32 matrix products on GPUs that have them.")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="xformers' attention in the UNet.")
    add("--local_rank", type=int, default=-1, help="Set by launchers.")


def parse_args(argv: list[str] | None = None) -> RunArguments:
    """The checked arguments; `ValueError` or `ImportError` for what cannot work."""
    args = run_config.parse_args(build_parser(), argv)
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    check_data_flags(args)
    if args.variant is not None and is_single_file(args.pretrained_model_name_or_path):
        raise ValueError("--variant is for folders and models of the hub; this base is one file: leave it out.")
    _check_prior(args)
    _check_text_encoder(args)
    _check_output(args)
    _check_installed(args)
    check_memory_flags(args)
    _check_optimizer(args)
    if args.target_modules and len(args.target_modules) == 1 and re.search(r"[\\*+?\[(|^$]", args.target_modules[0]):
        args.target_modules = args.target_modules[0]
    apt_config(args)
    return args


def _check_optimizer(args: argparse.Namespace) -> None:
    if args.use_8bit_adam:
        if args.optimizer not in ("adamw", "adamw8bit"):
            raise ValueError(f"--use_8bit_adam and --optimizer {args.optimizer} contradict each other.")
        args.optimizer = "adamw8bit"
    parts = (*(() if args.no_train_unet else ("unet",)), *(("text_encoder",) if args.train_text_encoder else ()))
    names = [f"{part}.{name}" for part in parts for kind in KINDS.values() for name in kind]
    names += [f"text_encoder.{CHILD}"] if args.new_tokens else []
    # Two dimensions: Muon takes only such parameters, and leaves others to AdamW.
    parameters = {name: nn.Parameter(torch.zeros(2, 2)) for name in names}
    groups = [(group.parameters, group.rate) for group in parameter_groups(args, parameters, factor=1)]
    optimizer = make_optimizer(args.optimizer, groups, usual_settings(args), parse_settings(args.optimizer_args))
    check_step(args.optimizer, optimizer)
    if args.use_ema and is_schedule_free(optimizer):
        raise ValueError(f"--optimizer {args.optimizer} keeps an average of its own: leave out --use_ema.")


def apt_config(args: argparse.Namespace) -> APTConfig:
    """The settings of the adapter that the flags ask for."""
    return APTConfig(
        num_prompts=args.num_prompts,
        rank=args.rank,
        dropout=args.dropout,
        init=args.init,
        query_source=args.query_source,
        streams=args.streams,
        target_modules=args.target_modules,
    )


def weighting_of(args: argparse.Namespace) -> Weighting:
    """The weighting of flow matching's noise levels that the flags ask for."""
    return Weighting(args.weighting_scheme, args.logit_mean, args.logit_std, args.mode_scale)


def _check_prior(args: argparse.Namespace) -> None:
    if args.dataset_config is not None:  # which has its own classes
        return
    if args.with_prior_preservation:
        if args.class_data_dir is None:
            raise ValueError("--with_prior_preservation needs --class_data_dir, a folder for the class pictures.")
        if args.class_prompt is None:
            raise ValueError("--with_prior_preservation needs --class_prompt, which the class pictures show.")
        return
    for flag in ("class_data_dir", "class_prompt"):
        if getattr(args, flag) is not None:
            warnings.warn(f"--{flag} has no effect without --with_prior_preservation.", stacklevel=3)


def _check_text_encoder(args: argparse.Namespace) -> None:
    if args.pre_compute_text_embeddings:
        if args.train_text_encoder:
            raise ValueError("--pre_compute_text_embeddings contradicts --train_text_encoder, which changes them.")
        if args.cache_text_embeddings is False:
            raise ValueError("--pre_compute_text_embeddings and --no-cache_text_embeddings contradict each other.")
    if args.train_text_encoder and args.cache_text_embeddings:
        raise ValueError("--cache_text_embeddings cannot be used with --train_text_encoder, which changes them.")
    check_new_word_flags(args)
    args.cache_text_embeddings = not (args.train_text_encoder or args.new_tokens) and (
        args.cache_text_embeddings is not False
    )
    if args.no_train_unet:
        if not args.train_text_encoder:
            raise ValueError("--no_train_unet without --train_text_encoder leaves nothing to train.")
        if args.query_source or args.streams:
            raise ValueError("--query_source and --streams are for the denoiser, which --no_train_unet leaves alone.")
    elif args.text_encoder_lr is not None and not args.train_text_encoder:
        raise ValueError("--text_encoder_lr needs --train_text_encoder.")


def _check_output(args: argparse.Namespace) -> None:
    if args.report_to == "wandb" and args.hub_token is not None:
        raise ValueError(
            "--hub_token would be shown among the run's settings on wandb. Leave it out and sign in with "
            "`hf auth login`."
        )
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to {2**32 - 1}, got {args.seed}.")
    if args.validation_split and args.validation_data_dir is not None:
        raise ValueError("--validation_split and --validation_data_dir both say what is held out: give one.")
    if args.keep_best and not (args.validation_split or args.validation_data_dir):
        raise ValueError("--keep_best needs pictures to measure by: --validation_split or --validation_data_dir.")
    if args.contact_sheet and args.sample_prompts is None:
        raise ValueError("--contact_sheet lays out the pictures of --sample_prompts: give a file of prompts.")
    for path in args.validation_images or ():
        if not os.path.isfile(path):
            raise ValueError(f"--validation_images: there is no file {path}.")


def _check_installed(args: argparse.Namespace) -> None:
    def missing(package: str) -> bool:
        return importlib.util.find_spec(package) is None

    if args.enable_xformers_memory_efficient_attention and missing("xformers"):
        raise ValueError("--enable_xformers_memory_efficient_attention needs xformers: `pip install xformers`.")
    if args.use_8bit_adam and missing("bitsandbytes"):
        raise ImportError("--use_8bit_adam needs bitsandbytes: `pip install bitsandbytes`.")
    if args.report_to in ("wandb", "comet_ml") and missing(args.report_to):
        raise ImportError(f"--report_to {args.report_to} needs it installed: `pip install {args.report_to}`.")
