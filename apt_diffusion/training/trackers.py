"""Images for the trackers that accelerate started; each tracker takes them in its own way."""

from typing import Any

import numpy as np
from PIL import Image


def log_images(trackers: list[Any], name: str, images: list[Image.Image], caption: str, step: int) -> None:
    """Sends images to tensorboard, wandb and comet, where they are among the trackers."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            stacked = np.stack([np.asarray(image) for image in images])  # (N, H, W, 3)
            tracker.writer.add_images(name, stacked, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log(
                {name: [wandb.Image(image, caption=f"{i}: {caption}") for i, image in enumerate(images)]}, step
            )
        elif tracker.name == "comet_ml":
            for index, image in enumerate(images):
                tracker.writer.log_image(image, name=f"{name}-{index}: {caption}", step=step)
