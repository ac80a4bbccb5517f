"""Tests use public names only, and every public name says what it is."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def test_every_test_file_has_a_name_of_its_own():
    # pytest imports test files by their bare names: of two with one name it refuses the second.
    counts = Counter(path.name for path in TESTS)
    assert [name for name, count in counts.items() if count > 1] == []


def undocumented(path: Path) -> Iterator[str]:
    """Public classes, functions and methods without a docstring. Overridden dunders say nothing new."""
    module = ast.parse(path.read_text())
    if ast.get_docstring(module) is None and path.read_text().strip():
        yield f"{path.relative_to(ROOT)} (the file)"
    stack: list[tuple[str, ast.AST]] = [("", module)]
    while stack:
        prefix, parent = stack.pop()
        for node in getattr(parent, "body", []):
            if isinstance(node, ast.If | ast.Try | ast.With):
                stack.append((prefix, node))
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if node.name.startswith("_"):
                continue
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            is_overload = any(name.endswith(("overload", ".setter")) for name in decorators)
            if ast.get_docstring(node) is None and not is_overload:
                yield f"{path.relative_to(ROOT)}:{node.lineno} {prefix}{node.name}"
            if isinstance(node, ast.ClassDef):
                stack.append((f"{prefix}{node.name}.", node))


@pytest.mark.parametrize("folder", ["apt_diffusion", "train"])
def test_every_public_name_has_a_docstring(folder):
    assert not [missing for path in SOURCES if path.is_relative_to(ROOT / folder) for missing in undocumented(path)]
