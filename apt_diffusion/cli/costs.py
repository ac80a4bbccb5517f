"""`apt-diffusion costs`: the published tables, all methods on a well-known model, or one on a model of any size."""

import argparse

from ..cost_models import MODELS, compare
from ..costs import count_costs, format_published_tables, methods_with_costs


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog,
        description="What a method of adaptation adds to a frozen model: parameters, and multiply-accumulates per\n"
        "forward pass of one sample. Without flags: the two published tables, cell by cell.",
        epilog=f"examples: {prog} --model Flux.1-dev\n          "
        f"{prog} --method apt --hidden_size 768 --num_tokens 241 --num_modules 12",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=list(MODELS), metavar="MODEL", help=f"all methods on {', '.join(MODELS)}")
    parser.add_argument("--method", choices=methods_with_costs(), help="count this one")
    parser.add_argument("--hidden_size", type=int, metavar="D", help="width of the adapted modules")
    parser.add_argument("--num_tokens", type=int, metavar="N", help="tokens at each of them")
    parser.add_argument("--num_modules", type=int, metavar="M", help="how many there are")
    parser.add_argument("--num_prompts", type=int, default=200, metavar="P", help="default: %(default)s")
    parser.add_argument("--rank", type=int, default=4, metavar="R", help="of APT and LoRA (default: %(default)s)")
    parser.add_argument("--bottleneck", type=int, default=96, metavar="B", help="of adapters (default: %(default)s)")
    parser.add_argument("--unmerged", action="store_true", help="LoRA beside the weights, not added to them")
    return parser


def main(argv: list[str], prog: str) -> int:
    """Prints the counts."""
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    if args.model is not None:
        return print_model(parser, args)
    if args.method is None:
        if argv:
            parser.error("give --model or --method, or no flag at all for the published tables")
        print(format_published_tables())
        return 0
    sizes = {name: getattr(args, name) for name in ("hidden_size", "num_tokens", "num_modules")}
    sizes |= {name: getattr(args, name) for name in ("num_prompts", "rank", "bottleneck")}
    for name, value in sizes.items():
        if value is None:
            parser.error(f"--method needs --{name}")
        if value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    costs = count_costs(args.method, merged=not args.unmerged, **sizes)
    print(f"{args.method}: {costs.parameters:,} parameters, {costs.macs / 1e9:.4f} GMAC per forward pass")
    return 0


def print_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Prints what every method adds to a well-known model."""
    own = {"--method": args.method, "--hidden_size": args.hidden_size, "--num_modules": args.num_modules}
    for flag in [flag for flag, value in own.items() if value is not None]:
        parser.error(f"--model knows its modules, and counts all methods: leave {flag} out")
    model = MODELS[args.model]
    tokens = model.tokens if args.num_tokens is None else args.num_tokens
    try:
        table = compare(args.model, args.num_prompts, args.rank, tokens, args.bottleneck, merged=not args.unmerged)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.model}, {tokens} {model.tokens_mean}")
    for label, costs in table.items():
        print(f"{label:<26}{costs.parameters:>14,} parameters{costs.macs / 1e9:>12.4f} GMAC")
    return 0
