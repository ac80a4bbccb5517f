"""APTModularMixin: what an APT modular pipeline does otherwise than a whole one.

A modular pipeline of diffusers is put together from blocks, its models are loaded later (`load_components`), and the
state that one call returns may be the input of another.
"""

from pathlib import Path
from typing import Any

from ..components import components_of
from ..miniature import resolve_model
from .mixin import APTLoaderMixin
from .prompt_tags import TEXT_ARGUMENTS

_OFFLOADING = (
    "A modular pipeline is offloaded by its ComponentsManager: give it components_manager=, and call "
    "enable_auto_cpu_offload there; or call enable_group_offload of one model."
)
_COUNTED = ("prompt_embeds", "num_images_per_prompt")


class APTModularMixin(APTLoaderMixin):
    """Adds APT adapters to a modular pipeline class; see [`APTLoaderMixin`]."""

    _hub_options: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As the stock method; also for the folder of a whole pipeline, which gets the default blocks of the class.

        The models, and adapters that were saved with them, are loaded by `load_components`.
        """
        path = resolve_model(str(pretrained_model_name_or_path))
        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        stock: Any = super(APTLoaderMixin, cls)
        modular, whole = stock._load_pipeline_config(path, **hub)
        if modular is not None:
            pipeline = stock.from_pretrained(path, **kwargs)
        else:
            settings = {key: kwargs[key] for key in ("components_manager", "collection", "workflow") if key in kwargs}
            make: Any = cls
            pipeline = make(pretrained_model_name_or_path=path, config_dict=whole, **settings)
        pipeline._hub_options = hub
        return pipeline

    def load_components(self, *args: Any, **kwargs: Any) -> None:
        """As the stock method, in float32 without `dtype`; adapters saved with the pipeline come with their models."""
        import torch

        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        stock: Any = super()
        stock.load_components(*args, **kwargs)
        source = getattr(self, "_pretrained_model_name_or_path", None)
        if source is not None:
            self._load_saved_adapters(str(source), (self._hub_options or {}) | kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Not there: `NotImplementedError` with what modular pipelines have instead."""
        raise NotImplementedError(_OFFLOADING)

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """Not there: `NotImplementedError` with what modular pipelines have instead."""
        raise NotImplementedError(_OFFLOADING)

    def _may_load(self, adapter_name: str, components: set[str]) -> bool:
        # A part of the models may be loaded first, and the rest by a second call.
        present = {name for names in self.get_list_apt_adapters().values() for name in names}
        return adapter_name not in present and components <= set(components_of(self))

    def _inputs_of_call(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """With the prompts and counts that stand in the state of an earlier call."""
        state = kwargs.get("state")
        if state is None:
            return kwargs
        pipeline: Any = self
        names = [name for each in pipeline.blocks.inputs if (name := each.name) is not None]
        counted = [name for name in names if TEXT_ARGUMENTS.fullmatch(name) or name in _COUNTED]
        earlier = {name: state.get(name) for name in counted if name not in kwargs}
        return kwargs | {name: value for name, value in earlier.items() if value is not None}
