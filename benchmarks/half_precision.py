#!/usr/bin/env python
"""Time of APT's correction in half precision, compared with the attention that it corrects.

    python benchmarks/half_precision.py --device cuda
    python benchmarks/half_precision.py --device cpu --dtypes bfloat16

One attention each of Flux.1 and Stable Diffusion 3.5 medium at 1024 x 1024 (joint attention over image and text) and
two of Stable Diffusion XL (cross-attention, guidance), with 200 prompts: the attention itself (its four linear layers
and the fused kernel), the step, the same in float32 throughout, and its two matrix products alone. On a GPU each is a
captured graph, so that launches do not count. Then what is kept for the backward pass, besides X and O.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _timing import Result, arguments, compare, report
from torch import Tensor, nn

from apt_diffusion import ApproximatedPrompt
from apt_diffusion.equation import correct


@dataclass(frozen=True)
class Shape:
    """One attention: batch, tokens, width, heads, and tokens of the context, if it has one."""

    name: str
    batch: int
    tokens: int
    width: int
    heads: int
    context: int | None = None


SHAPES = (
    Shape("Flux.1", 1, 4608, 3072, 24),
    Shape("SD 3.5 medium", 1, 4429, 1536, 24),
    Shape("SDXL, 64 x 64", 2, 4096, 640, 10, 77),
    Shape("SDXL, 32 x 32", 2, 1024, 1280, 20, 77),
)
PROMPTS = 200


def attention(shape: Shape, device: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Frozen linear layers around the fused kernel."""
    query, key, value, out = (
        nn.Linear(shape.width, shape.width, device=device, dtype=dtype).requires_grad_(False) for _ in range(4)
    )
    context = None
    if shape.context is not None:
        context = torch.randn(shape.batch, shape.context, shape.width, device=device, dtype=dtype)

    def run(states: Tensor) -> Tensor:
        other = states if context is None else context
        parts = ((query, states), (key, other), (value, other))
        q, k, v = (linear(x).unflatten(-1, (shape.heads, -1)).transpose(1, 2) for linear, x in parts)
        return out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return run


def in_float32(module: ApproximatedPrompt, output: Tensor, states: Tensor) -> Tensor:
    """The same step with float32 products, whatever the model's dtype is."""
    return correct(output, states, module.fold(torch.float32))


def products(module: ApproximatedPrompt, output: Tensor, states: Tensor) -> Tensor:
    """`X Kᵀ` and `A V` alone, in the model's dtype."""
    prompts = module.prompts.to(output.dtype)
    return (states @ prompts.mT) @ prompts


def variants(shape: Shape, device: str, dtype: torch.dtype, backward: bool) -> dict[str, Callable[[], object]]:
    """What is timed, the attention first."""
    torch.manual_seed(0)
    module = ApproximatedPrompt(shape.width, PROMPTS).to(device)
    output, states, cotangent = torch.randn(
        3, shape.batch, shape.tokens, shape.width, device=device, dtype=torch.float32
    ).to(dtype)
    attend = attention(shape, device, dtype)
    steps = {
        "attention": lambda: attend(states),
        "APT": lambda: module(output, states),
        "APT in float32": lambda: in_float32(module, output, states),
        "its products alone": lambda: products(module, output, states),
    }
    if not backward:
        return {name: captured(torch.no_grad()(step), device) for name, step in steps.items()}
    leaves = {
        "attention": [states],
        "its products alone": [states, module.prompts],
    }
    everything = [states, output, *module.parameters()]
    states.requires_grad_(), output.requires_grad_()
    return {
        name: captured(lambda s=step, n=name: torch.autograd.grad(s(), leaves.get(n, everything), cotangent), device)
        for name, step in steps.items()
    }


def captured(run: Callable[[], object], device: str) -> Callable[[], object]:
    """On a GPU, the replay of a graph."""
    if device != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def kept_mebibytes(shape: Shape, device: str, dtype: torch.dtype, step: Callable[..., Tensor]) -> float:
    """Storages saved for the backward pass that are neither X nor O."""
    module = ApproximatedPrompt(shape.width, PROMPTS).to(device)
    output, states = torch.zeros(2, shape.batch, shape.tokens, shape.width, device=device, dtype=dtype)
    output, states = output.clone().requires_grad_(), states.clone().requires_grad_()
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = step(module, output, states)
    exist = {tensor.untyped_storage().data_ptr() for tensor in (output, states)}
    assert result.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in exist) / 2**20


def main() -> None:
    parser = arguments(__doc__, rounds=40)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"], choices=["bfloat16", "float16"])
    args = parser.parse_args()
    groups: dict[str, list[Result]] = {}
    kept: dict[str, str] = {}
    for shape in SHAPES:
        for dtype in (getattr(torch, name) for name in args.dtypes):
            label = f"{shape.name}, {str(dtype).removeprefix('torch.')}"
            for backward in (False, True):
                name = f"{label}, {'forward and backward' if backward else 'forward'}"
                groups[name] = compare(variants(shape, args.device, dtype, backward), args.rounds, name)
            now = kept_mebibytes(shape, args.device, dtype, lambda module, output, states: module(output, states))
            before = kept_mebibytes(shape, args.device, dtype, in_float32)
            kept[f"MiB kept, {label}"] = f"{now:.1f}; in float32 {before:.1f}"
    report("Half precision", groups, args.output_dir, kept)


if __name__ == "__main__":
    main()
