"""Where the compared methods attach: one row per family of models, names relative to a transformer layer."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..places import matches


@dataclass(frozen=True)
class Branch:
    """One attention of a layer, as prompts and parallel adapters need it."""

    attention: str
    key: str  # its key map, which has the width
    reads_others: bool = False  # whether its keys and values are other states than its own
    prompt_norm: str | None = None  # the layer's norm before this attention, which prompts go through, too
    later_norm: str | None = None  # a norm after the residual, behind which METER adds its parallel adapter

    def width(self, layer: nn.Module) -> int:
        """The width d of the attention's tokens in a `layer`."""
        return layer.get_submodule(self.key).in_features


@dataclass(frozen=True)
class Family:
    """A family of models, recognised by the name of a base class."""

    model_class: str
    layers: str  # regular expression for the layers' full names
    outputs: tuple[str, ...]  # last linear maps of the layer's branches: adapters come after each
    prompted: tuple[Branch, ...]  # where deep prompts go
    parallel: tuple[Branch, ...]  # where parallel adapters go
    encoders: str | None  # regular expression for what shallow prompts are carried through; `None`: METER's two stacks
    lora: tuple[str, ...]  # query and value maps
    trained: tuple[str, ...] = ()  # with every method: the released code's choice, where the model has it
    frozen: tuple[str, ...] = ()  # suffixes of full names that are not, although the last part of the name is


_VILT = Branch("attention", "attention.attention.key", prompt_norm="layernorm_before")
_CLIP = Branch("self_attn", "self_attn.k_proj", prompt_norm="layer_norm1")
_OWN = Branch("attention", "attention.key", later_norm="attention_layer_norm")
_CROSS = Branch("crossattention", "crossattention.key", True, later_norm="crossattention_layer_norm")
_HEADS = ("classifier", "pooler", "token_type_embeddings", "rank_output")

FAMILIES = (
    Family(
        "ViltPreTrainedModel",
        r"(.*\.)?encoder\.layer\.\d+",
        ("attention.output.dense", "output.dense"),
        (_VILT,),
        (_VILT,),
        r"(.*\.)?encoder",
        ("attention.attention.query", "attention.attention.value"),
        (*_HEADS, "classifier_token"),  # BERT's table of segments, too: its name matches
    ),
    Family(
        "MeterPreTrainedModel",
        r"(.*\.)?cross_modal_(text|image)_layers\.\d+",
        ("attention.dense", "crossattention.dense", "output"),
        (_CROSS,),  # released code: the other stack's states get the prompts, self-attention is left alone
        (_OWN, _CROSS),
        None,
        ("attention.query", "attention.value", "crossattention.query", "crossattention.value"),
        (*_HEADS, "cross_modal_text_pooler", "cross_modal_image_pooler", "classifier_token"),
        ("text_model.embeddings.token_type_embeddings",),
    ),
    Family(
        "CLIPPreTrainedModel",
        r"(.*\.)?encoder\.layers\.\d+",
        ("self_attn.out_proj", "mlp.fc2"),
        (_CLIP,),
        (_CLIP,),
        r"(.*\.)?encoder",
        ("self_attn.q_proj", "self_attn.v_proj"),
        ("classifier",),  # see clip_classifier.add_linear_classifier
    ),
)


def trained_beside(model: nn.Module) -> tuple[str, ...]:
    """Full names of the modules and parameters that the released code trains with every method; none elsewhere."""
    family = next((row for row in FAMILIES if _is_of(model, row)), None)
    if family is None:
        return ()
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    return tuple(
        name for name in names if name.rpartition(".")[2] in family.trained and not matches(name, family.frozen)
    )


def family_of(model: nn.Module) -> Family:
    """The model's row; `ValueError` where it has none."""
    for family in FAMILIES:
        if _is_of(model, family):
            return family
    known = ", ".join(family.model_class.removesuffix("PreTrainedModel") for family in FAMILIES)
    raise ValueError(f"The compared methods are made for {known}, not for {type(model).__name__}.")


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`(full name, module)` of each transformer layer that the model's family names."""
    pattern = family_of(model).layers
    return ((name, module) for name, module in model.named_modules() if re.fullmatch(pattern, name))


def _is_of(model: nn.Module, family: Family) -> bool:
    return family.model_class in {cls.__name__ for cls in type(model).__mro__}
