"""Maps of where APT acts: records every token's gate w = max_p A while a model runs, and overlays it on a picture."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..components import components_of
from ..equation import FoldedPrompt
from ..model import named_cores
from ..processor import APTProcessorCore

COLOR_MAP = "inferno"
OPACITY = 0.6

# Attention module -> its gates, one `(B, N)` per call.
Record = dict[str, list[Tensor]]


@contextlib.contextmanager
def recorded_gates(model: Any) -> Iterator[Record]:
    """Context manager: records the gate of each token in every call of an adapted attention module.

    With several active adapters, the sum of their gates times their weights. Corrections of the text stream of a
    UNet (`apt_context`) are not noted.
    """
    record: Record = defaultdict(list)
    handles = []
    for part, component in components_of(model).items():
        for name, core in named_cores(component):
            if name.endswith(".apt"):
                place = f"{part}.{name}".strip(".").removesuffix(".apt")
                handles.append(core.register_forward_pre_hook(_note(record[place])))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _note(calls: list[Tensor]) -> Any:
    def hook(core: APTProcessorCore, args: tuple[Tensor, Tensor]) -> None:
        attn_output, hidden_states = args
        total = torch.zeros(attn_output.shape[:2])
        for name, weight in core.weights.items():
            query = hidden_states if core.query_sources[name] == "hidden_states" else attn_output
            adapter = core.adapters[name]
            gate = gate_of(query.detach(), adapter.fold(torch.float32), adapter.activation)
            total += abs(weight * core.scale) * gate.cpu()
        calls.append(total)

    return hook


@torch.no_grad()
def gate_of(query: Tensor, folded: FoldedPrompt, activation: str) -> Tensor:
    """`w = max_p A`, `(B, N, d) -> (B, N)`."""
    affinity = query.float() @ folded.keys.mT  # X Kᵀ  (B, N, p)
    affinity = affinity.relu() if activation == "relu" else affinity.softmax(-1)
    return affinity.amax(-1)


def step_maps(record: Record, size: tuple[int, int]) -> Tensor:
    """What a UNet's cross-attention noted while it drew one picture: a map per denoising step, `(steps, h, w)`."""
    height, width = size
    maps = []
    for calls in record.values():
        gates = torch.stack([call[-1] for call in calls])  # (steps, N); the last sample of guidance has the prompt
        rows = round(math.sqrt(gates.shape[1] * height / width))
        maps.append(gates.reshape(len(calls), rows, -1))
    return mean_map(maps, size)


def mean_map(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """The mean of several maps `(..., h, w)` at the resolution `size`, each divided by its own largest value first,
    so that attention modules of different widths count alike. In [0, 1]."""
    total = torch.zeros(*maps[0].shape[:-2], *size)
    for values in maps:
        flat = values.reshape(-1, 1, *values.shape[-2:])
        total += (F.interpolate(flat, size, mode="nearest") / values.max().clamp(min=1e-12)).reshape(total.shape)
    return total / len(maps)


def stretched(maps: Tensor) -> Tensor:
    """From 0, the least of all, to 1, the most: what is compared is shown in one scale."""
    least, most = maps.min(), maps.max()
    return (maps - least) / (most - least).clamp(min=1e-12)


def colors(values: np.ndarray) -> np.ndarray:
    """A map `(h, w)` in [0, 1] as colours, dark to bright: `(h, w, 3)` bytes."""
    import matplotlib

    return (matplotlib.colormaps[COLOR_MAP](np.clip(values, 0, 1))[..., :3] * 255).round().astype(np.uint8)


def overlay(picture: Image.Image, values: np.ndarray, least_side: int = 256) -> Image.Image:
    """The picture in gray, under a map `(h, w)` in [0, 1] as colours."""
    scale = max(1, -(-least_side // min(picture.size)))
    size = (picture.width * scale, picture.height * scale)
    gray = picture.convert("L").convert("RGB").resize(size, Image.Resampling.NEAREST)
    return Image.blend(gray, Image.fromarray(colors(values)).resize(size, Image.Resampling.NEAREST), OPACITY)
