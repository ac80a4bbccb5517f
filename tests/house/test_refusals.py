"""docs/refusals.md has every error that the code can raise, in words that a reader of the message would see."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import refusals

CODE = """
GONE = "It is gone."

def check(value, names, kind, parser, wide):
    if kind == 1:
        raise ValueError(f"{value!r} must be one of {sorted(names)}, got {len(names)}, {type(value).__name__}")
    if kind == 2:
        raise TypeError("First " f"{'narrow' if not wide else 'wide'} {', '.join(n for n in names)}" + " third.")
    if kind == 3:
        raise ValueError(GONE)
    if kind == 4:
        raise ValueError(GONE)
    if kind == 5:
        parser.error("a*b needs `c*d` <now>")
    try:
        names[0] = value.config["some_key"]
    except KeyError as error:
        raise ValueError(str(error)) from error
    raise AttributeError(f"no attribute {value}")
"""


def test_messages_as_a_reader_sees_them():
    assert refusals.refusals(CODE) == [
        "‹value› must be one of ‹names›, got ‹number of names›, ‹class of value›",
        "First narrow / wide ‹names› third. (`TypeError`)",
        "It is gone.",
        r"a\*b needs `c*d` &lt;now&gt; (flags)",
    ]


def test_a_file_belongs_to_the_narrowest_subject():
    titles = {path: refusals.subject_of(path).title for path in ("apt_diffusion/api.py", "apt_diffusion/io/load.py")}
    assert titles["apt_diffusion/api.py"] == "Attaching and steering adapters"
    assert titles["apt_diffusion/io/load.py"] == "Adapter files"
    assert refusals.subject_of("train/train_apt_vqa.py").title == "Training vision-language models"


def test_the_page_is_up_to_date():
    assert refusals.page() == refusals.PAGE.read_text(encoding="utf-8"), "run `python tools/refusals.py`"
