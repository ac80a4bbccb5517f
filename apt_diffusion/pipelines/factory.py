"""Makes an APT pipeline class from a stock one, and registers it with diffusers' auto pipelines."""

import re
import sys
from typing import Any

from .mixin import APTLoaderMixin
from .modular import APTModularMixin
from .single_file import SingleFileMixin

# Words of diffusers' class names that say what a pipeline of a family does. "APT" stands between family and task:
# diffusers still finds the family when it puts "ControlNet" or "PAG" into a name.
_TASKS = "ControlNet|PAG|Img2Img|Inpaint|Control|Fill|Kontext|Edit|Layered|Upscale|Turbo|Sprint|Modular"

_made: dict[type, type] = {}


def apt_pipeline(pipeline_class: type) -> type:
    """A subclass of a diffusers pipeline class with APT adapters; see [`APTLoaderMixin`]. The same one at every call.

    Args:
        pipeline_class: a whole pipeline's or a modular pipeline's.

    Raises:
        TypeError: for what is no pipeline class.
    """
    from diffusers import DiffusionPipeline

    if not isinstance(pipeline_class, type) or not (
        issubclass(pipeline_class, DiffusionPipeline) or _is_modular(pipeline_class)
    ):
        raise TypeError(f"apt_pipeline takes a diffusers pipeline class, got {pipeline_class!r}.")
    if issubclass(pipeline_class, APTLoaderMixin):
        return pipeline_class
    if pipeline_class not in _made:
        _made[pipeline_class] = _make(pipeline_class)
    return _made[pipeline_class]


def _make(stock: type) -> type:
    name = re.sub(rf"((?:{_TASKS})*Pipeline)$", r"APT\1", stock.__name__)
    name = name if name != stock.__name__ else f"APT{name}"
    members = {"__doc__": f"[`diffusers.{stock.__name__}`] with APT adapters; see [`APTLoaderMixin`]."}
    if stock.__module__.startswith("diffusers."):
        members["__module__"] = "apt_diffusion.pipelines"  # where the name is found again, also by pickle
    mixins: tuple[type, ...] = (APTModularMixin if _is_modular(stock) else _AutoPipelineFriend,)
    if hasattr(stock, "from_single_file"):
        mixins = (SingleFileMixin, *mixins)
    return type(name, (*mixins, stock), members)


def _is_modular(pipeline_class: type) -> bool:
    # By name: to import modular pipelines takes seconds, and few people use them.
    return any(base.__name__ == "ModularPipeline" for base in pipeline_class.__mro__)


class _AutoPipelineFriend(APTLoaderMixin):
    """Known to `AutoPipelineFor...from_pipe`, which looks up class names in tables of its own."""

    @property
    def config(self) -> Any:
        """The pipeline's configuration."""
        _register_auto_pipelines()  # `from_pipe` reads it first; importing the tables ourselves would take seconds
        return super().config


def _register_auto_pipelines() -> None:
    auto = sys.modules.get("diffusers.pipelines.auto_pipeline")
    if auto is None or not hasattr(auto, "SUPPORTED_TASKS_MAPPINGS"):
        return
    for mapping in auto.SUPPORTED_TASKS_MAPPINGS:
        for family, stock in list(mapping.items()):
            if not issubclass(stock, APTLoaderMixin) and f"apt-{family}" not in mapping:
                mapping[f"apt-{family}"] = apt_pipeline(stock)
