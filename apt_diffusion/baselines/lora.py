"""LoRA (arXiv 2106.09685) on query and value maps, by PEFT."""

import importlib.util
from collections.abc import Sequence

from torch import nn

from .families import family_of, layers_of
from .registry import Costs, Method
from .settings import MODEL_CLASSES, RANK


class Lora(Method):
    """PEFT's, with its scale at 1 as in the released code."""

    label = "LoRA"
    settings = (RANK,)
    model_classes = MODEL_CLASSES
    costs_note = "merged"

    def check_model(self, model: nn.Module) -> None:
        """Also `ImportError` without PEFT, and `ValueError` for a model with another adapter of PEFT's."""
        super().check_model(model)
        if importlib.util.find_spec("peft") is None:
            raise ImportError("The method 'lora' needs PEFT: `pip install peft`.")
        if hasattr(model, "peft_config"):
            raise ValueError(f"{type(model).__name__} has an adapter of PEFT's already: take it off first.")

    def attach(self, model: nn.Module, rank: int) -> list[str]:
        """Wraps the query and value map of every attention of the family."""
        from peft import LoraConfig, inject_adapter_in_model

        names = [f"{name}.{path}" for name, _ in layers_of(model) for path in family_of(model).lora]
        frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model)
        for parameter in model.parameters():  # PEFT has frozen the base, which is for `freeze_for_method` to do
            parameter.requires_grad_(id(parameter) not in frozen)
        return names

    def detach(self, model: nn.Module) -> None:
        """Puts the wrapped maps back into their places."""
        from peft.tuners.lora import LoraLayer

        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Both matrices of every wrapped map."""
        return [(name, p) for name, p in model.named_parameters() if "lora_" in name]

    def costs(self, hidden_size: int, tokens: Sequence[int], rank: int = RANK.default, merged: bool = True) -> Costs:
        """4mdr parameters for query and value; nothing per pass once merged into the weights, else Σ 4drN."""
        d, r = hidden_size, rank
        return Costs(len(tokens) * 4 * d * r, 0 if merged else 4 * d * r * sum(tokens))
