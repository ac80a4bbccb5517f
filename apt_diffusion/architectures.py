"""Where APT attaches, as data: one row per family of models, and the roles of a pipeline's components.

Classes are recognised by name along the MRO, so that nothing here imports diffusers or transformers, and subclasses of
a known model are known, too. `register_architecture` adds a row from outside.
"""

import dataclasses
from collections.abc import Mapping
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
    """

    child: str
    argument: str
    position: int | None = None
    output: int | None = 0


STREAMS = {
    "query": Stream("apt", "hidden_states", position=0),
    "context": Stream("apt_context", "encoder_hidden_states", output=None),
    "text": Stream("apt_text", "encoder_hidden_states", output=1),  # of joint attention
}
CHILDREN = tuple(stream.child for stream in STREAMS.values())


@dataclass(frozen=True)
class Architecture:
    """A family of models: the attention modules that APT corrects by default, and the default settings there.

    Args:
        model_classes: names of the model's classes, or of their base classes.
        target_modules: regular expression for the full names of the attention modules.
        init, query_source, streams: defaults of `APTConfig`.
        text_modules: regular expression for the modules whose attention is joint, with the text as second output;
            `None`: those that have a projection for it, `to_add_out` or `to_out_t`.
        idle_text: regular expression for modules whose text output nobody reads: the stream `"text"` leaves them out.
        bindings: streams whose arguments are named or placed differently in this family, by stream name.
    """

    model_classes: tuple[str, ...]
    target_modules: str
    init: str = "paper"
    query_source: str = "hidden_states"
    streams: tuple[str, ...] = ("query",)
    text_modules: str | None = None
    idle_text: str | None = None
    bindings: Mapping[str, Stream] = field(default_factory=dict)

    def stream(self, name: str) -> Stream:
        """The stream as this family has it."""
        return self.bindings.get(name, STREAMS[name])


ARCHITECTURES = [
    # Stable Diffusion: `identity`, so that adding an untrained adapter does not change one pixel. Who queries and what
    # is corrected was chosen by measurement: docs/miniature.md.
    Architecture(("UNet2DConditionModel",), r".*\.attn2", init="identity"),
    # AnimateDiff: the UNet's places, so that adapters of the UNet fit, without those of its motion modules.
    Architecture(("UNetMotionModel",), r"(?!.*\bmotion_modules\.).*\.attn2", init="identity"),
    Architecture(("CLIPTextModel", "CLIPTextModelWithProjection"), r".*\.self_attn", init="identity"),
    Architecture(("CLIPPreTrainedModel",), r".*\.self_attn"),
    Architecture(("ViltPreTrainedModel",), r".*encoder\.layer\.\d+\.attention"),
    Architecture(("MeterPreTrainedModel",), r".*cross_modal_(text|image)_layers\.\d+\.(attention|crossattention)"),
]
# Any other model: `target_modules` must be given, the rest is the paper's.
UNKNOWN_ARCHITECTURE = Architecture((), "")


def register_architecture(row: Architecture) -> None:
    """Makes APT know a family of models; for a class name that has a row already, the new one holds.

    Raises:
        ValueError: for a row without class names or places, or with unknown streams.
    """
    if not row.model_classes or not row.target_modules or isinstance(row.model_classes, str):
        raise ValueError(f"An Architecture needs a tuple of class names, and target_modules; got {row}.")
    unknown = {*row.streams, *row.bindings} - set(STREAMS)
    if unknown:
        raise ValueError(f"Unknown streams {sorted(unknown)} in {row}: there are {list(STREAMS)}.")
    APTConfig(init=row.init, query_source=row.query_source, target_modules=row.target_modules)
    ARCHITECTURES.insert(0, row)


def architecture_of(model: nn.Module) -> Architecture:
    """The row of the model's class, or of its nearest base class that has one."""
    for cls in type(model).__mro__:
        for row in ARCHITECTURES:
            if cls.__name__ in row.model_classes:
                return row
    return UNKNOWN_ARCHITECTURE


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
    defaults = {name: getattr(row, name) for name in ("init", "query_source", "streams", "target_modules")}
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


assert tuple(STREAMS) == STREAM_NAMES  # the config checks names without importing torch
