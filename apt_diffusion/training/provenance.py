"""Where an adapter comes from: settings, command line and versions, with secrets taken out."""

import importlib.metadata
import json
import platform
import shlex
import sys
from typing import Any

from .scripts import shown

SECRETS = ("hub_token",)
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")


def command_line(script: str, argv: list[str] | None) -> str:
    """The command as a shell takes it; the value of a secret becomes `***`, a script's path that of a checkout."""
    words = [*shown(script), *(sys.argv[1:] if argv is None else argv)]
    hidden = []
    for index, word in enumerate(words):
        flag, equals, _ = word.partition("=")
        # argparse takes any unambiguous beginning of a flag's name.
        if equals and _is_secret(flag):
            word = f"{flag}=***"
        elif index and "=" not in words[index - 1] and _is_secret(words[index - 1]):
            word = "***"
        hidden.append(word)
    return shlex.join(hidden).replace("'***'", "***")


def _is_secret(flag: str) -> bool:
    return len(flag) > 6 and any(f"--{name}".startswith(flag) for name in SECRETS)


def versions() -> dict[str, str]:
    """Versions of Python, of this library, and of what it runs on."""
    from .. import __version__

    found = {"python": platform.python_version(), "apt-diffusion": __version__}
    for package in PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without secrets and without what was not set."""
    return {key: value for key, value in settings.items() if key not in SECRETS and value is not None}


def adapter_metadata(settings: dict[str, Any], command: str, step: int, **known: str) -> dict[str, str]:
    """Strings for the header of an adapter's file."""
    return {
        **known,
        "training": json.dumps(public_settings(settings) | {"step": step}, sort_keys=True),
        "command_line": command,
        "versions": json.dumps(versions()),
    }
