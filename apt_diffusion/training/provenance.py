"""Where an adapter comes from: settings, command line and versions, without secrets and paths of this machine."""

import importlib.metadata
import json
import platform
import shlex
from typing import Any

from ..io.public_names import public_name, public_setting
from .scripts import shown

SECRETS = ("hub_token",)
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")


def command_line(script: str, words: list[str]) -> str:
    """The command as a shell takes it, to be shared; the script's path is that of a checkout."""
    return shlex.join([*shown(script), *words])


def versions() -> dict[str, str]:
    """Versions of Python, of this library, and of what it runs on."""
    from .. import __version__

    found = {"python": platform.python_version(), "apt-diffusion": __version__}
    for package in PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found


def kept_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without secrets and without what was not set: for files that stay on this machine."""
    return {key: value for key, value in settings.items() if key not in SECRETS and value is not None}


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The same to be shared: of local paths only the names at their ends."""
    return {key: public_setting(key, value) for key, value in kept_settings(settings).items()}


def adapter_metadata(settings: dict[str, Any], command: str, step: int, **known: str) -> dict[str, str]:
    """Strings for the header of an adapter's file; a `base_model` on this machine is named without its path."""
    if "base_model" in known:
        known["base_model"] = public_name(known["base_model"])
    return {
        **known,
        "training": json.dumps(public_settings(settings) | {"step": step}, sort_keys=True),
        "command_line": command,
        "versions": json.dumps(versions()),
    }
