"""Shallow prompts (arXiv 2104.08691): learnable tokens at the input of the first layer, carried through all layers."""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .families import family_of, layers_of
from .modules import Prefix, add_prefix, make_prompts
from .registry import Costs, Method, add_child
from .settings import MODEL_CLASSES, NUM_PROMPTS


class ShallowPrompt(Method):
    """p learnable tokens before those of each encoder; in METER behind those of its two stacks."""

    label = "shallow prompts"
    settings = (NUM_PROMPTS,)
    model_classes = MODEL_CLASSES
    learning_rates = (1e-3, 2e-3)  # slow, and best with the highest
    costs_per = "layer"

    def attach(self, model: nn.Module, num_prompts: int) -> list[str]:
        """Attaches to every encoder of the family."""
        family, layers = family_of(model), list(layers_of(model))
        if family.encoders is None:
            return self._attach_to_meter(model, layers, num_prompts)
        encoders = {name: module for name, module in model.named_modules() if re.fullmatch(family.encoders, name)}
        for name, encoder in encoders.items():
            first = next(layer for layer_name, layer in layers if layer_name.startswith(f"{name}."))
            add_prefix(encoder, Prefix(num_prompts, family.prompted[0].width(first)))
        return list(encoders)

    @staticmethod
    def _attach_to_meter(model: nn.Module, layers: list[tuple[str, nn.Module]], num_prompts: int) -> list[str]:
        stacks = {kind: [layer for name, layer in layers if f"_{kind}_" in name] for kind in ("text", "image")}
        prompt = MeterShallowPrompt(num_prompts, family_of(model).parallel[0].width(stacks["text"][0]))
        add_child(model, prompt)
        stacks["text"][0].register_forward_pre_hook(prompt.enter_text)
        stacks["image"][0].register_forward_pre_hook(prompt.enter_image)
        for stack in stacks.values():
            for layer in stack:
                layer.register_forward_pre_hook(prompt.open_masks)
            stack[-1].register_forward_hook(prompt.leave)
        return [name for name, _ in layers]

    def costs(self, hidden_size: int, tokens: Sequence[int], num_prompts: int = NUM_PROMPTS.default) -> Costs:
        """pd parameters; Σ (12pd² + 2d((N + p)² - N²)) over whole transformer layers."""
        d, p = hidden_size, num_prompts
        return Costs(p * d, len(tokens) * 12 * p * d**2 + sum(2 * d * ((n + p) ** 2 - n**2) for n in tokens))


class MeterShallowPrompt(nn.Module):
    """Shallow prompts of METER's two stacks: after the tokens, so that the poolers read what they always read."""

    def __init__(self, num_prompts: int, hidden_size: int) -> None:
        """p prompts for each of the two stacks."""
        super().__init__()
        self.text_prompts = make_prompts(num_prompts, hidden_size)
        self.image_prompts = make_prompts(num_prompts, hidden_size)

    def enter_text(self, layer: nn.Module, args: tuple) -> tuple:
        """Forward pre-hook of the first text layer."""
        return (self._append(args[0], self.text_prompts), self._append(args[1], self.image_prompts), *args[2:])

    def enter_image(self, layer: nn.Module, args: tuple) -> tuple:
        """Forward pre-hook of the first image layer."""
        return (self._append(args[0], self.image_prompts), self._append(args[1], self.text_prompts), *args[2:])

    def open_masks(self, layer: nn.Module, args: tuple) -> tuple:
        """Forward pre-hook of every layer, after the two above."""
        masks = [None if mask is None else self._open(mask) for mask in args[2:4]]
        return (*args[:2], *masks, *args[4:])

    def leave(self, layer: nn.Module, args: tuple, output: tuple) -> tuple:
        """Forward hook of the last layers."""
        return (output[0][:, : -len(self.text_prompts)], *output[1:])

    @staticmethod
    def _append(states: Tensor, prompts: Tensor) -> Tensor:
        return torch.cat([states, prompts.to(states.dtype).expand(len(states), -1, -1)], 1)

    def _open(self, mask: Tensor) -> Tensor:
        return F.pad(mask.float(), (0, len(self.text_prompts)), value=1.0).bool()
