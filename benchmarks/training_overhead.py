#!/usr/bin/env python
"""What a training step costs beside the frozen base alone: everywhere, and where only the deeper half is adapted.

    python benchmarks/training_overhead.py                 # float32 and bf16, 30 GiB; --only "SDXL" for one model

The baseline is the frozen base's forward pass, and its backward pass down to the latents. Beside it stand whole steps
with clipping and AdamW: APT with the defaults, APT in the up blocks (SD3: the second half of the blocks), and LoRA of
rank 4 on all projections of attention. Shapes are those of Stable Diffusion 1.5, of SDXL with 1 and 2 in place of 2
and 10 transformer blocks a stage, and of SD 3.5 medium with 4 of its 24 blocks; one picture a step, random weights.
The embedded model of emoji is itself, with the eight pictures of a step of the demo.
"keeps" is what a forward pass leaves for its backward pass, weights aside.
"""

from collections.abc import Callable

import torch
from _denoisers import EMOJI, REAL, Inputs, Shape, groups_of, moved, predict, trained_in_float32
from _models import twin, with_lora
from _timing import Result, arguments, compare, report
from torch import Tensor, nn

from apt_diffusion import APTConfig, add_apt, freeze_base

BASE, APT, DEEPER, LORA = "the frozen base, forward and backward", "APT", "APT, the deeper half", "LoRA r4"
MODELS = {"embedded, 64 x 64": EMOJI} | REAL


def variants_of(base: nn.Module, deeper: str) -> dict[str, nn.Module]:
    """The base and its copies with adapters; all share the frozen weights."""
    models = {BASE: base}
    for name, config in ((APT, None), (DEEPER, APTConfig(target_modules=deeper))):
        models[name] = twin(base)
        add_apt(models[name], config)
        freeze_base(models[name])
    models[LORA] = with_lora(twin(base))
    return models


def make_step(model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """A step, and its forward pass alone."""
    parameters = trained_in_float32(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None
    first = next(iter(inputs))  # the latents
    inputs = inputs | {first: inputs[first].clone().requires_grad_(optimizer is None)}

    def forward() -> Tensor:
        return predict(model, inputs, dtype).square().mean()

    def step() -> None:
        forward().backward()
        if optimizer is None:
            inputs[first].grad = None
            return
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    return step, forward


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """What autograd saves in a forward pass, each memory once, without the model's own weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(kept.values())


def measure(shape: Shape, dtype: torch.dtype, device: str, rounds: int, group: str) -> tuple[list[Result], str]:
    """Times of all variants of a model, and what each keeps for the backward pass; nothing stays in memory."""
    torch.manual_seed(0)
    models = variants_of(shape.make(device).to(dtype), shape.deeper)
    steps = {key: make_step(model, moved(shape.inputs(), device, dtype), dtype) for key, model in models.items()}
    kept = {key: kept_bytes(models[key], forward) / 2**20 for key, (_, forward) in steps.items()}
    results = compare({key: step for key, (step, _) in steps.items()}, rounds, group)
    return results, ", ".join(f"{key} {size:.0f} MiB" for key, size in kept.items())


def main() -> None:
    """Measures and reports."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--only", default="", help="groups whose names begin so, as SDXL")
    args = parser.parse_args()
    groups, notes = {}, {}
    for group, shape, dtype in groups_of(MODELS, args.only):
        groups[group], notes[f"{group}, keeps"] = measure(shape, dtype, args.device, args.rounds, group)
    report("Training overhead", groups, args.output_dir, notes)


if __name__ == "__main__":
    main()
