"""Modules that several of the compared methods add to a model: a bottleneck, and prompts as tokens.

The forward hooks are bound methods of these modules, so a deep copy or pickle of a model has hooks that use the copied
modules. Axes: B batch, N tokens, p prompts, d width, b bottleneck.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .registry import add_child


def make_prompts(num_prompts: int, hidden_size: int) -> nn.Parameter:
    """Uniform in ± sqrt(6 / (3·16·16 + 768)), as in the released code of both models."""
    bound = (6 / (3 * 16 * 16 + 768)) ** 0.5
    return nn.Parameter(torch.empty(num_prompts, hidden_size).uniform_(-bound, bound))


class Bottleneck(nn.Module):
    """`scale · W_up relu(W_down LN(x))`; the norm only where `scaled`.

    An adapter (arXiv 1902.00751) adds it to the output it is made from. A scaled parallel adapter (arXiv 2110.04366)
    adds it to a branch's output, made from the branch's input, with a norm of its own and the fixed scale 4.
    """

    def __init__(self, hidden_size: int, bottleneck: int, scaled: bool = False) -> None:
        """Weights from N(0, 0.02²), biases 0, as in the released code."""
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size) if scaled else nn.Identity()
        self.down = nn.Linear(hidden_size, bottleneck)
        self.up = nn.Linear(bottleneck, hidden_size)
        self.scale = 4.0 if scaled else 1.0
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self._input: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, N, d) -> (B, N, d)`: what is added to the output."""
        return self.scale * self.up(self.down(self.norm(hidden_states)).relu())

    def after(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook of the branch's last linear layer: an adapter."""
        return output + self(output)

    def parallel(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of an attention: a parallel adapter."""
        update = self(args[0] if args else kwargs["hidden_states"])
        return (output[0] + update, *output[1:]) if isinstance(output, tuple) else output + update

    def remember(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of an attention whose parallel adapter is added later: after the norm, as in METER."""
        self._input = args[0] if args else kwargs["hidden_states"]

    def after_norm(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook of that norm."""
        hidden_states, self._input = self._input, None
        return output + self(hidden_states)


class Prefix(nn.Module):
    """p learnable tokens before the others: of one attention (deep prompts), or of a whole encoder (shallow ones).

    Shallow prompts (arXiv 2104.08691) are carried through every layer and dropped at the end. Deep ones (arXiv
    2203.12119) are dropped behind their attention, because the next layer has prompts of its own. `norm`, the layer's
    own, is applied to them where it is applied to the tokens. In a cross-attention the
    prompts are added to the states that keys and values are made of.
    """

    def __init__(self, num_prompts: int, hidden_size: int, norm: nn.Module | None = None) -> None:
        """`norm` is a layer norm of the base model, `None` where prompts go through none."""
        super().__init__()
        self.prompts = make_prompts(num_prompts, hidden_size)
        self._norm = (norm,)  # in a tuple: it is the base model's, not a child of this module

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook of the attention or encoder: `(B, N, d) -> (B, p + N, d)`, all see the prompts."""
        arguments = named_arguments(module, args, kwargs)
        names = ("encoder_hidden_states", "inputs_embeds", "hidden_states")
        name = next(name for name in names if arguments.get(name) is not None)
        states, mask = arguments[name], arguments.get("attention_mask")
        prompts = self.prompts.to(states.dtype)
        if self._norm[0] is not None:
            prompts = self._norm[0](prompts)
        arguments[name] = torch.cat([prompts.expand(len(states), -1, -1), states], 1)
        if mask is not None:
            causal = bool(arguments.get("is_causal"))
            arguments["attention_mask"] = mask_with_prompts(mask, len(self.prompts), causal)
        return (), arguments

    def leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook of the same: the tokens' outputs alone."""
        count = len(self.prompts)
        if isinstance(output, tuple):
            return (output[0][:, count:], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, count:]
        return output


def add_prefix(module: nn.Module, prefix: Prefix, reads_others: bool = False) -> None:
    """Puts prompts before the tokens of an attention or encoder; `reads_others`: before the states that it reads."""
    add_child(module, prefix)
    module.register_forward_pre_hook(prefix.enter, with_kwargs=True)
    if not reads_others:  # else the prompts were never among the module's own tokens
        module.register_forward_hook(prefix.leave)


def named_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    arguments = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    return arguments | arguments.pop("kwargs", {})


def mask_with_prompts(mask: Tensor, count: int, causal: bool) -> Tensor:
    """`(..., R, N)` of tokens, additive or boolean, for `count` prompts before them, whom every token sees.

    Where the mask has a row per token (R = N), prompts get rows of their own: they see what the tokens see, or with
    `causal` only the prompts before them.
    """
    boolean = mask.dtype == torch.bool
    seen, hidden = (True, False) if boolean else (0.0, torch.finfo(mask.dtype).min)
    mask = torch.cat([mask.new_full((*mask.shape[:-1], count), seen), mask], -1)
    if mask.ndim < 4 or mask.shape[-2] == 1:
        return mask
    rows = mask[..., :1, :].expand(*mask.shape[:-2], count, -1)
    if causal:
        rows = torch.full_like(rows, hidden)
        earlier = torch.ones(count, count, dtype=torch.bool, device=mask.device).tril()
        rows[..., :count] = rows[..., :count].masked_fill(earlier, seen)
    return torch.cat([rows, mask], -2)
