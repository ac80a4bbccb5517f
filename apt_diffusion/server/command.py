"""Serve pictures in the form of OpenAI's images API, from one base model and a folder of adapters.

    apt-diffusion serve --adapters out                    # offline, with the embedded model, on this computer
    apt-diffusion serve --model stable-diffusion-v1-5/stable-diffusion-v1-5 --adapters adapters
    apt-diffusion keys add alice --keys keys.json         # prints a key, once
    apt-diffusion serve --adapters adapters --keys keys.json --host 0.0.0.0
    apt-diffusion serve --adapters adapters --replicas 2  # by Ray Serve, on this computer

Needs `pip install "apt-diffusion[serve]"`; see docs/server.md, also for a cluster.
"""

import argparse
import ipaddress
import logging
import sys
from dataclasses import fields
from pathlib import Path

from .settings import ServerSettings
from .signing import ALGORITHMS, signer_of

_FLAGS = {
    "max_batch_size": "pictures that are drawn at once",
    "max_queue": "requests that may wait",
    "max_device_bytes": "bytes of adapters that stay attached to the model",
    "max_pixels": "pixels of all pictures that are drawn at once (default: those of a full batch of the model's size)",
    "num_inference_steps": "denoising steps where a request names none (default: the model's)",
    "guidance_scale": "guidance where a request names none (default: the model's)",
    "max_images": "pictures of one request",
    "max_steps": "denoising steps of one picture",
    "timeout_s": "seconds that a request may take",
    "max_picture_bytes": "bytes of a picture to start from",
    "max_adapter_bytes": "bytes of an adapter that is uploaded",
}


def build_parser(prog: str | None) -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    defaults = ServerSettings()
    add(
        "--model",
        default=defaults.model,
        help="an embedded model, a folder, a hub id or a file (default: %(default)s)",
    )
    add("--base_config", metavar="PLACE", help="hub id or folder with the configuration of a base in one file")
    add("--adapters", default=defaults.adapters, metavar="DIR", help="folder of adapters (default: %(default)s)")
    add("--host", default="127.0.0.1", help="address to listen on (default: this computer only)")
    add("--port", type=int, default=8000, help="default: %(default)s")
    add("--keys", metavar="FILE", help="asks for API keys of this file (`apt-diffusion keys add`)")
    add(
        "--replicas",
        type=int,
        metavar="N",
        help="engines, each with the model, by Ray Serve (default: one, without Ray)",
    )
    add("--device", help="such as cuda or cpu (default: cuda where there is one)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on cuda, else float32")
    for name, text in _FLAGS.items():
        default = getattr(defaults, name)
        kind = float if name in ("guidance_scale", "timeout_s") else int
        text = text if default is None else f"{text} (default: {default:g})"
        add(f"--{name}", type=kind, default=default, metavar="N", help=text)
    add("--c2pa_certificate", metavar="FILE", help="PEM chain of a certificate that signs pictures (C2PA)")
    add("--c2pa_key", metavar="FILE", help="its private key")
    add("--c2pa_algorithm", default=defaults.c2pa_algorithm, choices=ALGORITHMS, help="default: %(default)s")
    add("--log_prompts", action="store_true", help="prompts stand in the log")
    add(
        "--no_embedded_settings",
        dest="embed_settings",
        action="store_false",
        help="pictures do not carry their prompt and settings; the mark that a model made them stays",
    )
    return parser


def settings_of(args: argparse.Namespace) -> ServerSettings:
    """The settings that the flags mean; `ValueError` for those that cannot be meant."""
    values = {field.name: getattr(args, field.name) for field in fields(ServerSettings)}
    for name in _FLAGS:
        if values[name] is not None and values[name] <= 0:
            raise ValueError(f"--{name} must be positive, got {values[name]}.")
    if args.replicas is not None and args.replicas < 1:
        raise ValueError(f"--replicas must be at least 1, got {args.replicas}.")
    if not values["keys"] and not _is_loopback(args.host):
        raise ValueError(f"--host {args.host} lets other computers in: make keys for them and give --keys FILE.")
    if Path(args.model).expanduser().exists():
        values["model"] = str(Path(args.model).expanduser().resolve())
    return ServerSettings(**values)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Serves until it is told to end; returns the exit status."""
    args = build_parser(prog).parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger(__package__).setLevel(logging.INFO)
    try:
        settings = settings_of(args)
        if args.replicas is not None:
            from .cluster import run

            run(settings, args.replicas, args.host, args.port)
            return 0
        from .app import build_app
        from .engines import open_engine, open_store, with_defaults
        from .keys import Keyring
        from .local import listen, serve
        from .painters import LocalPainter

        settings = with_defaults(settings)
        Keyring(settings.keys)  # files that cannot be used are told before the model loads
        signer_of(settings)
        with listen(args.host, args.port) as listener:
            engine = open_engine(settings)
            app = build_app(LocalPainter(engine), open_store(settings), settings)
            shown = f"[{args.host}]" if ":" in args.host else args.host
            logging.getLogger(__name__).info("Serving %s on http://%s:%d", settings.model, shown, args.port)
            serve(app, engine, listener)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("apt_diffusion"):
            raise
        print(f'error: {error.name} is not installed: `pip install "apt-diffusion[serve]"`.', file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
