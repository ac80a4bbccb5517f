"""The studio in the browser: teach a model a subject, watch it learn, compare, download.

    apt-diffusion studio                                                       # offline, with the embedded model
    apt-diffusion studio --model stable-diffusion-v1-5/stable-diffusion-v1-5   # a hub id, or a folder

Needs `pip install "apt-diffusion[demo]"`. `python app.py` of a checkout is the same command; see docs/studio.md.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from ..training.scripts import trainer_script


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """Flags of the command; ends the process with a message for those that cannot be used."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model",
        default="miniature-emoji",
        help="a Stable Diffusion, by name or folder (default: the embedded emoji)",
    )
    add(
        "--adapters",
        type=Path,
        default=Path("out/studio"),
        metavar="DIR",
        help="folder of adapters that everybody sees; visitors' own work is kept in a hidden folder inside it "
        "(default: out/studio)",
    )
    add(
        "--listen",
        nargs="?",
        const="0.0.0.0",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="let other computers in; without an address: on all of this computer's (default: this computer only)",
    )
    add("--port", type=int, default=7860, help="default: %(default)s")
    add("--share", action="store_true", help="open a public tunnel through gradio.live: everybody who has the link")
    add("--queue-size", type=int, default=32, help="requests that may wait for the model (default: %(default)s)")
    add("--max-train-steps", type=int, default=2000, help="steps that a visitor may train (default: %(default)s)")
    args = parser.parse_args(argv)
    for flag, value in (("--queue-size", args.queue_size), ("--max-train-steps", args.max_train_steps)):
        if value < 1:
            parser.error(f"{flag} must be at least 1, got {value}")
    if Path(args.model).expanduser().is_dir():
        args.model = str(Path(args.model).expanduser().resolve())
    return args


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Serves the studio until it is interrupted; ends the process with a sentence where it cannot."""
    args = parse_args(argv, prog)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder below is removed, too
    with tempfile.TemporaryDirectory(prefix="apt-studio-", ignore_cleanup_errors=True) as folder:
        # Before Gradio is imported: no statistics sent anywhere, and its copies of pictures where only we can read.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": f"{folder}/shown"}
        try:
            from .pages.site import build_site, serve
        except ModuleNotFoundError as error:
            sys.exit(f'{error.name} is not installed: `pip install "apt-diffusion[demo]"`.')
        from .studio import Studio

        try:
            studio = Studio(args.model, args.adapters, trainer_script("sd"), args.max_train_steps)
        except (OSError, ValueError) as error:
            sys.exit(f"{args.model} cannot be used as a Stable Diffusion: {error}")
        site = build_site(studio, args.queue_size)
        try:
            serve(site, args.share, server_name=args.listen, server_port=args.port)
        except OSError:
            sys.exit(
                f"The studio cannot listen on {args.listen}, port {args.port}: another program uses it, or it is no "
                "address of this computer. Choose another one with --port or --listen."
            )
