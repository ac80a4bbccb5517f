"""ModelAdapters: everything that is attached to one model, in one object.

It holds the adapters' settings, the active adapters and their weights, the scale, the on/off switch, the settings of
the current call, and the heads. The processor cores hold copies of the values that they compute with; only this class
writes them (`_apply`).
"""

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .adapter_names import check_name
from .architectures import CHILDREN, resolve_config
from .block_weights import NO_BLOCKS, Blocks, blocks_of, weight_of
from .config import APTConfig, pattern_matches
from .equation import ApproximatedPrompt
from .heads import Heads, head_tensors
from .hooks import accept_base_states, refuse_base_states, register, unregister
from .offloading import regroup_offloaded
from .places import Place, new_adapter, places_of
from .processor import APTProcessorCore, Sample
from .wrappers import unwrapped_name

AdapterWeight = float | dict[str, Any]
Planned = list[tuple[Place, ApproximatedPrompt]]

_ATTRIBUTE = "apt_adapters"
_call_lock = threading.Lock()


@dataclass
class Call:
    """The settings of one call of a pipeline; `None` leaves those of the model. See `apt_call`."""

    scale: float | None = None
    active: dict[str, AdapterWeight] | None = None
    samples: tuple[Sample, ...] | None = None


class ModelAdapters:
    """What is attached to one model. `ModelAdapters.of(model)` finds it, or an empty one.

    Attributes:
        configs: name -> resolved settings of each adapter.
        active: name -> weight of the active adapters, in the order of activation.
        scale: factor on all weights.
        enabled: `False` leaves the model as its base.
        heads: the values of `modules_to_save` for the base and each adapter.
        hotswap_room: prompts and rank that later adapters get room for (`enable_apt_hotswap`).
        call: settings of the call under way.
    """

    def __init__(self) -> None:
        self.configs: dict[str, APTConfig] = {}
        self.active: dict[str, AdapterWeight] = {}
        self.scale = 1.0
        self.enabled = True
        self.heads = Heads()
        self.hotswap_room: tuple[int, int | None] | None = None
        self.call: Call | None = None
        self._component = ""  # the model's name in the pipeline in which the weights were set
        self._model: weakref.ref[nn.Module] | None = None
        self._call_cores: list[APTProcessorCore] = []  # during a call, those of the model

    @classmethod
    def of(cls, model: nn.Module) -> "ModelAdapters":
        """The object of this model. An empty one is stored with the model as soon as something is set."""
        adapters = vars(model).get(_ATTRIBUTE)
        adapters = cls() if adapters is None else adapters
        adapters._model = weakref.ref(model)  # a copy of the model brings a copy of this object
        return adapters

    @property
    def model(self) -> nn.Module:
        """The model that carries the adapters."""
        model = self._model and self._model()
        if model is None:
            raise ReferenceError("The model of these adapters is gone.")
        return model

    def cores(self) -> Iterator[tuple[str, APTProcessorCore]]:
        """`(name, core)` of all cores of the model."""
        return named_cores(self.model)

    def plan(self, config: APTConfig, adapter_name: str) -> tuple[APTConfig, Planned]:
        """Everything of an attachment that depends on the input: `(resolved config, new adapters by place)`.

        Raises:
            ValueError: for a name in use, places that do not exist, or modules that cannot be adapted.
        """
        self.check_free(adapter_name)
        resolved = resolve_config(self.model, config)
        places = places_of(self.model, resolved)
        names = {place.module_name for place in places}
        for key in {**(resolved.num_prompts_pattern or {}), **(resolved.rank_pattern or {})}:
            if not any(pattern_matches(key, name) for name in names):
                raise ValueError(f"The size pattern {key!r} matches none of the {len(names)} adapted modules.")
        if resolved.modules_to_save:
            head_tensors(self.model, resolved.modules_to_save)
        planned = [(place, new_adapter(resolved.at(place.module_name), place.width, place.module)) for place in places]
        return resolved, planned

    def check_free(self, adapter_name: str) -> None:
        """`ValueError` for a name that cannot be given to a new adapter."""
        check_name(adapter_name)
        if adapter_name in self.configs:
            raise ValueError(
                f"Adapter name {adapter_name!r} is already in use: choose another, remove that adapter, or load with "
                "hotswap=True to overwrite it."
            )

    def attach(self, adapter_name: str, config: APTConfig, planned: Planned, activate: bool = True) -> None:
        """Registers what was planned. A failure leaves the model as it was."""
        before = dict(self.active)
        self.configs[adapter_name] = config
        try:
            accept_base_states(self.model)
            for place, adapter in planned:
                self._register(adapter_name, config, place, adapter)
            if config.modules_to_save:
                self.heads.add(self.model, adapter_name, config.modules_to_save)
            if activate:
                self.set_active({adapter_name: 1.0}, self._component)
            else:
                self._apply()
            regroup_offloaded(self.model)
        except BaseException:
            self.active = before
            self.delete(adapter_name)
            raise

    def _register(self, adapter_name: str, config: APTConfig, place: Place, adapter: ApproximatedPrompt) -> None:
        core = present = place.module._modules.get(place.child)
        if core is None:
            core = APTProcessorCore(place.width)
            core.full_name, core.binding = f"{place.module_name}.{place.child}", place.binding
        adapter.train(place.module.training)
        # A context core has one input, so both sources are the same there.
        core.add(adapter_name, adapter, "hidden_states" if place.binding.output is None else config.query_source)
        if present is None:
            register(place.module, place.child, core)

    def delete(self, adapter_name: str) -> None:
        """Takes one adapter away, and the hooks of cores that are empty then."""
        model = self.model
        self.heads.delete(model, adapter_name)
        self.configs.pop(adapter_name, None)
        self.active.pop(adapter_name, None)
        for module in list(model.modules()):
            for child in CHILDREN:
                core = module._modules.get(child)
                if isinstance(core, APTProcessorCore) and adapter_name in core.adapters:
                    core.delete(adapter_name)
                    if not core.adapters and not hasattr(module, "inner"):  # an APTAttnProcessor keeps its core
                        unregister(module, child)
        self._apply()

    def set_active(self, active: dict[str, AdapterWeight], component: str = "") -> None:
        """Activates exactly these adapters; during a call, in place of the call's weights.

        Args:
            active: name -> weight, a number or weights per component and block; names of other models are left out.
            component: the model's name in its pipeline, by which such weights are looked up.
        """
        self.active = {name: weight for name, weight in active.items() if name in self.configs}
        self._component = component
        if self.call is not None:
            self.call.active = None
        self._apply()

    def check_weights(self, active: dict[str, AdapterWeight], component: str) -> None:
        """`ValueError` for weights that `set_active` could not apply."""
        blocks = self._blocks(active)
        for name, core in self.cores():
            _core_weights(core, name, active, component, blocks)

    def set_scale(self, scale: float) -> None:
        """Sets the factor on all weights; during a call, in place of the call's scale."""
        self.scale = scale
        if self.call is not None:
            self.call.scale = None
        self._apply()

    def set_enabled(self, enabled: bool) -> None:
        """Switches all adapters and their heads on or off."""
        self.enabled = enabled
        self._apply()

    def set_hotswap_room(self, room: tuple[int, int | None]) -> None:
        """Later adapters get room for so many prompts, of so large a rank."""
        self.hotswap_room = room
        self._apply()

    def check_idle(self) -> None:
        """`RuntimeError` while a call is under way."""
        if self.call is not None:
            raise RuntimeError(
                f"Another call is under way on this {type(self.model).__name__}: its adapters have one scale and "
                "one set of weights at a time. Wait for that call, put both into one batch with "
                "apt_adapter_names, or use a copy of the pipeline."
            )

    def begin_call(self, call: Call, component: str) -> None:
        """Starts a call with its own settings; `RuntimeError` while another is under way."""
        if call.samples is not None:
            self.check_batch_axis()
        with _call_lock:
            self.check_idle()
            self.call = call
        self._component = component
        try:
            self._apply()
        except BaseException:
            self.end_call()
            raise

    def end_call(self) -> None:
        """Back to the model's own settings, with whatever was changed during the call."""
        self.call = None
        self._apply()

    def share_out(self, samples: tuple[Sample, ...]) -> None:
        """Within a call: the adapters of the rows of the next pass. Costs nothing that grows with the model.

        Args:
            samples: per row a name, `{name: weight}` with plain numbers, or `None`.
        """
        assert self.call is not None
        self.call.samples = samples
        for core in self._call_cores:
            core.adapters_per_sample = samples

    def check_batch_axis(self) -> None:
        """`ValueError` where the rows of a batch cannot have adapters of their own."""
        unknown = [name for name, core in self.cores() if core.binding is not None and core.binding.batch_dim is None]
        if unknown:
            raise ValueError(
                f"One adapter per sample needs to know the batch axis; {unknown[0]} is a wrapper around a module with "
                "batch_first=False, or its batch has not one entry per sample. Use one adapter for the whole batch."
            )

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the active adapters and of their heads."""
        parameters = [
            p for _, core in self.cores() for name in self.active if name in core.adapters
            for p in core.adapters[name].parameters()
        ]  # fmt: skip
        if self.heads.in_use is not None:
            heads = head_tensors(self.model, self.configs[self.heads.in_use].modules_to_save or ())
            parameters += [tensor for tensor in heads.values() if isinstance(tensor, nn.Parameter)]
        return parameters

    def at_places(self, adapter_name: str) -> dict[tuple[str, str], ApproximatedPrompt]:
        """One adapter, `{(module name, child name): its part there}`."""
        found = {}
        for name, core in self.cores():
            if adapter_name in core.adapters:
                module_name, _, child = name.rpartition(".")
                found[module_name, child] = core.adapters[adapter_name]
        return found

    def reset(self) -> None:
        """Takes every adapter away, and all settings with them."""
        for name in list(self.configs):
            self.delete(name)
        self.scale, self.enabled, self.hotswap_room = 1.0, True, None
        self._apply()

    def _apply(self) -> None:
        """Writes the settings into the cores and puts the right heads in use."""
        call = self.call or Call()
        active = self.active if call.active is None else call.active
        active = {name: weight for name, weight in active.items() if name in self.configs}
        scale = self.scale if call.scale is None else call.scale
        blocks = self._blocks(active, *(s for s in call.samples or () if isinstance(s, dict)))
        cores = list(self.cores())
        self._call_cores = [] if self.call is None else [core for _, core in cores]
        for name, core in cores:
            core.weights = _core_weights(core, name, active, self._component, blocks)
            core.scale, core.enabled = scale, self.enabled
            core.adapters_per_sample = call.samples and tuple(
                _core_weights(core, name, sample, self._component, blocks) if isinstance(sample, dict) else sample
                for sample in call.samples
            )
        with_heads = [name for name in active if name in self.heads.stored] if self.enabled else []
        self.heads.use(self.model, with_heads[0] if with_heads else None)
        if not self.configs:
            refuse_base_states(self.model)
        plain = not self.configs and self.scale == 1 and self.enabled and self.hotswap_room is None
        if plain and self.call is None:
            vars(self.model).pop(_ATTRIBUTE, None)
        else:
            vars(self.model)[_ATTRIBUTE] = self

    def _blocks(self, *weights: dict[str, AdapterWeight]) -> Blocks:
        by_block = any(isinstance(weight, dict) for active in weights for weight in active.values())
        return blocks_of(self.model) if by_block else NO_BLOCKS

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "call": None, "_call_cores": [], "_model": None}


def _core_weights(
    core: APTProcessorCore, name: str, active: dict[str, AdapterWeight], component: str, blocks: Blocks
) -> dict[str, float]:
    return {
        adapter: weight_of(weight, component, name, blocks)
        for adapter, weight in active.items()
        if adapter in core.adapters
    }


def named_cores(model: nn.Module) -> Iterator[tuple[str, APTProcessorCore]]:
    """`(name, core)` of all cores, hooked or inside an `APTAttnProcessor`; the name is the same for both."""
    for name, module in model.named_modules():
        if isinstance(module, APTProcessorCore):
            yield unwrapped_name(name.replace(".processor.apt", ".apt")), module
