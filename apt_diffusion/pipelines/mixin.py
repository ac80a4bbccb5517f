"""APTLoaderMixin: what every APT pipeline adds to the stock pipeline that it subclasses."""

import contextlib
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import attach
from ..attach import AdapterWeight, components_of, cores_of, state_of
from ..block_weights import check_number
from ..io import weights
from ..io.files import WEIGHTS_NAME, AdapterFile, resolve_adapter_file
from ..miniature import resolve_model
from ..serving.store import AdapterStore

ADAPTERS_INDEX = "apt_adapters.json"


class APTLoaderMixin:
    """Loads, saves, mixes and switches APT adapters on a diffusers pipeline; methods mirror those for LoRA.

    `__call__` takes two more arguments than the stock pipeline, for that call only:
        apt_scale: a factor on all adapter weights, or `{adapter name: weight}`.
        apt_adapter_names: one adapter name (or `None` for the base model) per prompt. With a single prompt, it is
            repeated (with what else is said of it), so that several adapters draw the same prompt in one batch.

    Attributes:
        apt_store: an `AdapterStore`. Adapters that a call names and the pipeline does not have come from it, and
            leave when the call ends.
    """

    apt_store: AdapterStore | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # diffusers and IDEs read the arguments of a pipeline from the signature of its __call__.
        stock = next(b for b in cls.__mro__[1:] if b is not APTLoaderMixin and "__call__" in vars(b))
        parameters = dict(inspect.signature(stock.__call__).parameters)
        parameters |= dict(inspect.signature(APTLoaderMixin.__call__).parameters)
        parameters = [p for p in parameters.values() if p.kind is not p.VAR_POSITIONAL]

        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            return APTLoaderMixin.__call__(self, *args, **kwargs)

        __call__.__signature__ = inspect.Signature(sorted(parameters, key=lambda p: p.kind))
        __call__.__doc__ = f"{APTLoaderMixin.__doc__}\n\n{stock.__call__.__doc__}"
        cls.__call__ = __call__

    def __call__(
        self,
        *args: Any,
        apt_scale: float | dict[str, float] | None = None,
        apt_adapter_names: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        misspelt = [name for name in kwargs if name.startswith("apt_")]  # stock pipelines take any name silently
        if misspelt:
            raise TypeError(f"Unknown arguments {misspelt}: there are apt_scale and apt_adapter_names.")
        with self._from_store(apt_scale, apt_adapter_names), self._for_this_call(), attach.prepared_apt(self):
            if apt_scale is not None:
                self._apply_scale(apt_scale)
            if apt_adapter_names is not None:
                by_position = inspect.signature(super().__call__).bind_partial(*args).arguments
                return super().__call__(**self._apply_names(apt_adapter_names, dict(**by_position, **kwargs)))
            return super().__call__(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As the stock method; `"miniature"` names the embedded model, and adapters saved beside it come back.

        Without `dtype` everything is loaded in float32, whatever the files hold.
        """
        import torch

        path = resolve_model(str(pretrained_model_name_or_path))
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        pipeline = super().from_pretrained(path, **kwargs)
        if isinstance(pipeline, APTLoaderMixin):
            pipeline._load_saved_adapters(path, kwargs)
        return pipeline

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As the stock method, with the base model's own weights in its files and the adapters beside them."""
        folder = Path(save_directory)
        index = {}
        active = _active_weights(self)
        names = dict.fromkeys(name for c in components_of(self).values() for name in state_of(c).configs)
        for name in names:
            place = "" if name == "default" else f"apt_adapters/{name}"
            weights.save_apt_weights(self, folder / place, name)
            index[name] = {"folder": place, "weight": active.get(name)}
        (folder / ADAPTERS_INDEX).unlink(missing_ok=True)  # of what was saved here before
        if index:
            (folder / ADAPTERS_INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        with attach.hidden_apt(self):
            super().save_pretrained(str(save_directory), *args, **kwargs)

    def to_json_string(self) -> str:
        """The pipeline's configuration, under the stock class's name: any diffusers can load what is saved here."""
        stock = next(base for base in type(self).__mro__ if base.__module__.startswith("diffusers."))
        return json.dumps(json.loads(super().to_json_string()) | {"_class_name": stock.__name__}, indent=2) + "\n"

    def load_apt_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor] | AdapterFile,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """[`apt_diffusion.load_apt_weights`] on this pipeline; returns the pipeline."""
        weights.load_apt_weights(self, pretrained_model_name_or_path_or_dict, *args, **kwargs)
        return self

    def save_apt_weights(
        self, path: str | Path, adapter_name: str = "default", metadata: dict[str, str] | None = None
    ) -> Path:
        """[`apt_diffusion.save_apt_weights`] of this pipeline."""
        return weights.save_apt_weights(self, path, adapter_name, metadata)

    def unload_apt_weights(self) -> None:
        """Takes all adapters away: the base pipeline again, bit for bit."""
        attach.remove_apt(self)

    def set_apt_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: AdapterWeight | Sequence[AdapterWeight] | None = None,
    ) -> None:
        """[`apt_diffusion.set_apt_adapters`] on this pipeline."""
        attach.set_apt_adapters(self, adapter_names, adapter_weights)

    def set_apt_scale(self, scale: float) -> None:
        """[`apt_diffusion.set_apt_scale`] on this pipeline."""
        attach.set_apt_scale(self, scale)

    def get_active_apt_adapters(self) -> list[str]:
        """[`apt_diffusion.get_active_apt_adapters`] of this pipeline."""
        return attach.get_active_apt_adapters(self)

    def get_list_apt_adapters(self) -> dict[str, list[str]]:
        """[`apt_diffusion.get_list_apt_adapters`] of this pipeline."""
        return attach.get_list_apt_adapters(self)

    def delete_apt_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """[`apt_diffusion.delete_apt_adapters`] on this pipeline."""
        attach.delete_apt_adapters(self, adapter_names)

    def enable_apt(self) -> None:
        """[`apt_diffusion.enable_apt`] on this pipeline."""
        attach.enable_apt(self)

    def disable_apt(self) -> attach.disable_apt:
        """[`apt_diffusion.disable_apt`] on this pipeline; works as a context manager too."""
        return attach.disable_apt(self)

    def enable_apt_hotswap(self, max_num_prompts: int, max_rank: int | None = None) -> None:
        """[`apt_diffusion.enable_apt_hotswap`] on this pipeline."""
        weights.enable_apt_hotswap(self, max_num_prompts, max_rank)

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As the stock method, which would freeze every APT parameter on its way."""
        trainable = [p for core in cores_of(self) for p in core.parameters() if p.requires_grad]
        try:
            super().load_lora_weights(*args, **kwargs)
        finally:  # PEFT freezes before it finds that a file does not fit
            for parameter in trainable:
                parameter.requires_grad_(True)

    # Offloading by leaf or to disk brings weights back when the module that owns them is called. Cores use adapters
    # without calling them, so adapters stay where they are; what they fold to follows the activations.

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """As the stock method; adapters stay on their device."""
        with attach.hidden_apt(self):
            super().enable_sequential_cpu_offload(*args, **kwargs)

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """As the stock method; by leaf or to disk, adapters stay on their device."""
        asked = inspect.signature(super().enable_group_offload).bind(*args, **kwargs).arguments
        stay = asked.get("offload_type") == "leaf_level" or asked.get("offload_to_disk_path") is not None
        with attach.hidden_apt(self) if stay else contextlib.nullcontext():
            super().enable_group_offload(*args, **kwargs)

    def _from_store(
        self, apt_scale: float | dict[str, float] | None, apt_adapter_names: Sequence[str | None] | None
    ) -> contextlib.AbstractContextManager[None]:
        names = [*(apt_scale if isinstance(apt_scale, dict) else ())]
        if not isinstance(apt_adapter_names, str):  # which is an error, told where the names are used
            names += [name for name in apt_adapter_names or () if name is not None]
        return contextlib.nullcontext() if self.apt_store is None else self.apt_store.attached(self, names)

    @contextlib.contextmanager
    def _for_this_call(self) -> Iterator[None]:
        before = [(core, dict(core.weights), core.scale, core.adapters_per_sample) for core in cores_of(self)]
        try:
            yield
        finally:
            for core, weights_before, scale, names in before:
                core.weights, core.scale, core.adapters_per_sample = weights_before, scale, names

    def _apply_scale(self, apt_scale: float | dict[str, float]) -> None:
        if not isinstance(apt_scale, dict):
            self.set_apt_scale(apt_scale)
            return
        attach.check_present(self, list(apt_scale))
        weights = {name: check_number(f"apt_scale[{name!r}]", weight) for name, weight in apt_scale.items()}
        for core in cores_of(self):
            core.weights = core.weights | {name: w for name, w in weights.items() if name in core.adapters}

    def _apply_names(self, names: Sequence[str | None], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Tells every core which sample is whose; the arguments come back with a single prompt repeated."""
        if isinstance(names, str) or not names:
            raise ValueError(f"apt_adapter_names must be a list with one name per prompt, got {names!r}.")
        attach.check_present(self, [name for name in names if name is not None])
        if isinstance(kwargs.get("prompt"), str):
            texts = {key: kwargs.get(key) for key in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")}
            kwargs |= {key: [text] * len(names) for key, text in texts.items() if isinstance(text, str)}
        prompt, embeds = kwargs.get("prompt"), kwargs.get("prompt_embeds")
        batch_size = len(prompt) if prompt is not None else len(embeds) if embeds is not None else len(names)
        if batch_size != len(names):
            raise ValueError(f"apt_adapter_names has {len(names)} names for {batch_size} prompts.")
        images = kwargs.get("num_images_per_prompt") or 1
        for part, component in components_of(self).items():
            repeats = images if part == "unet" else 1
            for core in cores_of(component):
                core.adapters_per_sample = tuple(name for name in names for _ in range(repeats))
        return kwargs

    def _load_saved_adapters(self, path: str, options: dict[str, Any]) -> None:
        """Brings back what `save_pretrained` wrote; a pipeline without an index has none."""
        hub = {key: options[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in options}
        try:
            file = resolve_adapter_file(path, ADAPTERS_INDEX, **hub)
        except FileNotFoundError:
            return
        index = _read_index(file)
        for name, (folder, _) in index.items():
            weights.load_apt_weights(self, path, name, weight_name=WEIGHTS_NAME, subfolder=folder or None, **hub)
        active = {name: weight for name, (_, weight) in index.items() if weight is not None}
        self.set_apt_adapters(list(active), list(active.values()))


def _read_index(file: Path) -> dict[str, tuple[str, AdapterWeight | None]]:
    """`{adapter name: (folder, weight)}` of what `save_pretrained` wrote."""
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        return {name: (entry["folder"], entry["weight"]) for name, entry in index.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is damaged ({error!r}). Save the pipeline again; or load it without it, and its adapters one by "
            "one with load_apt_weights."
        ) from error


def _active_weights(pipeline: Any) -> dict[str, AdapterWeight]:
    active: dict[str, AdapterWeight] = {}
    for component in components_of(pipeline).values():
        active |= state_of(component).active
    return active
