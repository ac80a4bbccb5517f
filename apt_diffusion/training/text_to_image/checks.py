"""Checks the run's settings against the base model before weights are loaded, and lists flags without effect."""

import argparse

import torch

from ... import add_apt
from ..activations import blocks_of
from ..idle_flags import Rule, shared_rules
from ..optimizer_choice import takes
from .arguments import apt_config
from .base_precision import GGUF_SUFFIX, check_gguf
from .data_arguments import changing_captions
from .new_words import check_new_words
from .samples import draws_grid
from .stable_diffusion import StableDiffusionBase


def check_fit(args: argparse.Namespace, base: StableDiffusionBase) -> None:
    """The adapter must fit the model: `ValueError` where it does not, seen on configurations, without weights."""
    check_new_words(args, base)
    if base.keeps_embeddings:
        _check_kept_texts(args, base)
    if args.validation_images and base.image_to_image_class is None:
        raise ValueError(f"--validation_images: {base.family} starts from no picture in diffusers: leave it out.")
    if args.validation_images and draws_grid(args) and args.num_inference_steps < 2:
        raise ValueError(
            "--validation_images: from a picture, only the later steps are drawn, of one step none. Give "
            "--num_inference_steps of at least 2."
        )
    if args.tokenizer_name is not None and len(base.text_parts) > 1:
        raise ValueError("--tokenizer_name names one tokenizer, but this model has several, which differ.")
    if base.has_class_embedding and args.class_labels_conditioning is None:
        raise ValueError("The base's UNet takes class labels: give --class_labels_conditioning timesteps.")
    skeletons = base.skeletons()
    base.check_widths(skeletons)
    blocks_of(skeletons[base.denoiser_part], args.gradient_checkpointing_blocks)
    if args.base_precision is not None and args.base_precision.endswith(GGUF_SUFFIX):
        check_gguf(args.base_precision, skeletons[base.denoiser_part], args.pretrained_model_name_or_path)
    add_apt({part: skeletons[part] for part in trained_parts(args, base)}, apt_config(args))


def _check_kept_texts(args: argparse.Namespace, base: StableDiffusionBase) -> None:
    """`ValueError` for flags that contradict texts which a language model reads once, before the first step."""
    for flag in ("tokenizer_name", "tokenizer_max_length", "text_encoder_use_attention_mask"):
        if getattr(args, flag):
            raise ValueError(
                f"--{flag}: texts of {base.family} are read as its pipeline reads them. Leave it out; "
                "--max_sequence_length says how many tokens are read."
            )
    if args.train_text_encoder and not base.trained_text_parts:
        raise ValueError(
            f"--train_text_encoder: {base.family} has a language model in place of CLIP, and language models are not "
            "trained here. Leave it out."
        )
    if changing_captions(args):
        raise ValueError(
            f"The language model of {base.family} reads each caption once, before its transformer is loaded, but with "
            "shuffle_caption, caption_tag_dropout_rate or enable_wildcard each sample has a text of its own: leave "
            "them out."
        )
    if not (args.cache_text_embeddings or args.train_text_encoder):
        raise ValueError(
            f"--no-cache_text_embeddings: the language model of {base.family} is freed before its transformer is "
            "loaded. Leave it out."
        )


def trained_parts(args: argparse.Namespace, base: StableDiffusionBase) -> list[str]:
    """The parts that get an adapter, by the pipeline's names."""
    of_text = base.text_parts if base.trained_text_parts is None else base.trained_text_parts
    return [*([] if args.no_train_unet else [base.denoiser_part]), *(of_text if args.train_text_encoder else ())]


def idle_rules(args: argparse.Namespace, base: StableDiffusionBase) -> list[Rule]:
    """Flags of this trainer that may have no effect; for `warn_of_idle_flags`, once `max_train_steps` is known."""
    moved = changing_captions(args)
    drawn = args.with_prior_preservation and args.dataset_config is None  # pictures of the class
    without_folders = args.dataset_name is not None and not (args.class_data_dir or args.validation_data_dir)
    measured = bool(args.validation_split or args.validation_data_dir)
    evaluated = measured or args.validation_prompt is not None or args.sample_prompts is not None
    taken = takes(args.optimizer)
    none_drawn = args.num_validation_images == 0
    no_grid = "is for the grid of --validation_prompt, which --sample_prompts alone replaces"
    is_flow = type(base.scheduler()).__name__.startswith("FlowMatch")
    scheme = args.weighting_scheme if is_flow else ""
    without_prior = not args.with_prior_preservation
    return [
        *shared_rules(args),
        ("lr_warmup_steps", args.lr_scheduler == "constant", "needs a --lr_scheduler with a warm-up"),
        ("lr_num_cycles", args.lr_scheduler != "cosine_with_restarts", "needs --lr_scheduler cosine_with_restarts"),
        ("lr_power", args.lr_scheduler != "polynomial", "needs --lr_scheduler polynomial"),
        ("num_class_images", not drawn, "needs --with_prior_preservation and --class_data_dir"),
        ("prior_loss_weight", without_prior, "needs --with_prior_preservation"),
        ("sample_batch_size", not drawn, "needs --with_prior_preservation and --class_data_dir"),
        ("prior_generation_precision", not drawn, "needs --with_prior_preservation and --class_data_dir"),
        ("validation_prompt", none_drawn, "draws nothing with --num_validation_images 0"),
        ("validation_images", none_drawn, "draws nothing with --num_validation_images 0"),
        ("validation_images", not (none_drawn or draws_grid(args)), no_grid),
        ("num_validation_images", not (none_drawn or draws_grid(args)), no_grid),
        (
            "validation_steps",
            not evaluated,
            "needs --validation_prompt or --sample_prompts: samples come at the end only",
        ),
        (
            "validation_epochs",
            not evaluated,
            "needs --validation_prompt or --sample_prompts: samples come at the end only",
        ),
        ("validation_epochs", args.validation_steps is not None, "is overridden by --validation_steps"),
        (
            "validation_steps",
            evaluated and (args.validation_steps or 0) >= args.max_train_steps,
            f"is not below the {args.max_train_steps} steps of the run: samples and losses come at the end only",
        ),
        ("adam_beta1", "betas" not in taken, f"is no setting of --optimizer {args.optimizer}"),
        ("adam_beta2", "betas" not in taken, f"is no setting of --optimizer {args.optimizer}"),
        ("adam_epsilon", "eps" not in taken, f"is no setting of --optimizer {args.optimizer}"),
        ("adam_weight_decay", "weight_decay" not in taken, f"is no setting of --optimizer {args.optimizer}"),
        ("ema_decay", not args.use_ema, "needs --use_ema"),
        ("gate_lr_ratio", args.init not in (None, "identity"), "needs --init identity"),
        ("huber_c", args.loss_type != "huber", "needs --loss_type huber"),
        ("keep_tokens", not moved, "needs --shuffle_caption or --caption_tag_dropout_rate"),
        ("caption_separator", not moved, "needs --shuffle_caption or --caption_tag_dropout_rate"),
        ("mask_data_dir", not args.masked_loss, "needs --masked_loss"),
        (
            "mask_data_dir",
            args.dataset_name is not None,
            "is not for --dataset_name: there, transparency is the mask",
        ),
        (
            "cache_encoder_outputs",
            not (args.cache_latents or args.cache_text_embeddings or measured),
            "needs --cache_latents or --cache_text_embeddings",
        ),
        (
            "group_offload",
            not torch.accelerator.is_available(),
            "is for accelerators: on a CPU it only copies weights",
        ),
        ("allow_changed_data", not args.resume_from_checkpoint, "needs --resume_from_checkpoint"),
        ("image_column", args.dataset_name is None, "needs --dataset_name"),
        ("dataset_config_name", args.dataset_name is None, "needs --dataset_name"),
        ("recursive", without_folders, "is for folders of pictures, not for --dataset_name"),
        ("weighting_scheme", not is_flow, "is for models of flow matching"),
        ("logit_mean", scheme != "logit_normal", "needs --weighting_scheme logit_normal"),
        ("logit_std", scheme != "logit_normal", "needs --weighting_scheme logit_normal"),
        ("mode_scale", scheme != "mode", "needs --weighting_scheme mode"),
        ("max_sequence_length", base.max_sequence_length is None, "is for text encoders other than CLIP"),
        ("text_encoder_out_layers", base.text_encoder_out_layers is None, "is for Flux.2"),
        ("guidance_embedding", not base.takes_guidance, "is for transformers that were distilled to take a guidance"),
        ("class_labels_conditioning", not base.has_class_embedding, "needs a UNet with a class embedding"),
    ]
