"""Adapters (arXiv 1902.00751): a bottleneck after every branch of a layer, before the residual."""

from collections.abc import Sequence

from torch import nn

from .families import family_of, layers_of
from .modules import Bottleneck
from .registry import Costs, Method, add_child
from .settings import BOTTLENECK, MODEL_CLASSES


class Adapter(Method):
    """`y = z + W_up relu(W_down z)` of the output z of each attention and feed-forward branch."""

    label = "adapter"
    settings = (BOTTLENECK,)
    model_classes = MODEL_CLASSES
    costs_per = "branch"

    def attach(self, model: nn.Module, bottleneck: int) -> list[str]:
        """Attaches behind the last linear map of every branch."""
        names = []
        for name, layer in layers_of(model):
            for output in family_of(model).outputs:
                linear = layer.get_submodule(output)
                adapter = Bottleneck(linear.out_features, bottleneck)
                add_child(linear, adapter)
                linear.register_forward_hook(adapter.after)
                names.append(f"{name}.{output}")
        return names

    def costs(self, hidden_size: int, tokens: Sequence[int], bottleneck: int = BOTTLENECK.default) -> Costs:
        """m (2db + b + d) parameters; Σ 2dbN."""
        d, b = hidden_size, bottleneck
        return Costs(len(tokens) * (2 * d * b + b + d), 2 * d * b * sum(tokens))
