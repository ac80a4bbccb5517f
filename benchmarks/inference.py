#!/usr/bin/env python
"""Time of a forward pass with an attached adapter, compared with the base model and with an unmerged LoRA.

    python benchmarks/inference.py

Stable Diffusion 1.5's UNet (random weights, 256 x 256 pictures, guidance: two samples), and ViLT-B/32 at 241 tokens
with 200 prompts beside deep prompts of the same number. Then how one attention's extra time grows with prompts and
tokens, as a ratio to the closed form of `apt_diffusion.costs`.
"""

import torch
from _models import randomized, sd15_unet, twin, vilt_b32, with_lora
from _timing import Result, arguments, compare, report
from torch import Tensor, nn

from apt_diffusion import ApproximatedPrompt, APTConfig, add_apt, prepared_apt
from apt_diffusion.baselines import MethodConfig, add_method
from apt_diffusion.costs import count_costs
from apt_diffusion.models.vilt import use_sdpa


def unet_results(rounds: int, device: str) -> list[Result]:
    base = sd15_unet(device)
    adapted = twin(base)
    add_apt(adapted)
    lora = randomized(with_lora(twin(base)), "lora_")
    randomized(adapted, ".apt")
    sample, context = torch.randn(2, 4, 32, 32, device=device), torch.randn(2, 77, 768, device=device)

    def run(unet: nn.Module) -> Tensor:
        return unet(sample, 500, encoder_hidden_states=context).sample

    with torch.no_grad(), prepared_apt(adapted):
        models = {"base": base, "APT": adapted, "LoRA r4, unmerged": lora}
        return compare({name: lambda unet=unet: run(unet) for name, unet in models.items()}, rounds, "UNet")


def vilt_results(rounds: int, device: str, num_prompts: int = 200) -> list[Result]:
    base = vilt_b32(device)
    adapted = twin(base)
    add_apt(adapted, APTConfig(num_prompts=num_prompts))
    randomized(adapted, ".apt.")
    fused = twin(adapted)
    use_sdpa(fused)
    prompted = twin(base)
    add_method(prompted, MethodConfig("deep_prompt", num_prompts=num_prompts))
    tokens, patches = torch.randint(1, 1000, (1, 40), device=device), torch.randn(1, 201, 768, device=device)
    mask = torch.ones(1, 201, dtype=torch.long, device=device)

    def run(model: nn.Module) -> Tensor:
        return model(input_ids=tokens, image_embeds=patches, pixel_mask=mask).pooler_output

    models = {
        "base": base,
        f"APT, {num_prompts} prompts": adapted,
        "the same, fused attention": fused,
        f"deep prompts, {num_prompts}": prompted,
    }
    with torch.no_grad(), prepared_apt(adapted), prepared_apt(fused):
        return compare({name: lambda model=model: run(model) for name, model in models.items()}, rounds, "ViLT")


def growth(rounds: int, device: str, width: int = 768) -> str:
    """One attention of this width: what APT and deep prompts add to it, in time and in multiply-accumulates."""
    lines = ["| prompts | tokens | APT ms | deep prompts ms | APT / deep | APT MAC / deep MAC |", "|---" * 6 + "|"]
    projections = nn.ModuleList(nn.Linear(width, width) for _ in range(3)).to(device)
    for num_prompts, num_tokens in [(p, 256) for p in (16, 50, 200, 800)] + [(200, n) for n in (64, 1024, 4096)]:
        tokens, prompts = (torch.randn(1, n, width, device=device) for n in (num_tokens, num_prompts))
        ours, theirs = extra_times(projections, tokens, prompts, rounds)
        sizes = {"hidden_size": width, "num_tokens": num_tokens, "num_modules": 1, "num_prompts": num_prompts}
        macs = count_costs("apt", **sizes).macs / count_costs("deep_prompt", **sizes).macs
        lines.append(
            f"| {num_prompts} | {num_tokens} | {1000 * ours:.2f} | {1000 * theirs:.2f} "
            f"| {ours / theirs:.2f} | {macs:.2f} |"
        )
    return "\n".join(lines)


@torch.no_grad()
def extra_times(projections: nn.ModuleList, tokens: Tensor, prompts: Tensor, rounds: int) -> tuple[float, float]:
    """Seconds that `(APT, deep prompts)` add to an attention over `tokens`."""
    adapter = ApproximatedPrompt(tokens.shape[-1], prompts.shape[1]).to(tokens.device)

    def attention(extra: Tensor) -> Tensor:
        states = torch.cat([tokens, extra], 1)
        query, key, value = (layer(states).unflatten(-1, (12, -1)).transpose(1, 2) for layer in projections)
        return nn.functional.scaled_dot_product_attention(query[:, :, : tokens.shape[1]], key, value)

    base, prompted, ours = compare(
        {
            "attention": lambda: attention(prompts[:, :0]),
            "deep prompts": lambda: attention(prompts),
            "APT": lambda: adapter(tokens, tokens),
        },
        rounds,
        f"{prompts.shape[1]} prompts, {tokens.shape[1]} tokens",
    )
    return ours.median, max(prompted.median - base.median, 1e-9)


def main() -> None:
    args = arguments(__doc__, rounds=9).parse_args()
    torch.manual_seed(0)
    groups = {
        "SD 1.5 UNet, default adapter": unet_results(args.rounds, args.device),
        "ViLT-B/32, 241 tokens": vilt_results(3 * args.rounds, args.device),
    }
    table = growth(3 * args.rounds, args.device)
    report("Inference", groups, args.output_dir, {"Growth with prompts and tokens, width 768": f"\n\n{table}"})


if __name__ == "__main__":
    main()
