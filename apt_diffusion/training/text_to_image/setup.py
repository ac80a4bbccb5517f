"""Before the first step of `train_apt_sd.py`: checks, models, optimizer, data."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ... import add_apt
from ...data.dreambooth import DreamBoothData, Framing, LatentCache, collate
from ...data.order import micro_batches
from ...data.pictures import Picture, check_picture, find_pictures
from .. import hub
from ..adapter import attach_trainable
from ..checkpoints import Checkpoint, load_training_state, remove_unfinished
from ..diffusion import Objective
from ..loading import make_loader
from ..optimizer import make_adamw, make_schedule
from ..run import agree_on_seed, find_resumed, make_accelerator, report_changes
from .arguments import apt_config
from .class_pictures import draw_missing_class_pictures, find_class_pictures
from .stable_diffusion import Prompts, StableDiffusionBase
from .stable_diffusion_xl import open_base

logger = logging.getLogger("train_apt_sd")

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Run:
    """What is known before a model is loaded."""

    args: Any
    accelerator: Accelerator
    base: StableDiffusionBase
    command: str
    seed: int
    instance: list[Picture]
    of_class: list[Picture]
    resumed: Checkpoint | None
    repo_id: str | None = None
    steps_per_epoch: int = 0  # known with the data

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def sample_prompt(self) -> str:
        return self.args.validation_prompt or self.args.instance_prompt

    @property
    def first_step(self) -> int:
        """Steps already done."""
        return self.resumed.step if self.resumed else 0

    @property
    def first_position(self) -> int:
        """Samples already seen."""
        return self.resumed.state["position"] if self.resumed else 0

    @property
    def positions_per_step(self) -> int:
        args = self.args
        return args.train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps


@dataclass
class Trainer:
    """What a training step uses."""

    unet: nn.Module
    text_encoders: dict[str, nn.Module]  # none where their embeddings are kept
    vae: nn.Module | None  # `None` where its latents are kept
    components: dict[str, nn.Module]  # those with an adapter, as they were loaded
    parameters: dict[str, nn.Parameter]  # the adapter's, by name
    prompts: Prompts
    objective: Objective
    loader: DataLoader
    optimizer: Any  # accelerate's wrapper
    schedule: Callable[[int], float]
    dtype: torch.dtype  # of the frozen weights

    @property
    def trained(self) -> list[nn.Module]:
        """The models with an adapter, as accelerate wrapped them."""
        wrapped = {"unet": self.unet} | self.text_encoders
        return [wrapped[part] for part in self.components]


def check(args: Any, command: str) -> Run:
    """Finds everything that can be wrong before a model is loaded."""
    accelerator = make_accelerator(args, logger.name)
    instance = find_pictures(args.instance_data_dir, args.instance_prompt, args.caption_column)
    of_class = find_class_pictures(args)
    for path in args.validation_images or ():
        check_picture(Path(path), args.instance_prompt)
    resumed = find_resumed(args)
    base = open_base(
        args.pretrained_model_name_or_path, args.revision, args.variant, args.pretrained_vae_model_name_or_path
    )
    args.resolution = base.check_resolution(args.resolution)
    check_fit(args, base)
    run = Run(args, accelerator, base, command, agree_on_seed(args.seed, resumed), instance, of_class, resumed)
    if resumed:
        report_changes(args, resumed.state["settings"])
    if accelerator.is_main_process:
        run.output_dir.mkdir(parents=True, exist_ok=True)
        remove_unfinished(run.output_dir)
        if args.push_to_hub:
            run.repo_id = hub.create_repository(args.hub_model_id or run.output_dir.resolve().name, args.hub_token)
    return run


def check_fit(args: Any, base: StableDiffusionBase) -> None:
    """Adapter and prompts must fit the model: seen on configuration and tokenizer, before any weights are loaded."""
    skeletons = base.skeletons()
    longest = min(skeletons[part].config.max_position_embeddings for part in base.text_parts)
    if (args.tokenizer_max_length or 0) > longest:
        raise ValueError(
            f"--tokenizer_max_length {args.tokenizer_max_length}: this text encoder reads at most {longest} tokens."
        )
    if args.tokenizer_name is not None and len(base.text_parts) > 1:
        raise ValueError("--tokenizer_name names one tokenizer, but this model has two, which pad differently.")
    base.tokenizers(args.tokenizer_name)
    add_apt({part: skeletons[part] for part in trained_parts(args, base)}, apt_config(args))


def trained_parts(args: Any, base: StableDiffusionBase) -> list[str]:
    return [*([] if args.no_train_unet else ["unet"]), *(base.text_parts if args.train_text_encoder else ())]


def load(run: Run) -> Trainer:
    """The base model with its adapter. A part that only has to be asked once is loaded, asked, and let go first."""
    args, accelerator, base = run.args, run.accelerator, run.base
    device, dtype = accelerator.device, WEIGHT_DTYPES[accelerator.mixed_precision]
    if args.with_prior_preservation:
        draw_missing_class_pictures(args, len(run.of_class), base, accelerator, run.seed)
        if len(run.of_class) < args.num_class_images:
            run.of_class = find_class_pictures(args)
    noise_schedule = base.noise_schedule()
    objective = Objective(noise_schedule.alphas_cumprod, noise_schedule.config.prediction_type, args.snr_gamma)
    data = make_data(run, len(noise_schedule.alphas_cumprod))

    text_encoders = {part: model.to(device) for part, model in base.text_encoders(dtype).items()}
    prompts = make_prompts(run, data, text_encoders)
    if args.cache_text_embeddings:
        prompts.keep_embeddings(text_encoders)
        text_encoders = {}

    batches = make_batches(run, data)
    vae = base.vae().to(device)
    if args.cache_latents:
        data.cache = encode_views(run, data, vae, batches)
        vae = None

    unet = base.unet(dtype).to(device)
    models = {"unet": unet} | text_encoders
    components = {part: models[part] for part in trained_parts(args, base)}
    torch.manual_seed(run.seed)
    parameters = attach_trainable(components, apt_config(args), run.resumed.folder if run.resumed else None)
    for name in filter(base.idle, list(parameters)):
        parameters.pop(name).requires_grad_(False)
    prepare_computation(args, unet, text_encoders)

    optimizer = make_optimizer(run, parameters)
    schedule = make_schedule(
        args.lr_scheduler, optimizer, args.lr_warmup_steps, args.max_train_steps, args.lr_num_cycles, args.lr_power
    )
    unet, optimizer = accelerator.prepare(unet, optimizer)
    text_encoders = {part: accelerator.prepare(model) for part, model in text_encoders.items()}
    if run.resumed:
        load_training_state(run.resumed, optimizer.optimizer, parameters, accelerator.scaler)
    loader = make_loader(data, batches, collate, args.dataloader_num_workers, pin_memory=device.type == "cuda")
    return Trainer(
        unet,
        text_encoders,
        vae,
        components,
        parameters,
        prompts,
        objective.to(device),
        loader,
        optimizer,
        schedule,
        dtype,
    )


def make_data(run: Run, num_timesteps: int) -> DreamBoothData:
    args = run.args
    return DreamBoothData(
        run.instance,
        run.of_class,
        Framing(args.resolution, args.center_crop, args.random_flip, args.image_interpolation_mode, run.base.stride),
        run.base.latent_shape(args.resolution),
        run.seed,
        repeats=args.repeats,
        noise_offset=args.noise_offset,
        num_timesteps=num_timesteps,
    )


def make_prompts(run: Run, data: DreamBoothData, text_encoders: dict[str, nn.Module]) -> Prompts:
    """All prompts that data and samples will ask for."""
    return Prompts(
        [*data.prompts, run.sample_prompt, ""],
        run.base,
        text_encoders,
        run.base.tokenizers(run.args.tokenizer_name),
        run.args.tokenizer_max_length,
        run.args.text_encoder_use_attention_mask,
    )


def make_batches(run: Run, data: DreamBoothData) -> list[range]:
    """Positions of all batches of this process, from the first step to the last."""
    args, accelerator = run.args, run.accelerator
    run.steps_per_epoch = math.ceil(data.epoch_length / run.positions_per_step)
    args.max_train_steps = args.max_train_steps or args.num_train_epochs * run.steps_per_epoch
    logger.info(
        "%d pictures of the subject, %d of its class; %d steps per epoch with %d samples each; %d steps in all.",
        len(run.instance), len(run.of_class), run.steps_per_epoch, run.positions_per_step, args.max_train_steps,
    )  # fmt: skip
    return micro_batches(
        run.first_position,
        max(0, args.max_train_steps - run.first_step) * args.gradient_accumulation_steps,
        args.train_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
    )


def encode_views(run: Run, data: DreamBoothData, vae: nn.Module, batches: list[range]) -> LatentCache:
    """Encodes every view that these batches will ask for, once, and one by one so that none depends on the others.

    What a position draws is known beforehand, so cuts and flips stay random. Means and standard deviations are kept:
    the latents are still sampled in every step.
    """
    views = sorted({view for batch in batches for position in batch for view in data.views_at(position)})
    cache = {}
    for view in tqdm(views, desc="Encoding pictures", disable=not run.accelerator.is_local_main_process):
        cache[view] = run.base.latent_distribution(vae, data.pixels([view])[view][None])[0].cpu()
    return cache


def prepare_computation(args: Any, unet: nn.Module, text_encoders: dict[str, nn.Module]) -> None:
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        if args.train_text_encoder:
            for text_encoder in text_encoders.values():
                text_encoder.gradient_checkpointing_enable()


def make_optimizer(run: Run, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, with a learning rate of their own for text encoders."""
    args = run.args
    scale = run.positions_per_step if args.scale_lr else 1
    text_encoder_lr = args.learning_rate if args.text_encoder_lr is None else args.text_encoder_lr
    rates = {"unet": args.learning_rate, "text_encoder": text_encoder_lr}
    groups = {part: {n: p for n, p in parameters.items() if n.startswith(part)} for part in rates}
    return make_adamw(
        [(group, rates[part] * scale) for part, group in groups.items() if group],
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        epsilon=args.adam_epsilon,
        use_8bit=args.use_8bit_adam,
    )
