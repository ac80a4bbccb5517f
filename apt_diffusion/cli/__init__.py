"""The command `apt-diffusion`. A subcommand is one row of `COMMANDS`; its module is imported when it is called."""

import importlib
import sys
import textwrap
from typing import NamedTuple

from ..version import __version__


class Command(NamedTuple):
    """A subcommand: `module` (relative to `apt_diffusion`) has `main(argv: list[str], prog: str) -> int | None`."""

    module: str
    summary: str


COMMANDS = {
    "train": Command("cli.train", "teach a model: sd, vqa, nlvr2, retrieval, clip"),
    "generate": Command("cli.generate", "draw pictures with a diffusion model and adapters"),
    "export": Command("cli.export", "write a denoiser with adapters as ONNX, or as a program of torch.export"),
    "studio": Command("studio.command", "the studio in the browser: teach, draw, compare"),
    "serve": Command("server.command", "a server in the form of OpenAI's images API, for any number of adapters"),
    "keys": Command("server.keys_command", "the API keys of a server"),
    "convert": Command("convert.__main__", "turn an official checkpoint of METER, ViLT or APT into a folder"),
    "costs": Command("cli.costs", "parameters and multiply-accumulates of APT and other methods"),
}
EXAMPLES = """\
examples:
  apt-diffusion train sd --pretrained_model_name_or_path miniature --instance_data_dir pictures \\
      --instance_prompt "a sks glyph" --output_dir out --max_train_steps 200
  apt-diffusion generate "a sks glyph on a plain red background" --adapter out --output glyph.png
"""
ROOT = __package__.rpartition(".")[0]


def usage() -> str:
    """What `apt-diffusion --help` prints."""
    width = max(map(len, COMMANDS)) + 4
    rows = [f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: apt-diffusion [--help] [--version] COMMAND ...",
            "",
            "Approximated Prompt Tuning for diffusion and vision-language models.",
            "",
            "commands (each has --help):",
            *rows,
            "",
            EXAMPLES,
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status (2 for a command that does not exist)."""
    words = sys.argv[1:] if argv is None else argv
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if name == "--version":
        print(f"apt-diffusion {__version__}")
        return 0
    if name not in COMMANDS:
        print(unknown("command", name, list(COMMANDS), "apt-diffusion --help"), file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f"{ROOT}.{COMMANDS[name].module}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == ROOT:
            raise
        print(f"error: apt-diffusion {name} needs {error.name}, which is not installed.", file=sys.stderr)
        return 1
    return module.main(rest, prog=f"apt-diffusion {name}") or 0


def unknown(kind: str, given: str, known: list[str], help_command: str) -> str:
    """The error message for an unknown word, with the nearest known word."""
    import difflib

    near = difflib.get_close_matches(given, known, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    text = f"error: there is no {kind} {given!r}.{guess} There are {', '.join(known)}; see `{help_command}`."
    return textwrap.fill(text, 119, break_on_hyphens=False)
