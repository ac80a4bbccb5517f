"""The methods that APT is compared with, on ViLT, METER and CLIP: attached, frozen, saved and removed like APT.

Importing this package registers the methods, in the order in which tables list them.
"""

from .adapter import Adapter
from .apt import APT
from .attach import (
    METHOD_WEIGHTS_NAME,
    add_method,
    find_method_file,
    freeze_for_method,
    load_method,
    method_in,
    method_of,
    method_parameters,
    read_header,
    remove_method,
    save_method,
    with_heads,
)
from .classifier_only import ClassifierOnly
from .deep_prompt import DeepPrompt
from .families import family_of, layers_of, trained_beside
from .full import FullTuning
from .lora import Lora
from .registry import (
    CHILD,
    Costs,
    Method,
    MethodConfig,
    Setting,
    add_child,
    get_method,
    method_names,
    register_method,
    unregister_method,
)
from .scaled_pa import ScaledParallelAdapter
from .shallow_prompt import ShallowPrompt

register_method("classifier_only", ClassifierOnly())
register_method("shallow_prompt", ShallowPrompt())
register_method("deep_prompt", DeepPrompt())
register_method("lora", Lora())
register_method("adapter", Adapter())
register_method("scaled_pa", ScaledParallelAdapter())
register_method("apt", APT())
register_method("full", FullTuning())

__all__ = [
    "CHILD",
    "METHOD_WEIGHTS_NAME",
    "Costs",
    "Method",
    "MethodConfig",
    "Setting",
    "add_child",
    "add_method",
    "family_of",
    "find_method_file",
    "freeze_for_method",
    "get_method",
    "layers_of",
    "load_method",
    "method_in",
    "method_names",
    "method_of",
    "method_parameters",
    "register_method",
    "remove_method",
    "read_header",
    "save_method",
    "trained_beside",
    "unregister_method",
    "with_heads",
]
