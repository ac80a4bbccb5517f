"""APT as a PEFT tuner: after `import apt_diffusion.peft`, PEFT's own functions take an [`APTTunerConfig`].

    import apt_diffusion.peft
    from peft import get_peft_model

    model = get_peft_model(model, apt_diffusion.peft.APTTunerConfig(num_prompts=50))

`PeftModel.from_pretrained`, diffusers' `unet.add_adapter` and transformers' `model.add_adapter` work likewise; import
this module before a saved adapter is loaded. `apt_diffusion.convert.peft` converts between PEFT's folder and the file
of `save_apt_weights`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from .architectures import STREAMS, resolve_config
from .config import APTConfig
from .equation import ApproximatedPrompt, correct
from .io.names import common_prefix
from .places import Place, places_at

PEFT_PREFIX = "base_model.model."  # of every tensor's name in PEFT's file

# Names of the streams' adapters in a layer, by the name of the child that holds them elsewhere. They begin with the
# tuner's prefix, as LoRA's `lora_A` does.
ATTRIBUTES = {stream.child: f"apt_{name}" for name, stream in STREAMS.items()}
_QUERY, _CONTEXT, _TEXT = (STREAMS[name].child for name in ("query", "context", "text"))
MERGE_REFUSED = (
    "An APT adapter cannot be merged into the base model: its update depends on the attention's input by more than a "
    "matrix product, so no weights of the base have its effect. Keep the adapter, or call unload() for the base model."
)
_APT_FIELDS = (
    "num_prompts", "rank", "activation", "dropout", "init", "query_source", "streams", "num_prompts_pattern",
    "rank_pattern",
)  # fmt: skip


def _add_peft_type() -> None:
    """Adds the member `APT` to PEFT's closed enum of tuners, which has no function for it."""
    if "APT" in PeftType.__members__:
        return
    member = str.__new__(PeftType, "APT")
    member._name_, member._value_ = "APT", "APT"
    PeftType._member_map_["APT"] = member
    PeftType._member_names_.append("APT")
    PeftType._value2member_map_["APT"] = member


@dataclass
class APTTunerConfig(PeftConfig):
    """Settings of an APT adapter in PEFT's form.

    Args:
        target_modules: name suffixes of the attention modules, or one regular expression for full names; the defaults
            of `add_apt` for the model's architecture if `None`.
        exclude_modules: suffixes, or one regular expression, of modules to leave out.
        num_prompts, rank, activation, dropout, init, query_source, streams, num_prompts_pattern, rank_pattern: as in
            [`apt_diffusion.APTConfig`].
        modules_to_save: name suffixes of modules (heads) that are trained and saved beside the adapter.
        layers_to_transform: numbers of the layers to adapt; all if `None`.
        layers_pattern: name of the list of layers, for `layers_to_transform`.

    Raises:
        ValueError: for a value outside of these, naming it.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    num_prompts: int = 200
    rank: int = 4
    activation: str = "relu"
    dropout: float = 0.0
    init: str | None = None
    query_source: str | None = None
    streams: list[str] | None = None
    num_prompts_pattern: dict[str, int] | None = None
    rank_pattern: dict[str, int] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["APT"]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list | tuple):
                setattr(self, name, set(value))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: the numbers of the layers to adapt.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform works with a list of target_modules, not with an expression.")
        self.to_apt_config()

    def to_apt_config(self) -> APTConfig:
        """The same settings as an `APTConfig`, without `modules_to_save`, which PEFT handles itself."""
        targets = self.target_modules
        settings = {name: getattr(self, name) for name in _APT_FIELDS}
        return APTConfig(
            target_modules=targets if isinstance(targets, str | None) else tuple(sorted(targets)), **settings
        )


class APTLayer(nn.Module, BaseTunerLayer):
    """An attention module and the APT adapters that correct its output.

    Args:
        base_layer: the attention module.
    """

    adapter_layer_names = tuple(ATTRIBUTES.values())
    other_param_names = ("scaling",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        for attribute in ATTRIBUTES.values():
            setattr(self, attribute, nn.ModuleDict())
        self.places: dict[str, Place] = {}
        self.query_sources: dict[str, str | None] = {}
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: APTConfig, places: list[Place]) -> None:
        """Adds an adapter: one [`ApproximatedPrompt`] for each stream in `places`."""
        settings = {name: getattr(config, name) for name in ("num_prompts", "rank", "activation", "dropout", "init")}
        for place in places:
            getattr(self, ATTRIBUTES[place.child])[adapter_name] = ApproximatedPrompt(place.width, **settings)
            self.places[place.child] = place
        self.query_sources[adapter_name] = config.query_source
        self.scaling[adapter_name] = 1.0
        self.set_adapter(self.active_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The attention's forward with the active adapters: `Y = O + Σ λ_i (Y_i − O)`."""
        if self.disable_adapters:
            return self.base_layer(*args, **kwargs)
        context = self.places.get(_CONTEXT)
        if context is not None and (states := context.binding.get(args, kwargs)) is not None:
            args, kwargs = context.binding.replace(args, kwargs, self._corrected(_CONTEXT, states, states))
        output = self.base_layer(*args, **kwargs)
        outputs = list(output) if isinstance(output, tuple) else [output]
        for child in (_QUERY, _TEXT):
            if child in self.places:
                binding = self.places[child].binding
                states, place = binding.get(args, kwargs), binding.output or 0
                if states is not None and len(outputs) > place and outputs[place] is not None:
                    outputs[place] = self._corrected(child, outputs[place], states)
        return tuple(outputs) if isinstance(output, tuple) else outputs[0]

    def _corrected(self, child: str, attn_output: Tensor, hidden_states: Tensor) -> Tensor:
        adapters = getattr(self, ATTRIBUTES[child])
        corrected = attn_output
        for name in self.active_adapters:
            if name not in adapters or self.scaling[name] == 0:
                continue
            from_input = child == _CONTEXT or self.query_sources[name] == "hidden_states"
            query = hidden_states if from_input else attn_output
            output = _correct(adapters[name], attn_output, query, self.scaling[name])
            corrected = output if corrected is attn_output else corrected + (output - attn_output)
        return corrected

    def set_scale(self, adapter: str, scale: float) -> None:
        """The weight λ of one adapter, as diffusers' `set_adapters` calls it."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the weights of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undoes `scale_layer(scale)`; `None` sets the weights to 1."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises `ValueError`: there is nothing to merge into."""
        raise ValueError(MERGE_REFUSED)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the attention module: code around it reads `heads`, `processor` and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not there yet
                raise
            return getattr(self.base_layer, name)


def _correct(adapter: ApproximatedPrompt, attn_output: Tensor, query: Tensor, weight: float) -> Tensor:
    with torch.autocast(attn_output.device.type, enabled=False):
        folded = adapter.fold(attn_output.dtype, weight)
        return correct(attn_output, query, folded, adapter.activation, adapter.active_dropout)


class APTModel(BaseTuner):
    """PEFT's tuner for APT: puts an [`APTLayer`] in the place of every targeted attention module."""

    prefix = "apt_"
    tuner_layer_cls = APTLayer

    def _pre_injection_hook(self, model: nn.Module, config: APTTunerConfig, adapter_name: str) -> None:
        resolve(model, config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, after all that can fail was checked: no module is replaced where one cannot be adapted."""
        config = self.peft_config[adapter_name]
        resolve(model, config)
        for name, module in model.named_modules():
            if not isinstance(module, APTLayer) and self._check_target_module_exists(config, name) is True:
                places_at(model, name, module, config.to_apt_config().streams)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: APTTunerConfig, model_config: dict) -> APTTunerConfig:
        return peft_config  # `resolve` has done it, from the model itself

    def _create_and_replace(
        self,
        config: APTTunerConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional: Any,
    ) -> None:
        layer = target if isinstance(target, APTLayer) else APTLayer(target)
        settings = config.to_apt_config()
        places = places_at(self.model, current_key, layer.base_layer, settings.streams or ())
        layer.update_layer(adapter_name, settings.at(current_key), places)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        if adapter_name not in self.active_adapters:
            for attribute in ATTRIBUTES.values():  # another adapter is not trainable until it is active
                if adapter_name in (adapters := getattr(layer, attribute)):
                    adapters[adapter_name].requires_grad_(False)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, APTLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # the attention comes back; it has no single weight that PEFT could hand over
            setattr(parent, child_name, new_module)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: APTTunerConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # A file of ours has no `vision_model.` (or `text_model.`) where every name has it in the model.
        layers = [name.removeprefix(PEFT_PREFIX) for name, part in model.named_modules() if isinstance(part, APTLayer)]
        segment = common_prefix(layers)
        if segment:
            rest = [key.removeprefix(PEFT_PREFIX) for key in state_dict]
            known = tuple(f"{name.removeprefix(segment)}." for name in layers)
            named = [f"{PEFT_PREFIX}{segment}{key}" if key.startswith(known) else PEFT_PREFIX + key for key in rest]
            state_dict = dict(zip(named, state_dict.values(), strict=True))
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_REFUSED)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Always raises `ValueError`: there is nothing to merge into."""
        raise ValueError(MERGE_REFUSED)


def resolve(model: nn.Module, config: APTTunerConfig) -> None:
    """Puts the defaults of the model's architecture in the place of `None`, as `add_apt` does.

    Raises:
        ValueError: for a model without default places where `target_modules` is not given.
    """
    resolved = resolve_config(model, config.to_apt_config())
    for name in (*_APT_FIELDS, "target_modules"):
        if getattr(config, name) is None:
            value = getattr(resolved, name)
            setattr(config, name, list(value) if isinstance(value, tuple) else value)


_add_peft_type()
if PeftType["APT"] not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name="apt", config_cls=APTTunerConfig, model_cls=APTModel, prefix="apt_")
