#!/usr/bin/env python
"""Teach Stable Diffusion a subject from a few pictures, as an APT adapter (DreamBooth, arXiv 2208.12242).

    accelerate launch train/train_apt_sd.py --pretrained_model_name_or_path miniature \\
        --instance_data_dir examples/subject --instance_prompt "a sks glyph" --output_dir out --max_train_steps 200

The command line is that of diffusers' `train_dreambooth_lora.py` and more; see docs/training.md.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from apt_diffusion import save_apt_weights
from apt_diffusion.convert.single_file import base_folder
from apt_diffusion.data.dreambooth import Batch, DreamBoothData, Framing, collate
from apt_diffusion.data.folders import check_picture
from apt_diffusion.data.held_out import HeldOutData, split_off
from apt_diffusion.data.pictures import Picture
from apt_diffusion.training import best, optimizer_choice
from apt_diffusion.training.activations import checkpoint_activations, checkpoint_blocks
from apt_diffusion.training.adapter import attach_trainable
from apt_diffusion.training.frozen_blocks import offload_blocks
from apt_diffusion.training.idle_flags import warn_of_idle_flags, warn_of_long_warmup
from apt_diffusion.training.loss_log import VALIDATION_LOSS
from apt_diffusion.training.optimizer import make_schedule
from apt_diffusion.training.optimizer_choice import parse_settings, usual_settings
from apt_diffusion.training.processes import leave
from apt_diffusion.training.session import Session
from apt_diffusion.training.text_to_image import samples
from apt_diffusion.training.text_to_image.arguments import apt_config, build_parser, parse_args, weighting_of
from apt_diffusion.training.text_to_image.base_precision import load_quantised
from apt_diffusion.training.text_to_image.bases import open_base
from apt_diffusion.training.text_to_image.checks import check_fit, idle_rules, trained_parts
from apt_diffusion.training.text_to_image.class_pictures import complete_class_pictures
from apt_diffusion.training.text_to_image.data_record import record_data
from apt_diffusion.training.text_to_image.encoder_outputs import open_outputs
from apt_diffusion.training.text_to_image.kept_prompts import KeptPrompts
from apt_diffusion.training.text_to_image.latents import encode_views
from apt_diffusion.training.text_to_image.losses import batch_loss, distance_of, masked
from apt_diffusion.training.text_to_image.new_words import attach_words
from apt_diffusion.training.text_to_image.noisy import Noisy
from apt_diffusion.training.text_to_image.objectives import Objective, make_objective
from apt_diffusion.training.text_to_image.picture_sets import (
    PictureSets,
    check_group,
    data_report,
    make_framing,
    scan_picture_sets,
    used_class_pictures,
)
from apt_diffusion.training.text_to_image.prompts import Prompts, make_prompts
from apt_diffusion.training.text_to_image.rates import describe, parameter_groups
from apt_diffusion.training.text_to_image.results import make_card, model_spec, trigger_prompts
from apt_diffusion.training.text_to_image.sample_prompts import SamplePrompt
from apt_diffusion.training.text_to_image.sampling import choose_sampling
from apt_diffusion.training.text_to_image.stable_diffusion import StableDiffusionBase

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass
class Learner:
    """What a training step computes with."""

    base: StableDiffusionBase
    objective: Objective
    prompts: Prompts | KeptPrompts
    denoiser: nn.Module  # the UNet, or the transformer
    text_encoders: dict[str, nn.Module]  # none where their embeddings are kept
    vae: nn.Module | None  # `None` where its latents are kept
    held_out: HeldOutData
    adapted: dict[str, nn.Module]  # the parts with an adapter, as they were loaded
    saved: dict[str, nn.Module]  # those, and the text encoders where these have new words
    parameters: dict[str, nn.Parameter]  # the adapter's, by name
    dtype: torch.dtype  # of the frozen weights

    def train(self, mode: bool = True) -> None:
        """Switches dropout on or off."""
        for model in (self.denoiser, *self.text_encoders.values()):
            model.train(mode)


def main(argv: list[str] | None = None) -> None:
    """Trains. After Ctrl-C or SIGTERM: `SystemExit` with 130 or 143, once a checkpoint is written."""
    args = parse_args(argv)
    with Session.start(args, "train_apt_sd", can_shard=True) as session:
        # 1. Whatever can be wrong shows before weights are loaded.
        sets = scan_picture_sets(args)
        if not args.check_data:
            instance, held_out = hold_out(session, sets)
            of_class = used_class_pictures(args, sets.of_class)
        for path in args.validation_images or ():
            check_picture(Path(path), args.instance_prompt)
        with session.accelerator.local_main_process_first():  # a base in one file is converted once
            path = base_folder(args.pretrained_model_name_or_path, args.base_config)
        base = open_base(
            path,
            args.revision,
            args.variant,
            args.pretrained_vae_model_name_or_path,
            args.max_sequence_length,
        )
        choose_sampling(args, base, session.logger)
        args.resolution = base.check_resolution(args.resolution)
        base.configure(args)
        framing = make_framing(args, base)
        sampled = samples.wanted_prompts(args, base)
        if args.check_data:
            return end_with_report(session, sets, framing, base, sampled)
        objective = make_objective(base.scheduler(), args.snr_gamma, weighting_of(args))
        prompts = read_prompts(args, base, [*instance, *of_class, *held_out], sampled)
        check_fit(args, base)
        session.open_output()

        # 2. Pictures, and how they become samples.
        of_class = complete_class_pictures(args, of_class, base, session.accelerator, session.seed)
        record_class(session, sets, of_class)
        counts = len(set(instance)), len(of_class), len(held_out)
        session.logger.info("%d pictures of the subject, %d of its class, %d held out.", *counts)
        latent_shape = base.latent_shape(args.resolution)
        data = DreamBoothData(
            instance,
            of_class,
            framing,
            latent_shape,
            session.seed,
            repeats=args.repeats,
            noise_offset=args.noise_offset,
            draw_timestep=objective.draw_timestep,
            caption_dropout=args.caption_dropout_rate,
            group=check_group(args, session.resumed, session.accelerator.num_processes),
        )
        held_out_data = HeldOutData(held_out, framing, latent_shape, objective.num_timesteps)
        session.plan(data.epoch_length, evaluates_after=lambda step: evaluation_is_due(session, step))
        warn_of_idle_flags(args, build_parser(), idle_rules(args, base), session.logger)
        warn_of_long_warmup(args.lr_warmup_steps, args, session.logger)

        # 3. The base model with its adapter, and what optimizes it.
        learner = load(session, base, objective, prompts, data, held_out_data)
        optimizer, rates = make_optimizer(session, learner.parameters)
        schedule = make_schedule(
            args.lr_scheduler, optimizer, args.lr_warmup_steps, args.max_train_steps, args.lr_num_cycles, args.lr_power
        )
        models = {base.denoiser_part: learner.denoiser} | learner.text_encoders
        average_decay = args.ema_decay if args.use_ema else None
        models = session.prepare(models, learner.parameters, optimizer, schedule, rates, average_decay)
        learner.denoiser = models.pop(base.denoiser_part)
        learner.text_encoders = models

        # 4. The loop.
        def save(folder: Path) -> None:
            known = {
                "base_model": args.pretrained_model_name_or_path,
                "instance_prompt": trigger_prompts(args)[0],
            }
            header = session.header(**known) | model_spec(session, base)
            save_apt_weights(learner.saved, folder, metadata=header)

        def evaluate() -> None:
            with session.averaged():
                measure(session, learner, save)
                if samples.draws_while_training(args):
                    draw_samples(session, learner, sampled)

        learner.train()
        if session.evaluation_due and session.evaluates:  # the run that is resumed was stopped before it
            evaluate()
        for batch in session.batches(session.loader(data, collate)):
            with session.step():
                session.backward(training_loss(args, learner, batch))
            if session.checkpoint_due:
                session.save_checkpoint(save)
            if session.evaluation_due and session.evaluates:
                evaluate()

        # 5. What the run leaves behind.
        if session.evaluates:
            with session.averaged():
                metrics = measure(session, learner, save)
                drawn = draw_samples(session, learner, sampled)
            sheet = samples.draw_sheet(session, sampled) if args.contact_sheet and session.is_main else None
            card = make_card(session, base, learner.adapted, counts[0], drawn, sheet)
            session.finish(save, card | {"metrics": metrics})
            session.upload()


def read_prompts(
    args: argparse.Namespace, base: StableDiffusionBase, pictures: list[Picture], sampled: list[SamplePrompt]
) -> Prompts | KeptPrompts:
    """All texts of the run as tokens; warns of those that are too long."""
    named = [
        (picture.path.name, prompt)
        for picture in dict.fromkeys(pictures)
        for prompt in dict.fromkeys([picture.prompt, *picture.longest_prompts])
    ]
    named += [("--class_prompt", args.class_prompt)] if args.with_prior_preservation and args.class_prompt else []
    named += [("the samples' prompt", samples.grid_prompt(args)), *samples.texts_of(sampled), ("", "")]
    return make_prompts(named, base, args)


def end_with_report(
    session: Session, sets: PictureSets, framing: Framing, base: StableDiffusionBase, sampled: list[SamplePrompt]
) -> None:
    """What `--check_data` prints; `SystemExit` with 1 where something stops the run."""
    problems = [] if sets.problems else list(run_problems(session, sets, base))
    if session.is_main:
        read_prompts(session.args, base, [picture for scan in sets.scans for picture in scan.pictures], sampled)
        encoding = sys.stdout.encoding or "utf-8"  # names of files may be no text of it
        report = data_report(session.args, sets, framing.size_of, problems)
        print(report.encode(encoding, "backslashreplace").decode(encoding))
    if sets.problems or problems:
        raise SystemExit(1)


def run_problems(session: Session, sets: PictureSets, base: StableDiffusionBase) -> Iterator[str]:
    """What stops the run although each picture can be read."""
    args = session.args
    of_class = used_class_pictures(args, sets.of_class)
    is_complete = args.dataset_config is not None or len(of_class) == args.num_class_images
    checks: list[Callable[[], object]] = [
        lambda: hold_out(session, sets),
        lambda: record_class(session, sets, of_class if is_complete else []),
        lambda: check_group(args, session.resumed, session.accelerator.num_processes),
        lambda: check_fit(args, base),
    ]
    for check in checks:
        try:
            check()
        except ValueError as error:
            yield str(error)


def hold_out(session: Session, sets: PictureSets) -> tuple[list[Picture], list[Picture]]:
    """Pictures to train on, which a resumed run must know, and those whose loss is measured."""
    instance, held_out = sets.pictures(), [] if sets.held_out is None else sets.held_out.checked()
    folders = [scan.folder for scan in sets.subject]
    record_data(session, "subject", list(dict.fromkeys(instance)), folders)
    if session.args.validation_split:
        return split_off(instance, session.args.validation_split, session.seed)
    record_data(session, "held-out part", held_out, [] if sets.held_out is None else [sets.held_out.folder])
    return instance, held_out


def record_class(session: Session, sets: PictureSets, of_class: list[Picture]) -> None:
    """A resumed run must know these pictures, too."""
    folders = [scan.folder for scan in sets.of_class] or [Path(session.args.class_data_dir or "")]
    record_data(session, "class", of_class, folders)


def load(
    session: Session,
    base: StableDiffusionBase,
    objective: Objective,
    prompts: Prompts | KeptPrompts,
    data: DreamBoothData,
    held_out: HeldOutData,
) -> Learner:
    """The base model with its adapter. Modules needed only for precomputation are loaded, used and freed first."""
    args, accelerator = session.args, session.accelerator
    device, dtype = accelerator.device, WEIGHT_DTYPES[accelerator.mixed_precision]

    def load_text_encoders() -> dict[str, nn.Module]:
        return {part: model.to(device) for part, model in base.text_encoders(dtype).items()}

    outputs = open_outputs(args, base, device, dtype)
    prompts.to(device)
    if args.cache_text_embeddings or base.keeps_embeddings:
        text_encoders = prompts.keep_embeddings(load_text_encoders, trained_parts(args, base), outputs)
    else:
        text_encoders = load_text_encoders()

    vae = base.vae().to(device)
    encode = functools.partial(base.latent_distribution, vae)
    held_out.cache = encode_views(encode, held_out, range(len(held_out)), False, outputs)
    if args.cache_latents:
        positions = (position for batch in session.positions for position in batch)
        data.cache = encode_views(encode, data, positions, accelerator.is_local_main_process, outputs)
        vae = None
    del encode  # it holds the VAE
    if outputs is not None and session.is_main:
        outputs.trim()

    if args.base_precision is None:
        denoiser = base.denoiser(dtype).to("cpu" if args.group_offload else device)
    else:
        denoiser = load_quantised(base, args.base_precision, dtype).to(device)
    models = {base.denoiser_part: denoiser} | text_encoders
    adapted = {part: models[part] for part in trained_parts(args, base)}
    torch.manual_seed(session.seed)
    parameters = attach_trainable(adapted, apt_config(args), session.resumed.folder if session.resumed else None)
    parameters |= attach_words(args, prompts, text_encoders, session.resumed and session.resumed.folder)
    for name in filter(base.idle, list(parameters)):
        parameters.pop(name).requires_grad_(False)
    if args.enable_xformers_memory_efficient_attention:
        denoiser.enable_xformers_memory_efficient_attention()
    if args.gradient_checkpointing_blocks:
        checkpoint_blocks(denoiser, args.gradient_checkpointing_blocks)
    elif args.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if args.group_offload:
        kept = offload_blocks(denoiser, device)
        session.logger.info("%.1f MiB of the %s stay in main memory.", kept / 2**20, base.denoiser_part)
    if args.gradient_checkpointing and args.train_text_encoder:
        for text_encoder in text_encoders.values():
            checkpoint_activations(text_encoder)
    saved = adapted | (text_encoders if args.new_tokens else {})
    return Learner(
        base, objective.to(device), prompts, denoiser, text_encoders, vae, held_out, adapted, saved, parameters, dtype
    )


def make_optimizer(
    session: Session, parameters: dict[str, nn.Parameter]
) -> tuple[torch.optim.Optimizer, dict[str, float]]:
    """The optimizer; and the learning rates under the names that the log has."""
    args = session.args
    factor = session.examples_per_step if args.scale_lr else 1
    groups = parameter_groups(args, parameters, factor)
    session.logger.info("Learning rates: %s.", describe(groups))
    pairs = [(group.parameters, group.rate) for group in groups]
    given = usual_settings(args), parse_settings(args.optimizer_args)
    optimizer = optimizer_choice.make_optimizer(args.optimizer, pairs, *given)
    return optimizer, {"lr": args.learning_rate * factor} | {group.name: group.rate for group in groups}


def training_loss(args: argparse.Namespace, learner: Learner, batch: Batch) -> Tensor:
    """The denoising error of a batch, a number."""
    distribution = batch.images
    if learner.vae is not None:
        distribution = learner.base.latent_distribution(learner.vae, batch.images)
    errors = denoising_errors(args, learner, distribution, batch)
    if batch.weights is not None:
        errors = errors * batch.weights
    return batch_loss(errors, args.prior_loss_weight if args.with_prior_preservation else None)


def denoising_errors(args: argparse.Namespace, learner: Learner, distribution: Tensor, batch: Batch) -> Tensor:
    """The weighted error of each sample, `(B,)`; `distribution` `(B, 2, c, h, w)` is that of its latents."""
    base, objective = learner.base, learner.objective
    mean, std = distribution.unbind(1)  # (B, c, h, w)
    latents = mean + std * batch.posterior_noise
    noisy, times = objective.model_inputs(latents, batch.noise, batch.timesteps)
    embeddings = learner.prompts(batch.prompts, learner.text_encoders)
    labels = times if args.class_labels_conditioning == "timesteps" else None
    given = Noisy(noisy, times, embeddings, batch.time_ids, labels).to(learner.dtype)
    prediction = base.predict(learner.denoiser, given)
    target = objective.target(latents, batch.noise, batch.timesteps)
    distance = distance_of(args.loss_type, args.huber_c)
    if batch.masks is not None:
        distance = masked(distance, batch.masks)
    return objective.errors(prediction, target, batch.timesteps, distance)


def evaluation_is_due(session: Session, step: int) -> bool:
    """Every `--validation_steps`, or as diffusers counts: after the first epoch and every `--validation_epochs`."""
    args = session.args
    if not (samples.draws_while_training(args) or args.validation_split or args.validation_data_dir):
        return False
    if args.validation_steps is not None:
        return step % args.validation_steps == 0
    epoch, rest = divmod(step, session.steps_per_epoch)
    return rest == 0 and (epoch - 1) % args.validation_epochs == 0


def measure(session: Session, learner: Learner, save: Callable[[Path], None]) -> dict[str, float]:
    """The loss on held-out pictures, logged; with `--keep_best` the adapter is kept where it is the lowest so far."""
    if len(learner.held_out) == 0:
        return {}
    metrics = {VALIDATION_LOSS: validation_loss(session, learner)}
    session.log(metrics)
    keeps = session.args.keep_best and session.is_main
    if keeps and metrics[VALIDATION_LOSS] <= best.lowest_loss(session.output_dir):
        save(session.output_dir / best.FOLDER)
    return metrics


@torch.no_grad()
def validation_loss(session: Session, learner: Learner) -> float:
    """The loss on held-out pictures, without dropout, always at the same timesteps and with the same noise."""
    args, held_out, size = session.args, learner.held_out, session.args.train_batch_size
    alone = unwrapped(session, learner)
    alone.train(False)
    errors = []
    for indices in held_out.batches(size):
        batch = collate([held_out[index] for index in indices]).to(session.accelerator.device)
        errors.append(denoising_errors(args, alone, batch.images, batch))
    learner.train()
    return torch.cat(errors).mean().item()


def draw_samples(session: Session, learner: Learner, sampled: list[SamplePrompt]) -> dict[Path, str]:
    """Draws with the adapter as it is now into `samples/`; returns the pictures with their prompts."""
    learner.train(False)
    alone = unwrapped(session, learner)
    drawn = samples.draw_grid(session, alone) if samples.draws_grid(session.args) else {}
    drawn |= samples.draw_prompts(session, alone, sampled)
    learner.train()
    return drawn


def unwrapped(session: Session, learner: Learner) -> Learner:
    """The learner for what, as a rule, the main process does alone: its models must not look for the others."""
    unwrap = session.accelerator.unwrap_model
    text_encoders = {part: unwrap(model) for part, model in learner.text_encoders.items()}
    return dataclasses.replace(learner, denoiser=unwrap(learner.denoiser), text_encoders=text_encoders)


if __name__ == "__main__":
    main()
    leave()
