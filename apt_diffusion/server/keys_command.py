"""Add, remove and list the API keys of a server. The file has their hashes only: a key is shown once.

apt-diffusion keys add alice --keys keys.json
apt-diffusion keys add app --keys keys.json --scopes generate --adapters "cat-*" --requests_per_minute 60
apt-diffusion keys list --keys keys.json
apt-diffusion keys remove alice --keys keys.json
"""

import argparse
import sys

from .keys import SCOPES, Key, add_key, read_keys, remove_key


def build_parser(prog: str | None) -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True, metavar="add | list | remove")
    add = actions.add_parser("add", help="make a key and print it")
    add.add_argument("name", help="whose it is, for the log")
    add.add_argument("--scopes", nargs="+", choices=SCOPES, default=list(SCOPES), help="default: both")
    add.add_argument("--adapters", nargs="+", metavar="PATTERN", help='such as "cat-*" (default: all)')
    add.add_argument("--requests_per_minute", type=int, default=Key.requests_per_minute, help="default: %(default)s")
    add.add_argument(
        "--concurrent", type=int, default=Key.concurrent, help="requests at a time (default: %(default)s)"
    )
    remove = actions.add_parser("remove", help="a running server forgets it at once")
    remove.add_argument("name")
    for action in (add, remove, actions.add_parser("list", help="names and limits")):
        action.add_argument("--keys", required=True, metavar="FILE")
    return parser


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Runs the command; returns the exit status."""
    args = build_parser(prog).parse_args(argv)
    try:
        if args.action == "add":
            print(add_key(args.keys, args.name, args.scopes, args.adapters, args.requests_per_minute, args.concurrent))
        elif args.action == "remove":
            remove_key(args.keys, args.name)
        else:
            for key in read_keys(args.keys).values():
                adapters = "all adapters" if key.adapters is None else ", ".join(key.adapters)
                limits = f"{key.requests_per_minute} pictures a minute, {key.concurrent} requests at a time"
                print(f"{key.name}: {' and '.join(key.scopes)}; {adapters}; {limits}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
