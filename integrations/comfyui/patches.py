"""Applies APT in ComfyUI: the correction of `apt_diffusion`'s forward hook, written as ComfyUI model patches.

ComfyUI calls the patches of a transformer block with one dict of options per call, so X can be kept there until the
attention has given its output. Several adapters add up: `Y = O + Σ λ_i (Y_i − O)`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apt_diffusion.equation import ApproximatedPrompt, FoldedPrompt, correct

Site = tuple[str, int, int]  # block, number of the block, number of the transformer in it
_QUERY, _OUTPUT = "apt_query", "apt_attn_output"


@dataclass
class Strength:
    """The strength λ of an adapter, for all steps or by ranges of sigma.

    Args:
        weight: of the adapter.
        ranges: `(first sigma, last sigma, factor)`; the strength is 0 outside of all ranges. `None`: always `weight`.
    """

    weight: float
    ranges: Sequence[tuple[float, float, float]] | None = None

    def at(self, options: dict[str, Any]) -> float:
        """λ in this call."""
        if self.ranges is None or "sigmas" not in options:
            return self.weight
        sigma = float(options["sigmas"].max())
        return self.weight * sum(factor for first, last, factor in self.ranges if last < sigma <= first)


@dataclass
class Correction:
    """One adapter at one attention: O and X to Y − O."""

    adapter: ApproximatedPrompt
    query_source: str | None
    _folded: dict[tuple, FoldedPrompt] = field(default_factory=dict)

    def __call__(self, attn_output: Tensor, hidden_states: Tensor, weight: float) -> Tensor:
        """`λ (Y − O)`, in the dtype and on the device of O."""
        query = attn_output if self.query_source == "attn_output" else hidden_states
        dtype = torch.promote_types(attn_output.dtype, torch.float32)
        key = (dtype, attn_output.device, weight)
        if key not in self._folded:
            folded = self.adapter.fold(dtype, weight)
            self._folded = {key: FoldedPrompt(*(tensor.to(attn_output.device) for tensor in folded))}
        own = attn_output.to(dtype)
        return correct(own, query.to(dtype), self._folded[key], self.adapter.activation) - own


class KeepInput:
    """An `attn2_patch`: keeps X for the output patch, and corrects the context where the adapter does that."""

    def __init__(self, context: dict[Site, Correction], strength: Strength) -> None:
        self.context = context
        self.strength = strength

    def __call__(self, n: Tensor, context: Tensor, value: Tensor | None, options: dict[str, Any]) -> tuple:
        """`(X, encoder states, values)` as the attention is to get them."""
        options[_QUERY] = n
        correction, weight = self.context.get(site_of(options)), self.strength.at(options)
        if correction is None or weight == 0:
            return n, context, value
        corrected = (context + correction(context, context, weight)).to(context.dtype)
        return n, corrected, corrected if value is context else value


class CorrectOutput:
    """An `attn2_output_patch`: O to Y."""

    def __init__(self, corrections: dict[Site, Correction], strength: Strength) -> None:
        self.corrections = corrections
        self.strength = strength

    def __call__(self, n: Tensor, options: dict[str, Any]) -> Tensor:
        """What the block adds to its residual."""
        attn_output = options.setdefault(_OUTPUT, n)  # before the first of several adapters
        correction, weight = self.corrections.get(site_of(options)), self.strength.at(options)
        if correction is None or weight == 0:
            return n
        return (n + correction(attn_output, options[_QUERY], weight)).to(n.dtype)


def site_of(options: dict[str, Any]) -> Site:
    """Where in the UNet a patch is called."""
    return (*options["block"], options["block_index"])


class CorrectedForward:
    """The forward of a text encoder's self-attention with adapters."""

    def __init__(self, original: Callable[..., Tensor], corrections: Sequence[tuple[Correction, float]]) -> None:
        self.original = original
        self.corrections = list(corrections)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The attention's output, corrected."""
        attn_output = self.original(x, *args, **kwargs)
        total = attn_output
        for correction, weight in self.corrections:
            total = total + correction(attn_output, x, weight)
        return total.to(attn_output.dtype)
