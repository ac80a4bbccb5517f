"""Deep prompts (arXiv 2203.12119): every attention has prompts of its own among its keys and values."""

from collections.abc import Sequence

from torch import nn

from .families import family_of, layers_of
from .modules import Prefix, add_prefix
from .registry import Costs, Method
from .settings import MODEL_CLASSES, NUM_PROMPTS


class DeepPrompt(Method):
    """p learnable tokens before those of each attention, dropped behind it."""

    label = "deep prompts"
    settings = (NUM_PROMPTS,)
    model_classes = MODEL_CLASSES
    learning_rates = (1e-3, 2e-3)  # slow, and best with the highest

    def attach(self, model: nn.Module, num_prompts: int) -> list[str]:
        """Attaches to every attention of the family; in METER to cross-attentions alone, as released."""
        names = []
        for name, layer in layers_of(model):
            for branch in family_of(model).prompted:
                norm = layer.get_submodule(branch.prompt_norm) if branch.prompt_norm else None
                prefix = Prefix(num_prompts, branch.width(layer), norm)
                add_prefix(layer.get_submodule(branch.attention), prefix, branch.reads_others)
                names.append(f"{name}.{branch.attention}")
        return names

    def costs(self, hidden_size: int, tokens: Sequence[int], num_prompts: int = NUM_PROMPTS.default) -> Costs:
        """m pd parameters; Σ (3pd² + 2Npd), where prompts are keys, values and queries (ViLT)."""
        m, d, p = len(tokens), hidden_size, num_prompts
        return Costs(m * p * d, m * 3 * p * d**2 + 2 * p * d * sum(tokens))
