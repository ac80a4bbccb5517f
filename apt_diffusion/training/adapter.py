"""Prepares the adapter of a run: attaches a new one, or loads that of a checkpoint to continue."""

import logging
from dataclasses import replace
from pathlib import Path

from torch import nn

from ..api import add_apt, freeze_base
from ..config import APTConfig
from ..io.files import WEIGHTS_NAME, read_adapter_file
from ..io.load import load_apt_weights
from ..model import ModelAdapters

logger = logging.getLogger(__name__)


def attach_trainable(
    components: dict[str, nn.Module], config: APTConfig, checkpoint: Path | None = None
) -> dict[str, nn.Parameter]:
    """Attaches the adapter `"default"` in float32, whatever the base's precision, and freezes everything else.

    Args:
        components: as for `add_apt`.
        config: as for `add_apt`.
        checkpoint: a checkpoint's folder, whose adapter must have been made with the same settings.

    Returns:
        The trainable parameters by name (`unet.<module>.apt.adapters.default.prompts`).

    Raises:
        ValueError: where the settings, or the parts that are trained, differ from the checkpoint's.
    """
    modules = add_apt(components, config)
    trainable, total = freeze_base(components)
    logger.info("APT at %d places: %s of %s parameters are trained.", len(modules), f"{trainable:,}", f"{total:,}")
    parameters = {
        f"{part}.{name}": parameter
        for part, component in components.items()
        for name, parameter in component.named_parameters()
        if parameter.requires_grad
    }
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    if checkpoint is not None:
        _check_same_settings(components, checkpoint)
        file = read_adapter_file(checkpoint / WEIGHTS_NAME, with_words=True)
        load_apt_weights(components, replace(file, word_rows={}), hotswap=True)  # the words' rows are loaded with them
    return parameters


def _check_same_settings(components: dict[str, nn.Module], checkpoint: Path) -> None:
    stored = read_adapter_file(checkpoint / WEIGHTS_NAME, with_words=True).configs or {}
    if set(stored) != set(components):
        raise ValueError(f"{checkpoint} has an adapter for {sorted(stored)}, this run trains {sorted(components)}.")
    for part, component in components.items():
        old, new = stored[part].to_dict(), ModelAdapters.of(component).configs["default"].to_dict()
        differing = [f"{name} {old[name]} there, {new[name]} here" for name in old if old[name] != new[name]]
        if differing:
            raise ValueError(f"{checkpoint} was trained with other settings of the {part}: {'; '.join(differing)}.")
