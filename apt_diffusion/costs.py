"""What each method of adaptation costs: parameters and multiply-accumulates, in closed form and measured.

`python -m apt_diffusion.costs` compares the closed forms with the two tables of the paper's repository, cell by cell.
Symbols: m modules, N tokens, d width, p prompts, r rank, b bottleneck. One multiply-accumulate counts once, a layer
norm 5 per element, everything else elementwise and softmax nothing: the convention of these tables.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .baselines import Costs, get_method, method_names


def methods_with_costs() -> tuple[str, ...]:
    """Names of the registered methods that bring a closed form."""
    return tuple(name for name in method_names() if get_method(name).has_costs)


def count_costs(
    method: str,
    *,
    hidden_size: int,
    num_tokens: int | Sequence[int],
    num_modules: int,
    num_prompts: int | None = None,
    rank: int | None = None,
    bottleneck: int | None = None,
    merged: bool = True,
    **settings: Any,
) -> Costs:
    """Parameters and multiply-accumulates that a method adds, by its closed form (`Method.costs`).

    - `apt`: m (pd + 2dr + 1); Σ 2pdN for affinities and values, and 2pdr per module for the keys.
    - `deep_prompt` in every layer's keys, values and queries (ViLT): m pd; Σ (3pd² + 2Npd).
    - `shallow_prompt`, p tokens carried through m whole transformer layers: pd; Σ (12pd² + 2d((N + p)² - N²)).
    - `lora` on query and value: 4mdr; nothing once merged, else Σ 4drN.
    - `adapter`, a bottleneck per module: m (2db + b + d); Σ 2dbN.
    - `scaled_pa`, the same in parallel to the module after a layer norm: m (2db + b + d + 2d); Σ (2dbN + 5dN).

    Args:
        method: the name of a registered method that brings a closed form.
        hidden_size: d.
        num_tokens: N at every module, or one number per module where they differ (METER's two towers).
        num_modules: m.
        num_prompts, rank, bottleneck: p, r, b; the method's defaults (200, 4, 96) if `None`. A method leaves out those
            that it does not have, so that the same arguments serve for all.
        merged: whether LoRA's matrices are added to the weights.
        settings: of a method that has others.

    Raises:
        ValueError: for a method that is unknown or has no closed form, a setting that it does not have, or a list of
            tokens that does not have one number per module.
    """
    tokens = [num_tokens] * num_modules if isinstance(num_tokens, int) else list(num_tokens)
    if len(tokens) != num_modules:
        raise ValueError(f"num_tokens has {len(tokens)} numbers for {num_modules} modules.")
    found = get_method(method)
    known = inspect.signature(found.costs).parameters
    unknown = sorted(set(settings) - set(known))
    if unknown and found.has_costs:
        raise ValueError(f"What {method!r} costs does not depend on {', '.join(unknown)}.")
    shared = {"num_prompts": num_prompts, "rank": rank, "bottleneck": bottleneck, "merged": merged}
    given = {name: value for name, value in shared.items() if name in known and value is not None}
    return found.costs(hidden_size, tokens, **given, **settings)


def measure_macs(run: Callable[[], Any]) -> int:
    """Multiply-accumulates of the matrix products, convolutions and attentions that `run` does, as torch counts them.

    The cost of a method is the difference of two measurements; it equals the closed form where that has matrix
    products only (`lora` unmerged, `apt`, `adapter`, the prompts).
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The plain attention kernel: torch does not count the fused one of the CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


# The published tables, which count with 200 prompts, rank 4, bottleneck 96 and width 768.
VILT = {"hidden_size": 768, "num_tokens": 241, "num_modules": 12}  # 40 words, 200 patches, [CLS]
METER = {"hidden_size": 768, "num_tokens": [40] * 12 + [577] * 12, "num_modules": 24}  # self and cross attention


class Cell(NamedTuple):
    """One row of a published table, and what the closed form gives."""

    table: str
    method: str
    formula: str
    parameters: int | None
    macs: int | None
    published: tuple[str, str]  # parameters in millions, multiply-accumulates in billions
    note: str = ""


def meter_deep_prompt_macs(num_tokens: int = 365, num_prompts: int = 200, hidden_size: int = 768) -> int:
    """The only reading that gives the published 13.05 G: p tokens carried through six whole cross layers at 288 px."""
    n, p, d = num_tokens, num_prompts, hidden_size
    return 6 * (16 * p * d**2 + 2 * d * ((n + p) ** 2 - n**2) + 15 * p * d)


def published_tables() -> list[Cell]:
    """Every cell of the two tables, with the closed form that reproduces it or the reason why none does."""

    def cell(
        table: str, method: str, formula: str, published: tuple[str, str], note: str = "", **changes: Any
    ) -> Cell:
        sizes = (VILT if table == "ViLT" else METER) | changes
        costs = count_costs(method, **sizes)
        return Cell(table, method, formula, costs.parameters, costs.macs, published, note)

    towers: dict[str, Any] = {"num_modules": 36, "num_tokens": ([40] * 18) + ([577] * 18)}
    return [
        cell("ViLT", "apt", "12(pd+2dr+1); 12(2pdN+2pdr)", ("1.92", "0.91"), "0.91 is a difference of rounded totals"),
        cell("ViLT", "deep_prompt", "12pd; 12(3pd²+2Npd)", ("1.84", "5.14"), "5.1444 with 5pd per layer norm"),
        cell("ViLT", "lora", "12·4dr; merged", ("0.15", "0")),
        cell("ViLT", "scaled_pa", "12(2db+b+3d); 12(2dbN+5dN)", ("1.80", "0.44"), "the released code has b = 204"),
        cell("ViLT", "adapter", "24(2db+b+d); 24·2dbN", ("3.56", "0.86"), "0.8579 with biases", num_modules=24),
        Cell(
            "ViLT", "full", "111,595,008 + d", 111_595_008 + 768, 0, ("115.43", "0"),
            "115.43 only with 24(pd+2dr+1) = 3,833,880 of APT counted in",
        ),
        cell("METER", "apt", "24(pd+2dr+1); 12·2pd·617+24·2pdr", ("3.83", "2.31"), "difference of rounded totals"),
        Cell(
            "METER", "deep_prompt", "24pd; see meter_deep_prompt_macs", 24 * 200 * 768, meter_deep_prompt_macs(),
            ("3.68", "13.05"), "at 288 px, the other rows at 384; 3.68 is 2 × 1.84; the released code costs 3.97 G",
        ),
        cell("METER", "lora", "24·4dr; merged", ("0.29", "0")),
        cell(
            "METER", "scaled_pa", "24(2db+b+3d); 12(2db+5d)·617", ("3.82", "1.12"),
            "3.82 needs b = 102, 1.12 needs b = 96: no one bottleneck gives both",
        ),
        cell("METER", "adapter", "36(2db+b+d); 18·2db·617", ("5.34", "1.64"), **towers),
        Cell(
            "METER", "full", "319,474,688 + d", 319_474_688 + 768, 0, ("323.31", "0"),
            "323.31 only with 24(pd+2dr+1) = 3,833,880 of APT counted in",
        ),
    ]  # fmt: skip


def format_published_tables() -> str:
    """Both tables as Markdown."""
    lines = [
        "| model | method | formula (parameters; MAC) | parameters | published (M) | GMAC | published | note |",
        "|---" * 8 + "|",
    ]
    for row in published_tables():
        parameters = "-" if row.parameters is None else f"{row.parameters:,}"
        macs = "-" if row.macs is None else f"{row.macs / 1e9:.4f}"
        lines.append(
            f"| {row.table} | {row.method} | {row.formula} | {parameters} | {row.published[0]} | {macs} "
            f"| {row.published[1]} | {row.note} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(format_published_tables())
