"""The studio in the browser: teach a model a subject, watch it learn, compare, download.

    apt-diffusion studio                                                       # offline, with the embedded model
    apt-diffusion studio --model stable-diffusion-v1-5/stable-diffusion-v1-5   # a hub id, or a folder

Needs `pip install "apt-diffusion[demo]"`. `python app.py` of a checkout is the same command; see docs/studio.md.
"""

import argparse
import logging
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from ..training.scripts import trainer_script
from .limits import Limits


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
    limits = Limits()
    for flag, (default, text) in {
        "--queue-size": (limits.queue, "requests that may wait for the model"),
        "--queue-per-visitor": (limits.queue_per_visitor, "of them for one visitor"),
        "--queue-per-address": (limits.queue_per_address, "of them for one address, which a classroom may share"),
        "--max-train-steps": (limits.train_steps, "steps that a visitor may train"),
        "--max-trainings": (limits.trainings, "trainings at a time"),
        "--max-trainings-per-address": (limits.trainings_per_address, "of them for one address"),
    }.items():
        add(flag, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    add(
        "--admin-token",
        metavar="TOKEN",
        default=os.environ.get("APT_STUDIO_ADMIN_TOKEN"),
        help="opens the owner's page, /studio/admin, to who knows it: at least 16 characters (default: the variable "
        "APT_STUDIO_ADMIN_TOKEN, which other users of the computer cannot read; without either there is no such page)",
    )
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if name.startswith(("queue_", "max_")) and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.admin_token is not None and len(args.admin_token) < 16:
        parser.error("--admin-token must have at least 16 characters")
    if Path(args.model).expanduser().is_dir():
        args.model = str(Path(args.model).expanduser().resolve())
    return args


def limits_of(args: argparse.Namespace) -> Limits:
    """The `Limits` that the flags set."""
    return Limits(
        args.queue_size,
        args.queue_per_visitor,
        args.queue_per_address,
        args.max_train_steps,
        args.max_trainings,
        args.max_trainings_per_address,
    )


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Serves the studio until it is interrupted; ends the process with a sentence where it cannot."""
    args = parse_args(argv, prog)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder below is removed, too
    with tempfile.TemporaryDirectory(prefix="apt-studio-", ignore_cleanup_errors=True) as folder:
        # Before Gradio is imported: no statistics sent anywhere, and its copies of pictures where only we can read.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": f"{folder}/shown"}
        try:
            from .pages.site import build_site
            from .server.serve import build_app, serve
        except ModuleNotFoundError as error:
            sys.exit(f'{error.name} is not installed: `pip install "apt-diffusion[demo]"`.')
        from .studio import Studio

        try:
            studio = Studio(args.model, args.adapters, trainer_script("sd"), limits_of(args))
        except (OSError, ValueError) as error:
            sys.exit(f"{args.model} cannot be used as a Stable Diffusion: {error}")
        app = build_app(build_site(studio), studio, args.admin_token)
        try:
            serve(app, studio, args.listen, args.port, args.share, lambda: shutil.rmtree(folder, ignore_errors=True))
        except OSError:
            sys.exit(
                f"The studio cannot listen on {args.listen}, port {args.port}: another program uses it, or it is no "
                "address of this computer. Choose another one with --port or --listen."
            )
