"""Scaled parallel adapters (arXiv 2110.04366): a bottleneck that reads an attention's input."""

from collections.abc import Sequence

from torch import nn

from .families import family_of, layers_of
from .modules import Bottleneck
from .registry import Costs, Method, add_child
from .settings import BOTTLENECK, MODEL_CLASSES


class ScaledParallelAdapter(Method):
    """`4 W_up relu(W_down LN(x))` of an attention's input x joins its output; in METER behind the residual's norm."""

    label = "scaled parallel adapter"
    settings = (BOTTLENECK,)
    model_classes = MODEL_CLASSES

    def attach(self, model: nn.Module, bottleneck: int) -> list[str]:
        """Attaches to every attention of the family."""
        names = []
        for name, layer in layers_of(model):
            for branch in family_of(model).parallel:
                attention = layer.get_submodule(branch.attention)
                adapter = Bottleneck(branch.width(layer), bottleneck, scaled=True)
                add_child(attention, adapter)
                if branch.later_norm is None:
                    attention.register_forward_hook(adapter.parallel, with_kwargs=True)
                else:
                    attention.register_forward_pre_hook(adapter.remember, with_kwargs=True)
                    layer.get_submodule(branch.later_norm).register_forward_hook(adapter.after_norm)
                names.append(f"{name}.{branch.attention}")
        return names

    def costs(self, hidden_size: int, tokens: Sequence[int], bottleneck: int = BOTTLENECK.default) -> Costs:
        """m (2db + b + d + 2d) parameters; Σ (2dbN + 5dN), of which 5dN are the norm's."""
        d, b = hidden_size, bottleneck
        return Costs(len(tokens) * (2 * d * b + b + 3 * d), (2 * d * b + 5 * d) * sum(tokens))
