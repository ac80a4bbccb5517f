#!/usr/bin/env python
"""Writes docs/refusals.md, "What it refuses, and why", from the errors that the code can raise.

    python tools/refusals.py            # after a change of messages; a test compares the page with the code

Every `raise` with a message in the package and the trainers becomes a line, in the order of the files. What a message
fills in while it runs stands between ‹ and ›.
"""

import argparse
import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "refusals.md"

INTRODUCTION = """\
# What it refuses, and why

An error comes before the expensive part, names its cause and mostly the remedy, and leaves everything as it was: a
model half attached, a file half written or a night of training on the wrong data costs more than a sentence. This page
is made from the code by `python tools/refusals.py`; what a message fills in stands between ‹ and ›. Errors are
`ValueError`s where no other class is given; (flags) marks messages of the command line.
"""


@dataclass(frozen=True)
class Subject:
    """A chapter of the page.

    Args:
        title: its heading.
        why: a paragraph that holds for all of its errors.
        places: beginnings of paths within the repository; a file belongs to the subject with the longest one.
    """

    title: str
    why: str
    places: tuple[str, ...]


SUBJECTS = (
    Subject(
        "Attaching and steering adapters",
        "APT corrects the output of an attention module before the residual. A module that hides this output, an "
        "unknown name or a weight that is no number would change results without a word. Everything is checked for "
        "all components before the first one is changed.",
        ("apt_diffusion/",),
    ),
    Subject(
        "Adapter files",
        "Files come from strangers: nothing pickled is read, no name leads out of the folder given, sizes are "
        "compared with the model before memory is taken. Loading is all or nothing, and a swap into a running "
        "model may only change values, never shapes.",
        ("apt_diffusion/io/", "apt_diffusion/serving/store.py"),
    ),
    Subject(
        "Pipelines",
        "A pipeline keeps the settings of a call and those of the model apart. Arguments without effect are refused.",
        ("apt_diffusion/pipelines/",),
    ),
    Subject(
        "The methods of the comparison, and costs",
        "A comparison is worth something if every method is what it says. One method at a time is attached, "
        "settings that it does not have are refused, and a file is compared with the model before it changes "
        "anything.",
        ("apt_diffusion/baselines/", "apt_diffusion/cost", "apt_diffusion/training/methods.py"),
    ),
    Subject(
        "Every training run",
        "A run that goes on is exactly the run that was stopped, so nothing that decides its course may "
        "differ; and an error in one process ends all of them.",
        ("apt_diffusion/training/",),
    ),
    Subject(
        "Training a subject",
        "All flags, captions, pictures and the base's configuration are looked at before weights are loaded.",
        ("apt_diffusion/training/text_to_image/", "train/train_apt_sd.py"),
    ),
    Subject(
        "Training vision-language models",
        "Flags that cannot take effect together are refused on the command line, data in which the end of the "
        "run cannot work before the first step.",
        ("apt_diffusion/training/vision_language/", "train/"),
    ),
    Subject(
        "Pictures and data sets",
        "A data set is read in its official layout or from the hub; what is missing or of another kind is "
        "named, with the file. Paths in a data set never lead out of its folder, and a picture's size is seen "
        "before it is decoded.",
        ("apt_diffusion/data/",),
    ),
    Subject(
        "Models",
        "Models refuse configurations and inputs that they would compute something wrong for.",
        ("apt_diffusion/models/",),
    ),
    Subject(
        "Official checkpoints",
        "A conversion accounts for every tensor: one that no rule knows, or that is missing, ends it. Pickled "
        "checkpoints are read as tensors only.",
        ("apt_diffusion/convert/",),
    ),
    Subject(
        "Studio and service",
        "What a browser or a client sends is bounded in number, size and kind before any work starts.",
        ("apt_diffusion/studio/", "apt_diffusion/serving/"),
    ),
    Subject(
        "Command line and embedded models",
        "A word that is none of the known ones is answered with the nearest of them.",
        ("apt_diffusion/cli/", "apt_diffusion/miniature/"),
    ),
    Subject(
        "Exports",
        "A graph that does something else than the model is worth less than none: the folder is written when all of "
        "it is there, and was compared with the model.",
        ("apt_diffusion/export/",),
    ),
    Subject(
        "Other libraries",
        "APT inside other programs keeps their rules, and says where both cannot hold.",
        ("apt_diffusion/integrations/", "apt_diffusion/peft"),
    ),
)


# Methods whose result is best described by what they are called on.
OF_THE_VALUE = (
    "item",
    "keys",
    "values",
    "items",
    "strip",
    "lower",
    "upper",
    "removeprefix",
    "rpartition",
    "partition",
)


def refusals(text: str) -> list[str]:
    """The messages of a file's `raise` statements as Markdown, each once, in order."""
    tree = ast.parse(text)
    constants = {
        target.id: node.value
        for node in tree.body if isinstance(node, ast.Assign)
        for target in node.targets if isinstance(target, ast.Name)
    }  # fmt: skip
    found = []
    for error in sorted(errors(tree), key=lambda error: error.lineno):
        kind, message = ast.unparse(error.func), error.args[0]
        if isinstance(message, ast.Name):
            message = constants.get(message.id, message)
        if has_text(message) and kind != "AttributeError":
            kind = "" if kind == "ValueError" else " (flags)" if kind == "parser.error" else f" (`{kind}`)"
            found.append(escaped(worded(message)) + kind)
    return list(dict.fromkeys(found))


def errors(tree: ast.AST) -> Iterator[ast.Call]:
    """The errors with a message that a file raises, and its calls of `parser.error`."""
    for node in ast.walk(tree):
        error = node.exc if isinstance(node, ast.Raise) else node
        is_usage = isinstance(error, ast.Call) and ast.unparse(error.func) == "parser.error"
        if isinstance(error, ast.Call) and error.args and (isinstance(node, ast.Raise) or is_usage):
            yield error


def has_text(node: ast.expr) -> bool:
    """Whether a message has words of its own, other than those of an error that it passes on."""
    return any(
        isinstance(part, ast.Constant) and isinstance(part.value, str) and re.search(r"\w{3}", part.value)
        for part in ast.walk(node)
    )


def is_constant(node: ast.expr) -> bool:
    """Whether an expression has no name in it."""
    return not any(isinstance(part, ast.Name | ast.Attribute) for part in ast.walk(node))


def worded(node: ast.expr) -> str:
    """An expression as a reader of the message sees it."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(worded(part) for part in parts)
        case ast.FormattedValue(value=value):
            return inserted(value)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return worded(left) + worded(right)
        case ast.IfExp(body=body, orelse=orelse):
            return " / ".join(text for text in (worded(body), worded(orelse)) if text.strip())
    return inserted(node)


def inserted(node: ast.expr) -> str:
    """What stands in the place of a value."""
    if isinstance(node, ast.Constant | ast.JoinedStr) or (isinstance(node, ast.IfExp) and has_text(node)):
        return worded(node)
    return f"‹{named(node)}›"


def named(node: ast.expr) -> str:
    """A short name for the value of an expression."""
    match node:
        case ast.Attribute(value=ast.Call(func=ast.Name(id="type"), args=[argument]), attr="__name__"):
            return f"class of {named(argument)}"
        case ast.Attribute(value=value, attr="__name__"):
            return named(value)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return worded_name(name)
        case ast.Call(func=ast.Name(id="len"), args=[argument]):
            return f"number of {named(argument)}"
        case ast.Call(func=ast.Attribute(attr="join"), args=[argument]):
            return named(argument)
        case ast.Call(func=ast.Attribute(value=value, attr=name)) if name != "get":
            return named(value) if name in OF_THE_VALUE else worded_name(name)
        case ast.Call(args=[argument, *_]):
            return named(argument)
        case ast.Subscript(slice=ast.Constant(value=str(name))):
            return worded_name(name)
        case ast.Subscript(value=value) | ast.Starred(value=value):
            return named(value)
        case ast.ListComp(generators=[first, *_]) | ast.GeneratorExp(generators=[first, *_]):
            return named(first.iter)
        case ast.BinOp(left=left, right=right) if not is_constant(node):
            return named(right if is_constant(left) else left)
        case ast.BoolOp(values=[first, *_]):
            return named(first)
        case ast.List(elts=[first, *_]) | ast.Tuple(elts=[first, *_]):
            return named(first)
    return ast.unparse(node)


def worded_name(name: str) -> str:
    """`adapter_name` as "adapter name"."""
    return name.strip("_").replace("_", " ").lower()


def escaped(text: str) -> str:
    """Text in which Markdown finds code between backquotes and nothing else; on one line."""
    parts = " ".join(text.split()).split("`")
    for index in range(0, len(parts), 2):
        plain = parts[index].replace("<", "&lt;").replace(">", "&gt;")
        parts[index] = re.sub(r"([\\*]|\b_|_\b)", r"\\\1", plain)
    return "`".join(parts)


def subject_of(path: str) -> Subject:
    """The subject with the longest beginning of `path`."""
    found = [(len(place), subject) for subject in SUBJECTS for place in subject.places if path.startswith(place)]
    return max(found, key=lambda pair: pair[0])[1]


def chapters() -> Iterator[tuple[Subject, list[tuple[str, list[str]]]]]:
    """`(subject, [(module, its messages)])` of every subject that has some."""
    files = [*sorted((ROOT / "apt_diffusion").rglob("*.py")), *sorted((ROOT / "train").glob("*.py"))]
    names = [file.relative_to(ROOT).as_posix() for file in files]
    for subject in SUBJECTS:
        found = [(name, refusals((ROOT / name).read_text("utf-8"))) for name in names if subject_of(name) is subject]
        if any(messages for _, messages in found):
            yield subject, [(name, messages) for name, messages in found if messages]


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    for subject, modules in chapters():
        lines += [f"## {subject.title}", "", textwrap.fill(subject.why, 119), ""]
        for name, messages in modules:
            lines += [f"`{name}`", "", *(f"- {message}" for message in messages), ""]
    return "\n".join(lines)


def main() -> None:
    """Writes the page, or with --check only says whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; status 1 where the page is not up to date"
    )
    text = page()
    if parser.parse_args().check:
        raise SystemExit(0 if PAGE.is_file() and PAGE.read_text("utf-8") == text else 1)
    PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
