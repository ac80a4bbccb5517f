"""What the documents name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "README.md"])
def test_the_files_that_a_document_names_exist(document):
    text = (ROOT / document).read_text()
    folders = "apt_diffusion|train|tests|tools|benchmarks|examples|docs|pipelines"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]*)`|\]\((docs/[\w./-]+)\)", text))
    paths = {first or second for first, second in named}
    assert len(paths) > 5
    assert not sorted(path for path in paths if not (ROOT / path).exists())
