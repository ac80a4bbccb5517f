#!/usr/bin/env python
"""Training steps of vision-language models: APT and deep prompts on ViLT, and cached encoder outputs on METER.

    python benchmarks/vl_training_speed.py

ViLT-B/32's shapes at 241 tokens, 200 prompts, and METER's (clip16 + roberta) at 288 x 288 and 40 words; random
weights, one example a step, float32. With APT in METER's cross-modal layers only, what its two encoders say does not
change: the trainers' `--cache_encoder_outputs` computes it once.
"""

from collections.abc import Callable

import torch
from _models import filled, twin, vilt_b32
from _timing import Result, arguments, compare, report
from torch import Tensor, nn

from apt_diffusion import add_apt, freeze_base
from apt_diffusion.baselines import MethodConfig, add_method, freeze_for_method

WORDS, PATCHES, METER_SIZE = 40, 201, 288


def meter(device: str) -> nn.Module:
    from apt_diffusion.models.meter import MeterConfig, MeterModel

    with torch.device("meta"):
        model = MeterModel(MeterConfig(vision_config={"image_size": METER_SIZE}))
    return filled(model, device)


def make_step(model: nn.Module, inputs: Callable[[], dict[str, Tensor]]) -> Callable[[], None]:
    """A step on the pooled output: what a head on it would ask of the model."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        model(**inputs()).pooler_output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def vilt_results(rounds: int, device: str) -> list[Result]:
    base = vilt_b32(device)
    inputs = {
        "input_ids": torch.randint(1, 1000, (1, WORDS), device=device),
        "image_embeds": torch.randn(1, PATCHES, 768, device=device),
        "pixel_mask": torch.ones(1, PATCHES, dtype=torch.long, device=device),
    }
    steps = {}
    for method in ("deep_prompt", "apt"):
        model = twin(base)
        add_method(model, MethodConfig(method, trained=("pooler",)))
        freeze_for_method(model)
        steps[f"{method}, 200 prompts"] = make_step(model, lambda: inputs)
    return compare(steps, rounds, "ViLT")


def meter_results(rounds: int, device: str) -> list[Result]:
    model = meter(device)
    add_apt(model)
    freeze_base(model)
    words = {
        "input_ids": torch.randint(3, 1000, (1, WORDS), device=device),
        "attention_mask": torch.ones(1, WORDS, dtype=torch.long, device=device),
    }
    pixels = torch.randn(1, 3, METER_SIZE, METER_SIZE, device=device)
    with torch.no_grad():
        kept = {"text_embeds": model.get_text_features(**words), "image_embeds": model.get_image_features(pixels)}
    kept["attention_mask"] = words["attention_mask"]
    steps = {
        "APT, encoders in every step": make_step(model, lambda: words | {"pixel_values": pixels}),
        "APT, kept encoder outputs": make_step(model, lambda: kept),
    }
    return compare(steps, rounds, "METER")


def main() -> None:
    args = arguments(__doc__, rounds=5).parse_args()
    torch.manual_seed(0)
    groups = {
        "ViLT-B/32, 241 tokens": vilt_results(args.rounds, args.device),
        f"METER, {METER_SIZE} x {METER_SIZE}": meter_results(args.rounds, args.device),
    }
    notes = {"Steps per second with kept encoder outputs / without": f"{1 / groups[list(groups)[1]][1].ratio:.2f}"}
    report("Vision-language training speed", groups, args.output_dir, notes)


if __name__ == "__main__":
    main()
