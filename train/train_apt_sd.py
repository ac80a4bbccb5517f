#!/usr/bin/env python
"""Teach Stable Diffusion a subject from a few pictures, as an APT adapter (DreamBooth, arXiv 2208.12242).

    accelerate launch train/train_apt_sd.py --pretrained_model_name_or_path miniature \\
        --instance_data_dir examples/subject --instance_prompt "a sks glyph" --output_dir out --max_train_steps 200

Here are the loop, the loss, and what is saved. Arguments, set-up and what is particular to Stable Diffusion stand in
the modules beside this one. The command line is that of diffusers' `train_dreambooth_lora.py` and more; see
docs/training.md.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt_diffusion import save_apt_weights
from apt_diffusion.data.dreambooth import Batch
from apt_diffusion.data.pictures import read_picture
from apt_diffusion.training import checkpoints, hub, provenance
from apt_diffusion.training.grids import save_grid
from apt_diffusion.training.interrupt import Interrupt
from apt_diffusion.training.loss_log import plot_losses
from apt_diffusion.training.model_card import write_model_card
from apt_diffusion.training.optimizer import set_learning_rates
from apt_diffusion.training.run import seed_dropout, start_progress
from apt_diffusion.training.text_to_image.arguments import build_parser, parse_args
from apt_diffusion.training.text_to_image.setup import Run, Trainer, check, load
from apt_diffusion.training.trackers import log_images

logger = logging.getLogger("train_apt_sd")

CARD_SETTINGS = ("num_prompts", "rank", "resolution", "train_batch_size", "max_train_steps", "learning_rate")
USAGE = """
from apt_diffusion import {pipeline}

pipe = {pipeline}.from_pretrained({base_model!r})
pipe.load_apt_weights({place!r})
image = pipe({prompt!r}).images[0]
"""


def main(argv: list[str] | None = None) -> None:
    """Trains. After Ctrl-C or SIGTERM: `SystemExit` with 130 or 143, once a checkpoint is written."""
    args = parse_args(argv)
    run = check(args, provenance.command_line(sys.argv[0], argv))
    trainer = load(run)
    signal_number = train(run, trainer)
    if run.accelerator.is_main_process and not signal_number:
        finish(run, trainer)
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    if signal_number:
        raise SystemExit(128 + signal_number)  # what a shell reports of a process that the signal ended


def train(run: Run, trainer: Trainer) -> int:
    """The loop. Returns the number of the signal that ended it early, or 0."""
    args, accelerator, optimizer = run.args, run.accelerator, trainer.optimizer
    parameters = list(trainer.parameters.values())
    progress = start_progress(accelerator, "dreambooth-apt", args, run.resumed)
    batches = iter(trainer.loader)
    set_training_mode(trainer, True)
    with Interrupt() as interrupt:
        for step in range(run.first_step + 1, args.max_train_steps + 1):
            rates = set_learning_rates(optimizer, trainer.schedule(step - 1))
            losses = []
            for micro_step in range(args.gradient_accumulation_steps):
                batch = next(batches).to(accelerator.device)
                seed_dropout(accelerator, run.seed, step * args.gradient_accumulation_steps + micro_step)
                with accelerator.accumulate(*trainer.trained):
                    loss = training_loss(run, trainer, batch)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.detach())
            progress.add(step, losses, dict(zip(("lr", "text_encoder_lr"), rates, strict=False)))

            last = step == args.max_train_steps
            checkpoint_due = last or step % args.checkpointing_steps == 0
            samples_due = not last and samples_are_due(run, step)
            # All processes must ask for the others' losses and signals at the same steps.
            alone = accelerator.num_processes == 1
            signal_number = 0
            if checkpoint_due or samples_due or step % progress.every == 0 or (alone and interrupt.signal_number):
                signal_number = progress.flush(interrupt.signal_number)
            if accelerator.is_main_process and (checkpoint_due or signal_number):
                save_checkpoint(run, trainer, step)
            if signal_number and not last:
                logger.info("Signal %d at step %d: --resume_from_checkpoint latest goes on.", signal_number, step)
                progress.close()
                return signal_number
            if accelerator.is_main_process and samples_due:
                draw_samples(run, trainer, step)
    progress.close()
    return 0


def training_loss(run: Run, trainer: Trainer, batch: Batch) -> Tensor:
    """The denoising error of a batch, a number."""
    args = run.args
    distribution = batch.images if trainer.vae is None else run.base.latent_distribution(trainer.vae, batch.images)
    mean, std = distribution.unbind(1)  # (B, c, h, w)
    latents = mean + std * batch.posterior_noise
    noisy = trainer.objective.noisy(latents, batch.noise, batch.timesteps)
    embeddings = trainer.prompts(batch.prompts, trainer.text_encoders)
    prediction = trainer.unet(
        noisy.to(trainer.dtype),
        batch.timesteps,
        **run.base.conditions(embeddings, batch.time_ids, trainer.dtype),
        class_labels=batch.timesteps if args.class_labels_conditioning == "timesteps" else None,
        return_dict=False,
    )[0]
    target = trainer.objective.target(latents, batch.noise, batch.timesteps)
    prior_weight = args.prior_loss_weight if args.with_prior_preservation else None
    return trainer.objective.loss(prediction, target, batch.timesteps, prior_weight)


def set_training_mode(trainer: Trainer, training: bool) -> None:
    for model in (trainer.unet, *trainer.text_encoders.values()):
        model.train(training)


def samples_are_due(run: Run, step: int) -> bool:
    """Every `--validation_steps`, or as diffusers counts: after the first epoch and every `--validation_epochs`."""
    if run.args.validation_prompt is None or run.args.num_validation_images == 0:
        return False
    if run.args.validation_steps is not None:
        return step % run.args.validation_steps == 0
    epoch, rest = divmod(step, run.steps_per_epoch)
    return rest == 0 and (epoch - 1) % run.args.validation_epochs == 0


def draw_samples(run: Run, trainer: Trainer, step: int) -> list[Path]:
    """Draws with the adapter as it is now: a labelled grid in `samples/`, and the images to the trackers."""
    args = run.args
    start_images = [read_picture(Path(path)) for path in args.validation_images or ()] or None
    count = len(start_images) if start_images else args.num_validation_images
    if args.num_validation_images == 0:
        return []
    seeds = [run.seed + index for index in range(count)]
    set_training_mode(trainer, False)
    # Only the main process draws, so the models must not look for the others.
    unwrap = run.accelerator.unwrap_model
    text_encoders = {part: unwrap(model) for part, model in trainer.text_encoders.items()}
    with torch.no_grad():
        conditioning = tuple(trainer.prompts([prompt], text_encoders) for prompt in (run.sample_prompt, ""))
    images = run.base.draw(
        unwrap(trainer.unet),
        conditioning,
        seeds,
        args.resolution,
        start_images,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
    )
    set_training_mode(trainer, True)
    log_images(run.accelerator.trackers, "validation", images, run.sample_prompt, step)
    labels = [f"seed {seed}" for seed in seeds]
    title = f"step {step}: {run.sample_prompt}"
    return [save_grid(images, labels, title, run.output_dir / "samples" / f"step-{step:06d}.png")]


def metadata(run: Run, step: int) -> dict[str, str]:
    """The header of the adapter's file."""
    return provenance.adapter_metadata(
        vars(run.args),
        run.command,
        step,
        base_model=run.args.pretrained_model_name_or_path,
        instance_prompt=run.args.instance_prompt,
    )


def save_checkpoint(run: Run, trainer: Trainer, step: int) -> None:
    state = {
        "step": step,
        "position": run.first_position + (step - run.first_step) * run.positions_per_step,
        "seed": run.seed,
        "settings": provenance.public_settings(vars(run.args)),
    }
    with checkpoints.new_checkpoint(run.output_dir, step) as folder:
        save_apt_weights(trainer.components, folder, metadata=metadata(run, step))
        optimizer = trainer.optimizer.optimizer
        checkpoints.save_training_state(folder, optimizer, trainer.parameters, state, run.accelerator.scaler)
    checkpoints.prune_checkpoints(run.output_dir, run.args.checkpoints_total_limit, newest=step)


def card_settings(run: Run) -> dict[str, Any]:
    """What a reader wants to know: the sizes, and whatever differs from the defaults. The file's header has it all."""
    default = build_parser().get_default
    chosen = {key: value for key, value in vars(run.args).items() if value != default(key)}
    return {key: getattr(run.args, key) for key in CARD_SETTINGS} | chosen | {"seed": run.seed}


def finish(run: Run, trainer: Trainer) -> None:
    """The adapter, its card, samples and loss plot; and all of them to the hub."""
    args = run.args
    step = max(run.first_step, args.max_train_steps)
    save_apt_weights(trainer.components, run.output_dir, metadata=metadata(run, step))
    logger.info("The adapter is in %s.", run.output_dir)
    samples = draw_samples(run, trainer, step)
    place = run.repo_id or args.output_dir
    write_model_card(
        run.output_dir,
        title=run.repo_id or run.output_dir.resolve().name,
        base_model=args.pretrained_model_name_or_path,
        summary="An adapter for Stable Diffusion, trained with Approximated Prompt Tuning (arXiv 2306.15706) on "
        f"{len(run.instance)} pictures for {step} steps. Adapted: {' and '.join(trainer.components)}.",
        usage=USAGE.format(
            pipeline=run.base.pipeline_class.__name__,
            base_model=args.pretrained_model_name_or_path,
            place=place,
            prompt=run.sample_prompt,
        ),
        tags=["text-to-image", "diffusers", run.base.tag, "apt", "approximated-prompt-tuning"],
        settings=card_settings(run),
        command=run.command,
        prompt=args.instance_prompt,
        images=samples,
        loss_plot=plot_losses(run.output_dir),
    )
    if run.repo_id:
        hub.upload(run.repo_id, run.output_dir, args.hub_token)


if __name__ == "__main__":
    main()
