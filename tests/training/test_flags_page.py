"""docs/flags.md against the flags of other trainers, by name, and against our own parser."""

import json
import re
from pathlib import Path

import pytest

from apt_diffusion.training.text_to_image.arguments import build_parser

ROOT = Path(__file__).parents[2]
PEERS = json.loads((ROOT / "tests" / "support" / "peer_flags.json").read_text(encoding="utf-8"))
DIFFUSERS = {flag: {script for script, flags in PEERS["diffusers"].items() if flag in flags}
             for flags in PEERS["diffusers"].values() for flag in flags}  # fmt: skip
# Of the same name, with another meaning: the page has a row for it.
OTHER_MEANING = {"diffusers": {"guidance_scale"}, "kohya": set()}


def names(text: str) -> list[str]:
    return re.findall(r"`--([\w-]+)", text)


def section(title: str) -> tuple[list[str], list[list[str]]]:
    """The flags of the same name, and the rows of the table."""
    page = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    part = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
    listed = part.split("**The same name:**")[1].split("`.")[0] + "`"
    lines = [line for line in part.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return names(listed), rows


def ours() -> set[str]:
    return {
        option[2:] for action in build_parser()._actions for option in action.option_strings if option.startswith("--")
    }


@pytest.mark.parametrize(
    ("title", "peer", "known"),
    [("diffusers", "diffusers", set(DIFFUSERS)), ("kohya's scripts", "kohya", set(PEERS["kohya"]))],
)
def test_every_flag_of_a_peer_is_on_the_page_once(title, peer, known):
    same, rows = section(title)
    other = [flag for row in rows for flag in names(row[0])]
    assert sorted(same + other) == sorted(known)
    assert set(same) == (known & ours()) - OTHER_MEANING[peer]


def test_rows_name_the_scripts_that_have_the_flags():
    everywhere = set(PEERS["diffusers"])
    for flags, scripts, _ in section("diffusers")[1]:
        named = everywhere - {"SD"} if scripts == "all but SD" else set(scripts.split(", "))
        assert named == set().union(*(DIFFUSERS[flag] for flag in names(flags))), flags


@pytest.mark.parametrize("title", ["diffusers", "kohya's scripts"])
def test_flags_that_the_page_calls_ours_exist(title):
    # `accelerate launch` has flags of its own.
    here = [re.sub(r"`accelerate launch[^`]*`", "", row[-1]) for row in section(title)[1]]
    assert here and {flag for cell in here for flag in names(cell)} <= ours()
