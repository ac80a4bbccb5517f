"""A table of the modules that APT attaches to, one row per model family, and the roles of a pipeline's components.

A model is recognised by the class names along its MRO: nothing here imports diffusers or transformers, and subclasses
of a known model are recognised, too. `register_architecture` adds a row from other code.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from .config import STREAMS as STREAM_NAMES
from .config import APTConfig

# Roles of a pipeline's components. The denoisers draw the picture; an adapter is never put on text encoders alone
# without being called for.
DENOISERS = ("unet", "transformer", "transformer_2")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
COMPONENTS = (*DENOISERS, *TEXT_ENCODERS)


@dataclass(frozen=True)
class Stream:
    """One stream of an attention module that APT can correct.

    Args:
        child: name of the child module that holds the adapters of this stream.
        argument: the attention's parameter that is X.
        position: the parameter that is X where the forward has none of that name; `None` refuses such a module.
        output: which output is O, where a single tensor counts as the first; `None`: the argument itself is corrected
            before the attention runs.
        per_sample: whether the batch has one entry per sample, so that each may have an adapter of its own; not where
            the tokens of all samples stand in one row, or a picture is a batch of parts.
    """

    child: str
    argument: str
    position: int | None = None
    output: int | None = 0
    per_sample: bool = True


STREAMS = {
    "query": Stream("apt", "hidden_states", position=0),
    "context": Stream("apt_context", "encoder_hidden_states", output=None),
    "text": Stream("apt_text", "encoder_hidden_states", output=1),  # of joint attention
}
WHOLE_BATCH = {name: dataclasses.replace(stream, per_sample=False) for name, stream in STREAMS.items()}
CHILDREN = tuple(stream.child for stream in STREAMS.values())


@dataclass(frozen=True)
class Architecture:
    """A family of models: the attention modules that APT corrects by default, and the default settings there.

    Args:
        model_classes: names of the model's classes, or of their base classes.
        target_modules: regular expression for the full names of the attention modules; or a function that gives it for
            one model, where the configuration decides.
        init, query_source, streams: defaults of `APTConfig`.
        text_modules: regular expression for the modules whose attention is joint, with the text as second output;
            `None`: those that have a projection for it, `to_add_out` or `to_out_t`.
        last_text_is_idle: the last joint attention's text output is unused, so the stream `"text"` skips that module.
        bindings: streams whose arguments are named or placed differently in this family, by stream name.
        sees_pictures_only: the default places are in the part that reads pictures. A pipeline's text encoder of this
            family is left as it is by default, because it reads a prompt.
        takes_adapters_of: names of other classes in the table whose adapters fit here, because the places are theirs.
    """

    model_classes: tuple[str, ...]
    target_modules: str | Callable[[nn.Module], str]
    init: str = "paper"
    query_source: str = "hidden_states"
    streams: tuple[str, ...] = ("query",)
    text_modules: str | None = None
    last_text_is_idle: bool = False
    bindings: Mapping[str, Stream] = field(default_factory=dict)
    sees_pictures_only: bool = False
    takes_adapters_of: tuple[str, ...] = ()

    def stream(self, name: str) -> Stream:
        """The stream as this family has it."""
        return self.bindings.get(name, STREAMS[name])

    def places(self, model: nn.Module) -> str:
        """The regular expression of the default places in `model`."""
        return self.target_modules if isinstance(self.target_modules, str) else self.target_modules(model)


def llava_vision_places(model: nn.Module) -> str:
    """The attentions of a vision tower's layers up to the last one whose output LLaVA reads."""
    count, feature_layers = model.config.vision_config.num_hidden_layers, model.config.vision_feature_layer
    chosen = [feature_layers] if isinstance(feature_layers, int) else feature_layers
    # Hidden state 0 is the embeddings, so hidden state k is the output of layer k - 1.
    read = max(index if index >= 0 else count + 1 + index for index in chosen)
    layers = "|".join(str(index) for index in range(read))
    return rf".*vision_tower\.(.*\.)?layers\.({layers})\.(self_attn|attention)"


ARCHITECTURES = [
    # Stable Diffusion: `identity`, so that adding an untrained adapter does not change one pixel. Who queries and what
    # is corrected was chosen by measurement: docs/miniature.md.
    Architecture(("UNet2DConditionModel",), r".*\.attn2", init="identity"),
    # AnimateDiff: the UNet's places, so that adapters of the UNet fit, without those of its motion modules. The frames
    # of all films stand in one batch.
    Architecture(
        ("UNetMotionModel",),
        r"(?!.*\bmotion_modules\.).*\.attn2",
        init="identity",
        bindings=WHOLE_BATCH,
        takes_adapters_of=("UNet2DConditionModel",),
    ),
    Architecture(("CLIPTextModel", "CLIPTextModelWithProjection"), r".*\.self_attn", init="identity"),
    Architecture(("CLIPPreTrainedModel",), r".*\.self_attn"),
    Architecture(("ViltPreTrainedModel",), r".*encoder\.layer\.\d+\.attention"),
    Architecture(("MeterPreTrainedModel",), r".*cross_modal_(text|image)_layers\.\d+\.(attention|crossattention)"),
    # Vision and language. In text towers made as BERT is, the projection stands in one module with residual and norm:
    # what is corrected there is `self`, the attention before its projection.
    Architecture(("SiglipPreTrainedModel", "Siglip2PreTrainedModel"), r".*\.self_attn", init="identity"),
    Architecture(
        ("ChineseCLIPPreTrainedModel", "AltCLIPPreTrainedModel"), r".*\.(self_attn|attention\.self)", init="identity"
    ),
    Architecture(
        ("BlipPreTrainedModel", "BlipTextPreTrainedModel"),
        r".*\.(self_attn|attention\.self|crossattention\.self)",
        init="identity",
    ),
    Architecture(
        ("BlipModel",), r".*\.(self_attn|attention\.self)", init="identity"
    ),  # its text never sees the picture
    Architecture(  # picture and Q-Former, not the language model
        ("Blip2PreTrainedModel",),
        r"(?!.*\blanguage_model\.).*\.(self_attn|attention\.attention|crossattention\.attention)",
        init="identity",
    ),
    Architecture(
        ("ViTPreTrainedModel", "Dinov2PreTrainedModel", "Dinov2WithRegistersPreTrainedModel"),
        r".*layers?\.\d+\.attention",
        init="identity",
        sees_pictures_only=True,
    ),
    # The vision tower, not the language model.
    Architecture(("LlavaPreTrainedModel",), llava_vision_places, init="identity", sees_pictures_only=True),
    Architecture(
        ("LlavaNextPreTrainedModel",),
        llava_vision_places,
        init="identity",
        bindings=WHOLE_BATCH,
        sees_pictures_only=True,
        takes_adapters_of=("LlavaPreTrainedModel",),
    ),
    Architecture(
        ("Qwen2VLPreTrainedModel", "Qwen2_5_VLPreTrainedModel"),
        r"(.*\.)?blocks\.\d+\.attn",
        init="identity",
        bindings=WHOLE_BATCH,
        sees_pictures_only=True,
    ),
    # Diffusion transformers: the attention that the image takes part in, joint with the text or alone, before the gate
    # of the block's modulation. Refiners, and cross-attention to an un-normalised stream, are left out.
    Architecture(
        (
            "SD3Transformer2DModel", "FluxTransformer2DModel", "Flux2Transformer2DModel", "ChromaTransformer2DModel",
            "BriaTransformer2DModel", "OvisImageTransformer2DModel", "HunyuanImageTransformer2DModel",
        ),
        r"(single_)?transformer_blocks\.\d+\.attn", init="identity",
    ),
    Architecture(
        ("QwenImageTransformer2DModel",), r"transformer_blocks\.\d+\.attn", init="identity", last_text_is_idle=True
    ),
    Architecture(
        ("CogView4Transformer2DModel", "GlmImageTransformer2DModel"), r"transformer_blocks\.\d+\.attn1",
        init="identity", text_modules=r"transformer_blocks\.\d+\.attn1", last_text_is_idle=True,
    ),
    Architecture(("AuraFlowTransformer2DModel",), r"(joint|single)_transformer_blocks\.\d+\.attn", init="identity"),
    Architecture(
        ("HiDreamImageTransformer2DModel",), r"(double|single)_stream_blocks\.\d+\.block\.attn1", init="identity",
        text_modules=r"double_stream_blocks\.\d+\.block\.attn1",
        bindings={
            "query": Stream("apt", "norm_hidden_states", position=0),
            "text": Stream("apt_text", "norm_encoder_hidden_states", position=2, output=1),
        },
    ),
    Architecture(("ZImageTransformer2DModel",), r"layers\.\d+\.attention", init="identity"),
    Architecture(("Lumina2Transformer2DModel",), r"layers\.\d+\.attn", init="identity"),
    Architecture(
        ("PixArtTransformer2DModel", "SanaTransformer2DModel", "LTXVideoTransformer3DModel"),
        r"transformer_blocks\.\d+\.attn1", init="identity",
    ),
    Architecture(("HunyuanDiT2DModel", "WanTransformer3DModel"), r"blocks\.\d+\.attn1", init="identity"),
]  # fmt: skip
# Any other model: `target_modules` must be given, the rest is the paper's.
UNKNOWN_ARCHITECTURE = Architecture((), "")


def register_architecture(row: Architecture) -> None:
    """Makes APT know a family of models; a new row replaces an earlier one for the same class name.

    Raises:
        ValueError: for a row without class names or places, or with unknown streams.
    """
    if not row.model_classes or not row.target_modules or isinstance(row.model_classes, str):
        raise ValueError(f"An Architecture needs a tuple of class names, and target_modules; got {row}.")
    unknown = {*row.streams, *row.bindings} - set(STREAMS)
    if unknown:
        raise ValueError(f"Unknown streams {sorted(unknown)} in {row}: there are {list(STREAMS)}.")
    pattern = row.target_modules if isinstance(row.target_modules, str) else None
    APTConfig(init=row.init, query_source=row.query_source, target_modules=pattern)
    ARCHITECTURES.insert(0, row)


def architecture_of(model: nn.Module) -> Architecture:
    """The row of the model's class, or of its nearest base class that has one."""
    for cls in type(model).__mro__:
        for row in ARCHITECTURES:
            if cls.__name__ in row.model_classes:
                return row
    return UNKNOWN_ARCHITECTURE


def families_of(model: nn.Module) -> list[str]:
    """Names of the table that adapters of this model fit; none for an unknown model.

    A subclass has those of its base classes, too. Two models without a common one differ in what their attentions are.
    """
    known = {name for row in ARCHITECTURES for name in row.model_classes}
    own = [cls.__name__ for cls in type(model).__mro__ if cls.__name__ in known]
    return list(dict.fromkeys([*own, *architecture_of(model).takes_adapters_of]))


def is_known(model: nn.Module) -> bool:
    """Whether APT has default places in this model."""
    return architecture_of(model) is not UNKNOWN_ARCHITECTURE


def resolve_config(model: nn.Module, config: APTConfig) -> APTConfig:
    """`config` with the architecture's defaults in place of `None`."""
    row = architecture_of(model)
    if config.target_modules is None and not row.target_modules:
        raise ValueError(
            f"APT has no default places for {type(model).__name__}: name its attention modules in "
            "APTConfig(target_modules=[...]), for example ['self_attn']."
        )
    defaults = {name: getattr(row, name) for name in ("init", "query_source", "streams")}
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    if config.target_modules is None:
        missing["target_modules"] = row.places(model)
    return dataclasses.replace(config, **missing)


assert tuple(STREAMS) == STREAM_NAMES  # the config checks names without importing torch
