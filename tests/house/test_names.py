"""Tests use public names only."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("apt_diffusion", "train", "tools", "benchmarks", "examples")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def is_private(name: str) -> bool:
    return name.startswith("_") and name.strip("_") != "" and not name.startswith("__")


def private_names(tree: ast.AST) -> Iterator[str]:
    """Names with a leading underscore that a file gives to something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            names = [node.attr if isinstance(node, ast.Attribute) else node.id]
        else:
            continue
        yield from filter(is_private, names)


def uses_of_private_names(tree: ast.AST, ours: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name of every use of a private name: of a module of ours, or one that our code defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOLDERS:
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and node.attr in ours:
            if not (isinstance(node.value, ast.Name) and node.value.id == "self"):  # a test's own class
                yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value  # monkeypatch.setattr(object, "_name", ...), or "apt_diffusion.module._name"
            last = text.rpartition(".")[2]
            if last in ours and (text == last or text.startswith("apt_diffusion.")):
                yield node.lineno, text


def test_tests_use_no_private_name_of_the_package():
    ours = {name for path in SOURCES for name in private_names(ast.parse(path.read_text()))}
    assert len(ours) > 100
    # Names that torch and diffusers use, too: tests look at hooks of models, and interrupt pipelines.
    ours -= {"_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks", "_interrupt"}
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in TESTS
        for line, name in uses_of_private_names(ast.parse(path.read_text()), ours)
    ]
    assert not found
