#!/usr/bin/env python
"""Many adapters on one base model: swapping one for another, and one batch in which every image has its own.

    python benchmarks/switching.py

Stable Diffusion 1.5's shapes with random weights. The swap is from memory, UNet and text encoder, beside diffusers'
LoRA hot swap of the UNet (`load_lora_adapter(..., hotswap=True)`); the batch has eight images and eight adapters,
beside one adapter for all, beside eight passes with a switch between them, and beside PEFT's mixed batches of LoRAs.
"""

from typing import Any

import torch
from _models import lora_config, randomized, sd15_text_encoder, sd15_unet, twin, with_lora
from _timing import Result, arguments, compare, report
from torch import Tensor, nn

from apt_diffusion import APTConfig, add_apt, load_apt_weights, prepared_apt, set_apt_adapters
from apt_diffusion.api import cores_of
from apt_diffusion.io.save import apt_state_dict

NAMES = [f"adapter{index}" for index in range(8)]


def swap_results(unet: nn.Module, text_encoder: nn.Module, rounds: int) -> list[Result]:
    from peft import get_peft_model_state_dict

    parts = {"unet": twin(unet), "text_encoder": twin(text_encoder)}
    settings = APTConfig()
    add_apt(parts, settings)
    weights = {}
    for part, model in parts.items():
        randomized(model, ".apt")
        weights |= {f"{part}.{key}": tensor for key, tensor in apt_state_dict(model).items()}
    lora = with_lora(twin(unet))
    lora_weights = {key: value.clone() for key, value in get_peft_model_state_dict(lora).items()}

    def swap_lora() -> None:
        lora.load_lora_adapter(dict(lora_weights), prefix=None, adapter_name="default", hotswap=True)

    variants = {
        "LoRA r4 hot swap (diffusers), UNet": swap_lora,
        "APT hot swap, UNet and text encoder": lambda: load_apt_weights(parts, weights, hotswap=True, config=settings),
    }
    return compare(variants, rounds, "swap")


def batch_results(unet: nn.Module, rounds: int, device: str, size: int) -> list[Result]:
    adapted = twin(unet)
    for name in NAMES:
        add_apt(adapted, adapter_name=name)
    randomized(adapted, ".apt")
    sample, context = torch.randn(8, 4, size // 8, size // 8, device=device), torch.randn(8, 77, 768, device=device)

    def run(model: nn.Module, rows: slice = slice(None), **kwargs: Any) -> Tensor:
        return model(sample[rows], 500, encoder_hidden_states=context[rows], **kwargs).sample

    def shared() -> Tensor:
        set_apt_adapters(adapted, NAMES[0])
        return run(adapted)

    def mixed() -> Tensor:
        for core in cores_of(adapted):
            core.adapters_per_sample = tuple(NAMES)
        try:
            return run(adapted)
        finally:
            for core in cores_of(adapted):
                core.adapters_per_sample = None

    def one_by_one() -> Tensor:
        parts = []
        for index, name in enumerate(NAMES):
            set_apt_adapters(adapted, name)
            parts.append(run(adapted, slice(index, index + 1)))
        return torch.cat(parts)

    lora = with_loras(twin(unet))
    lora.set_adapter(NAMES[0])

    with torch.no_grad(), prepared_apt(adapted):
        error = (mixed() - one_by_one()).abs().max().item()
        assert error < 1e-3, f"mixed batch and separate passes differ by {error}"
        return compare(
            {
                "APT, one adapter for all": shared,
                "APT, eight adapters": mixed,
                "APT, eight passes": one_by_one,
                "LoRA r4, one adapter for all": lambda: run(lora),
                "LoRA r4, eight adapters (PEFT)": lambda: run(lora, adapter_names=NAMES),
                "base model": lambda: run(unet),
            },
            rounds,
            "batch",
        )


def with_loras(unet: nn.Module) -> nn.Module:
    """A LoRA of each name, in a model that takes `adapter_names` for a batch."""
    from peft import get_peft_model

    model = get_peft_model(unet, lora_config(), NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, lora_config())
    return randomized(model, ".lora_").eval()


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--size", type=int, default=128, help="width and height of the batch's images")
    args = parser.parse_args()
    torch.manual_seed(0)
    unet, text_encoder = sd15_unet(args.device), sd15_text_encoder(args.device)
    groups = {
        "swap from memory": swap_results(unet, text_encoder, 3 * args.rounds),
        f"a batch of eight at {args.size} x {args.size}": batch_results(unet, args.rounds, args.device, args.size),
    }
    report("Switching", groups, args.output_dir, {})


if __name__ == "__main__":
    main()
