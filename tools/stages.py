"""One training run: seeded steps, a schedule that ends, averaged weights, checkpoints from which it goes on."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from apt_diffusion.io.atomic import replacing

# Each draws from seeds of its own.
STREAMS = ("autoencoder", "text", "denoiser", "grader", "export", "clip", "vilt", "meter", "decoder", "judge", "sd3")


@dataclass
class Stage:
    """What is optimised, how, and for how long.

    Args:
        name: of its checkpoint; one of `STREAMS`.
        modules: what is trained.
        optimizers: together they hold every parameter; a group may scale the rate by `lr_scale`.
        lr: the highest learning rate of a warm-up and a cosine.
        steps: from first to last.
        loss: of one step, drawn from its generator.
        ema_decay: of the averaged weights.
        seconds: with it the schedule follows the clock, whatever `steps` says; such a run is not repeatable.
    """

    name: str
    modules: dict[str, nn.Module]
    optimizers: list[torch.optim.Optimizer]
    lr: float
    steps: int
    loss: Callable[[torch.Generator], Tensor]
    ema_decay: float = 0.0
    seconds: float | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of all modules."""
        return [parameter for module in self.modules.values() for parameter in module.parameters()]


def fit(
    stage: Stage,
    folder: str | Path,
    seed: int = 0,
    save_every: int = 500,
    at_save: Callable[[int], None] = lambda step: None,
) -> None:
    """Runs a stage to its end, from its last checkpoint if there is one; the modules end with averaged weights."""
    file = Path(folder) / f"{stage.name}.pt"
    parameters = stage.parameters
    device = parameters[0].device
    average = [parameter.detach().clone() for parameter in parameters]
    step = load_stage(stage, average, file)
    start = time.monotonic()
    bar = tqdm(initial=step, total=stage.steps if stage.seconds is None else None, desc=stage.name, mininterval=5)
    recent = torch.zeros((), device=device)
    while (done := share_done(stage, step, time.monotonic() - start)) < 1:
        generator = torch.Generator(device).manual_seed(hash((seed, STREAMS.index(stage.name), step)) % 2**63)
        warm_up = min(1.0, (step + 1) / min(200, stage.steps))
        rate = stage.lr * warm_up * (0.5 + 0.49 * math.cos(math.pi * done))
        for optimizer in stage.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            optimizer.zero_grad(set_to_none=True)
        loss = stage.loss(generator)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in stage.optimizers:
            optimizer.step()
        decay = min(stage.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
        recent.lerp_(loss.detach().float(), 0.02 if step > 50 else 0.2)
        step += 1
        bar.update()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{recent.item():.4f}", lr=f"{rate:.1e}")
        if step % save_every == 0:
            save_stage(stage, average, step, file)
            with averaged(stage, average):
                at_save(step)
    bar.close()
    if step % save_every:
        save_stage(stage, average, step, file)
    restore(parameters, average)
    at_save(step)


def share_done(stage: Stage, step: int, seconds: float) -> float:
    """From 0 to 1, by steps or by the clock."""
    return step / stage.steps if stage.seconds is None else seconds / stage.seconds


def save_stage(stage: Stage, average: list[Tensor], step: int, file: Path) -> None:
    """A checkpoint, in place of the last one."""
    state = {
        "step": step,
        "modules": {name: module.state_dict() for name, module in stage.modules.items()},
        "optimizers": [optimizer.state_dict() for optimizer in stage.optimizers],
        "average": average,
    }
    with replacing(file) as temporary:
        torch.save(state, temporary)


def load_stage(stage: Stage, average: list[Tensor], file: Path) -> int:
    """Steps already done."""
    if not file.is_file():
        return 0
    state = torch.load(file, weights_only=True, map_location=average[0].device)
    for name, module in stage.modules.items():
        module.load_state_dict(state["modules"][name])
    for optimizer, values in zip(stage.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    restore(average, state["average"])
    return state["step"]


@torch.no_grad()
def restore(targets: list[Tensor], values: list[Tensor]) -> None:
    """Copies values into tensors."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


@contextmanager
def averaged(stage: Stage, average: list[Tensor]) -> Iterator[None]:
    """Within it the modules hold the averaged weights."""
    own = [parameter.detach().clone() for parameter in stage.parameters]
    restore(stage.parameters, average)
    yield
    restore(stage.parameters, own)
