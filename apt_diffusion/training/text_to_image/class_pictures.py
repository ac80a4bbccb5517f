"""Pictures of the class, for prior preservation: those in the folder, and missing ones drawn by the base model."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ...data.pictures import Picture
from ...io.atomic import replacing
from .picture_sets import scan_class_folder, used_class_pictures
from .stable_diffusion import StableDiffusionBase

PRECISIONS = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def complete_class_pictures(
    args: Any, present: list[Picture], base: StableDiffusionBase, accelerator: Accelerator, seed: int
) -> list[Picture]:
    """Fills the folder up to `--num_class_images`; the processes share the work. Picture i depends on seed and i.

    Args:
        args: the script's flags.
        present: pictures that are there already.
        base: draws the others.
        accelerator, seed: the run's.

    Returns:
        All pictures of the class.
    """
    if not args.with_prior_preservation:
        return []
    if args.dataset_config is not None:  # whose folders of classes are complete
        return present
    accelerator.wait_for_everyone()  # all have counted
    missing = list(range(len(present), args.num_class_images))[accelerator.process_index :: accelerator.num_processes]
    folder = Path(args.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if missing:
        default = "fp16" if accelerator.device.type == "cuda" else "fp32"
        pipeline = base.pipeline(PRECISIONS[args.prior_generation_precision or default]).to(accelerator.device)
        pipeline.set_progress_bar_config(disable=True)
        batches = [missing[i : i + args.sample_batch_size] for i in range(0, len(missing), args.sample_batch_size)]
        bar = tqdm(batches, desc="Drawing class pictures", disable=not accelerator.is_local_main_process)
        for numbers in bar:
            images = base.pictures(
                pipeline,
                prompt=[args.class_prompt] * len(numbers),
                generator=[torch.Generator().manual_seed(seed * 2**20 + number) for number in numbers],
                **base.class_picture_settings(args, len(numbers)),
            )
            for number, image in zip(numbers, images, strict=True):
                name = f"{number}-{hashlib.sha1(image.tobytes()).hexdigest()}.png"
                with replacing(folder / name) as temporary:  # a kill leaves no half picture
                    image.save(temporary, format="PNG")
    accelerator.wait_for_everyone()
    return present if len(present) == args.num_class_images else used_class_pictures(args, scan_class_folder(args))
