"""APTLoaderMixin: what every APT pipeline adds to the stock pipeline that it subclasses."""

import contextlib
import hashlib
import inspect
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from torch import Tensor

from .. import api, calls
from ..components import components_of
from ..io.atomic import write_text
from ..io.files import WEIGHTS_NAME, AdapterFile, read_adapter_file, resolve_adapter_file
from ..io.hotswap import enable_apt_hotswap
from ..io.load import load_apt_weights
from ..io.save import save_apt_weights
from ..miniature import resolve_model
from ..model import AdapterWeight, ModelAdapters
from ..processor import Sample
from ..serving.store import AdapterStore
from ..words import hidden_words
from .prompt_tags import TEXT_ARGUMENTS, take_tags

ADAPTERS_INDEX = "apt_adapters.json"
_LORA_SCALE = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")

logger = logging.getLogger(__name__)


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline as Stock
else:  # the stock class stands behind this one in each pipeline's bases
    Stock = object


class APTLoaderMixin(Stock):
    """Loads, saves, mixes and switches APT adapters on a diffusers pipeline; methods mirror those for LoRA.

    `__call__` takes two more arguments than the stock pipeline, for that call only:
        apt_scale: a factor on all adapter weights, or `{adapter name: weight}`: exactly these adapters.
        apt_adapter_names: per prompt an adapter's name, `{adapter name: weight}` for a mix, or `None` for the base
            model. A single prompt is repeated, together with its negative prompt and second prompt, so that several
            adapters draw the same prompt in one batch.

    Attributes:
        apt_store: an `AdapterStore`. Adapters that a call names and that the pipeline does not have are loaded from
            it for that call only.
        apt_prompt_tags: whether `<apt:name:0.8>` in a prompt names an adapter for it. A prompt with such tags is drawn
            with exactly these adapters, one without with the active ones.
    """

    apt_store: AdapterStore | None = None
    apt_prompt_tags: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = cls.stock_class()
        if stock is None:
            return
        # diffusers and IDEs read the arguments of a pipeline from the signature of its __call__.
        known = dict(inspect.signature(stock.__call__).parameters)
        known |= dict(inspect.signature(APTLoaderMixin.__call__).parameters)
        parameters = [p for p in known.values() if p.kind is not p.VAR_POSITIONAL]

        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            return APTLoaderMixin.__call__(self, *args, **kwargs)

        signature = inspect.Signature(sorted(parameters, key=lambda p: p.kind))
        setattr(__call__, "__signature__", signature)  # noqa: B010 (a function has no such attribute by its type)
        __call__.__doc__ = f"{APTLoaderMixin.__doc__}\n\n{stock.__call__.__doc__}"
        setattr(cls, "__call__", __call__)  # noqa: B010

    @classmethod
    def stock_class(cls) -> Any:
        """The pipeline class that this one adds APT to."""
        for base in cls.__mro__:
            if not issubclass(base, APTLoaderMixin) and any("__call__" in vars(part) for part in base.__mro__):
                return base
        return None

    def __call__(
        self,
        *args: Any,
        apt_scale: float | dict[str, AdapterWeight] | None = None,
        apt_adapter_names: Sequence[Sample] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Draws with the adapters; see the class."""
        misspelt = [name for name in kwargs if name.startswith("apt_")]  # stock pipelines take any name silently
        if misspelt:
            raise TypeError(f"Unknown arguments {misspelt}: there are apt_scale and apt_adapter_names.")
        by_position = inspect.signature(super().__call__).bind_partial(*args).arguments
        kwargs = self._inputs_of_call(dict(**by_position, **kwargs))  # a TypeError where one is given twice
        if self.apt_prompt_tags:
            kwargs, apt_adapter_names = take_tags(kwargs, apt_scale, apt_adapter_names, self._active_weights())
        if apt_adapter_names is not None:
            kwargs = _repeated(apt_adapter_names, kwargs)
        apt_scale, kwargs = self._scale_of_lora(apt_scale, kwargs)
        images = kwargs.get("num_images_per_prompt") or kwargs.get("num_videos_per_prompt") or 1
        calls.check_idle(self)
        with (
            self._from_store(apt_scale, apt_adapter_names),
            calls.apt_call(self, apt_scale, apt_adapter_names, images),
            calls.prepared_apt(self),
        ):
            return super().__call__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As the stock method; the name of an embedded model will do, and adapters saved with it come back.

        Without `dtype` everything is loaded in float32, whatever the files hold.
        """
        import torch

        path = resolve_model(str(pretrained_model_name_or_path))
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        pipeline = super().from_pretrained(path, **kwargs)
        if path != str(pretrained_model_name_or_path):  # files name the embedded model, not its folder
            pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        if isinstance(pipeline, APTLoaderMixin):
            pipeline._load_saved_adapters(path, kwargs)
        return pipeline

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As the stock method, with the base model's own weights in its files and the adapters next to them."""
        folder = Path(save_directory)
        index = {}
        components = [ModelAdapters.of(component) for component in components_of(self).values()]
        active = self._active_weights()
        for name in dict.fromkeys(name for adapters in components for name in adapters.configs):
            place = "" if name == "default" else f"apt_adapters/{_folder_name(name)}"
            save_apt_weights(self, folder / place, name)
            index[name] = {"folder": place, "weight": active.get(name)}
        (folder / ADAPTERS_INDEX).unlink(missing_ok=True)  # of what was saved here before
        if index:
            write_text(folder / ADAPTERS_INDEX, json.dumps(index, indent=2))
        with api.hidden_apt(self), hidden_words(self):
            super().save_pretrained(str(save_directory), *args, **kwargs)

    def to_json_string(self) -> str:
        """The pipeline's configuration, under the stock class's name: any diffusers can load what is saved here."""
        stock = self.stock_class()
        return json.dumps(json.loads(super().to_json_string()) | {"_class_name": stock.__name__}, indent=2) + "\n"

    def load_apt_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor] | AdapterFile,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """[`apt_diffusion.load_apt_weights`] on this pipeline; returns the pipeline."""
        load_apt_weights(self, pretrained_model_name_or_path_or_dict, *args, **kwargs)
        return self

    def save_apt_weights(
        self, path: str | Path, adapter_name: str = "default", metadata: dict[str, str] | None = None
    ) -> Path:
        """[`apt_diffusion.save_apt_weights`] of this pipeline."""
        return save_apt_weights(self, path, adapter_name, metadata)

    def unload_apt_weights(self) -> None:
        """Takes all adapters away: the base pipeline again, bit for bit."""
        api.remove_apt(self)

    def set_apt_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: AdapterWeight | Sequence[AdapterWeight] | None = None,
    ) -> None:
        """[`apt_diffusion.set_apt_adapters`] on this pipeline."""
        api.set_apt_adapters(self, adapter_names, adapter_weights)

    def set_apt_scale(self, scale: float) -> None:
        """[`apt_diffusion.set_apt_scale`] on this pipeline."""
        api.set_apt_scale(self, scale)

    def get_active_apt_adapters(self) -> list[str]:
        """[`apt_diffusion.get_active_apt_adapters`] of this pipeline."""
        return api.get_active_apt_adapters(self)

    def get_list_apt_adapters(self) -> dict[str, list[str]]:
        """[`apt_diffusion.get_list_apt_adapters`] of this pipeline."""
        lists = api.get_list_apt_adapters(self)
        assert isinstance(lists, dict)  # of a pipeline
        return lists

    def delete_apt_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """[`apt_diffusion.delete_apt_adapters`] on this pipeline."""
        api.delete_apt_adapters(self, adapter_names)

    def enable_apt(self) -> None:
        """[`apt_diffusion.enable_apt`] on this pipeline."""
        api.enable_apt(self)

    def disable_apt(self) -> api.disable_apt:
        """[`apt_diffusion.disable_apt`] on this pipeline; works as a context manager too."""
        return api.disable_apt(self)

    def enable_apt_hotswap(self, max_num_prompts: int, max_rank: int | None = None) -> None:
        """[`apt_diffusion.enable_apt_hotswap`] on this pipeline."""
        enable_apt_hotswap(self, max_num_prompts, max_rank)

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As the stock method, which would freeze every APT parameter on its way."""
        trainable = [p for core in calls.cores_of(self) for p in core.parameters() if p.requires_grad]
        try:
            super().load_lora_weights(*args, **kwargs)
        finally:  # PEFT freezes before it finds that a file does not fit
            for parameter in trainable:
                parameter.requires_grad_(True)

    # Offloading by leaf or to disk brings weights back when the module that owns them is called. Cores use adapters
    # without calling them, so adapters stay where they are; what they fold to follows the activations.

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """As the stock method; adapters stay on their device."""
        with api.hidden_apt(self), hidden_words(self):
            super().enable_sequential_cpu_offload(*args, **kwargs)

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """As the stock method; by leaf or to disk, adapters stay on their device."""
        settings = inspect.signature(super().enable_group_offload).bind(*args, **kwargs).arguments
        stay = settings.get("offload_type") == "leaf_level" or settings.get("offload_to_disk_path") is not None
        with contextlib.ExitStack() as hidden:
            for hide in (api.hidden_apt, hidden_words) if stay else ():
                hidden.enter_context(hide(self))
            super().enable_group_offload(*args, **kwargs)

    def _inputs_of_call(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by name, with those that it takes from elsewhere."""
        return kwargs

    def _active_weights(self) -> dict[str, AdapterWeight]:
        components = [ModelAdapters.of(component) for component in components_of(self).values()]
        return {name: weight for adapters in components for name, weight in adapters.active.items()}

    def _from_store(
        self, apt_scale: float | dict[str, AdapterWeight] | None, apt_adapter_names: Sequence[Sample] | None
    ) -> contextlib.AbstractContextManager[None]:
        if self.apt_store is None:
            return contextlib.nullcontext()
        return self.apt_store.attached(self, calls.names_of_call(apt_scale, apt_adapter_names))

    def _scale_of_lora(self, apt_scale: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """`cross_attention_kwargs={"scale": ...}`, by which diffusers scales LoRA, scales APT where no LoRA is."""
        for key in _LORA_SCALE:
            settings = kwargs.get(key) or {}
            if "scale" not in settings or not self.get_list_apt_adapters():
                continue
            if any(getattr(component, "peft_config", None) for component in components_of(self).values()):
                logger.warning("%s={'scale': ...} scales the LoRA here; the APT adapters have apt_scale.", key)
                continue
            if apt_scale is not None:
                raise ValueError(
                    f"Both apt_scale and {key}={{'scale': ...}} scale the APT adapters: give one of them."
                )
            apt_scale = settings["scale"]
            kwargs = kwargs | {key: {name: value for name, value in settings.items() if name != "scale"} or None}
        return apt_scale, kwargs

    def _load_saved_adapters(self, path: str, options: dict[str, Any]) -> None:
        """Brings back what `save_pretrained` wrote; a pipeline without an index has none."""
        hub = {key: options[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in options}
        try:
            file = resolve_adapter_file(path, ADAPTERS_INDEX, **hub)
        except FileNotFoundError:
            return
        active = {}
        for name, (folder, weight) in _read_index(file).items():
            adapter = read_adapter_file(resolve_adapter_file(path, WEIGHTS_NAME, folder or None, **hub), True)
            if adapter.configs is not None and not self._may_load(name, set(adapter.configs)):
                continue
            load_apt_weights(self, adapter, name, activate=False)
            if weight is not None:
                active[name] = weight
        active = self._active_weights() | active
        self.set_apt_adapters(list(active), list(active.values()))

    def _may_load(self, adapter_name: str, components: set[str]) -> bool:
        """Whether a saved adapter for these components is to be loaded now."""
        if components & set(components_of(self)):
            return True
        logger.warning("Adapter %r is left out: it is for %s only.", adapter_name, sorted(components))
        return False


def _repeated(samples: Sequence[Sample], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a single prompt repeated for every adapter; `ValueError` where the numbers differ."""
    if isinstance(samples, str | dict) or not samples:
        raise ValueError(f"apt_adapter_names must be a list with one name per prompt, got {samples!r}.")
    if isinstance(kwargs.get("prompt"), str):
        texts = {key: text for key, text in kwargs.items() if TEXT_ARGUMENTS.fullmatch(key) and isinstance(text, str)}
        kwargs = kwargs | {key: [text] * len(samples) for key, text in texts.items()}
    prompt, embeds = kwargs.get("prompt"), kwargs.get("prompt_embeds")
    batch_size = len(prompt) if prompt is not None else len(embeds) if embeds is not None else len(samples)
    if batch_size != len(samples):
        raise ValueError(f"apt_adapter_names has {len(samples)} names for {batch_size} prompts.")
    return kwargs


def _folder_name(adapter_name: str) -> str:
    """A folder's name for any adapter name: no separators, not `..`, and not too long for a disk."""
    quoted = quote(adapter_name, safe=" ")
    quoted = quoted.replace(".", "%2E") if not quoted.strip(". ") else quoted
    return quoted if len(quoted) <= 100 else f"{quoted[:80]}-{hashlib.sha256(adapter_name.encode()).hexdigest()[:12]}"


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
