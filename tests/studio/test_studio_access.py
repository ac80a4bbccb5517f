"""Everybody can use the pages: what axe-core finds in light and dark, wide and narrow."""

import pytest
from support.studio_browser import draw, served, tab, wait_for
from support.studio_helpers import make_adapter

# Parts of Gradio that we cannot change: its file drop zones nest a button, and its code editor has roles of its own.
NOT_OURS = ["#pictures", "#shots", "#adapter-file", "[data-testid=image]", ".codemirror-wrapper", "footer"]
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def address(tmp_path_factory, tiny_sd_path):
    folder = tmp_path_factory.mktemp("studio") / "adapters"
    make_adapter(tiny_sd_path, folder / "shared")
    with served(folder, "--model", str(tiny_sd_path)) as address:
        yield address


def findings(page):
    """`rule: element` for each serious finding on what is shown."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    options = {"resultTypes": ["violations"]}
    result = axe.run(page, context={"exclude": [[part] for part in NOT_OURS]}, options=options)
    return [
        f"{violation['id']}: {node['html'][:200]}"
        for violation in result.response["violations"]
        if violation["impact"] in SERIOUS
        for node in violation["nodes"]
    ]


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1366), ("dark", 1366), ("light", 390)], ids=["light", "dark", "phone"]
)
def test_axe_finds_nothing_serious_of_our_own_making(visit, scheme, width):
    page = visit()
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    page.reload()
    page.wait_for_selector("#draw")
    draw(page, "a glyph", 1, steps=2)
    wait_for(page, "#status", "Done")
    found = {}
    for names in (["Generate"], ["Train"], ["Adapters"], ["Pictures"], ["Understand", "Ask"], ["Classify"], ["Cost"]):
        for name in names:
            tab(page, name)
            page.wait_for_timeout(400)
        found["/".join(names)] = findings(page)
    assert not {name: list_ for name, list_ in found.items() if list_}
