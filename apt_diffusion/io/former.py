"""Reads adapter files of former versions by renaming their tensors and settings to the current format.

Version 0.1 wrote APT in two forms. The second, by `save_method`, had the adapter's name in the keys
(`….apt.adapters.default.prompts`) and the method's settings in the header under `METHOD_HEADER`.
"""

import json
from typing import Any

from torch import Tensor

from ..config import APTConfig

METHOD_HEADER = "apt_diffusion_method"  # in the header of every file that holds another method than APT
_NAMED = ".apt.adapters.default."


def current_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under today's names."""
    return {key.replace(_NAMED, ".apt."): tensor for key, tensor in tensors.items()}


def current_header(name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """The header that a file with these tensors has today.

    Args:
        name: of the file, for messages.
        tensors: under today's names.
        metadata: the header as it was read.

    Raises:
        ValueError: for a header of `save_method` whose settings cannot be used.
    """
    if METHOD_HEADER not in metadata:
        return metadata
    values = _method_values(name, metadata)
    try:
        config = APTConfig(
            num_prompts=values.get("num_prompts", APTConfig.num_prompts),
            rank=values.get("rank", APTConfig.rank),
            init="identity" if any(key.endswith(".apt.gate") for key in tensors) else "paper",
            query_source="hidden_states",
            streams=("query",),
            modules_to_save=tuple(key for key in tensors if ".apt." not in key) or None,
        )
    except ValueError as error:
        raise ValueError(f"{name} has a header that cannot be used: {error}") from error
    kept = {key: value for key, value in metadata.items() if key != METHOD_HEADER}
    return kept | {"apt_config": json.dumps({"": config.to_dict()})}


def method_in_header(name: str, metadata: dict[str, str]) -> str:
    """The method that a file holds: `"apt"` where its header names no other. `ValueError` for a damaged header."""
    return _method_values(name, metadata)["method"] if METHOD_HEADER in metadata else "apt"


def _method_values(name: str, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        values = json.loads(metadata[METHOD_HEADER])
    except ValueError as error:
        raise ValueError(f"{name} has a header that cannot be used: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("method"), str):
        raise ValueError(f"{name} has a header that names no method: {metadata[METHOD_HEADER][:80]}")
    return values
