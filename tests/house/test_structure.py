"""Imports go one way, so that every part can be read, and used, without what builds on it."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "apt_diffusion"
# The parts that the method is: each may import those before it.
METHOD = [
    "version", "config", "equation", "memo", "offloading", "adapter_names", "wrappers", "processor", "architectures",
    "hooks", "places", "heads", "block_weights", "model", "components", "words", "calls", "api", "io.atomic",
    "io.former", "io.names", "io.public_names", "io.files", "io.save", "io.hotswap", "io.load", "io.single_file",
    "convert.single_file", "serving.store", "pipelines.prompt_tags", "pipelines.mixin", "pipelines.modular",
    "pipelines.single_file", "pipelines.factory",
]  # fmt: skip
OUTSIDE = {"train", "app", "benchmarks", "tests", "examples", "tools"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports anywhere in it."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


FILES = {module_name(path): path for path in PACKAGE.rglob("*.py")}
GRAPH = {name: {other for other in imports(path) if other in FILES} for name, path in FILES.items()}


def test_no_module_imports_itself_through_others():
    packages = {name for name, path in FILES.items() if path.name == "__init__.py"}
    graph = {name: GRAPH[name] - packages for name in GRAPH if name not in packages}
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_the_method_is_built_upwards():
    order = {f"apt_diffusion.{name}": level for level, name in enumerate(METHOD)}
    wrong = [(a, b) for a in order for b in GRAPH[a] if order.get(b, -1) >= order[a]]
    assert not wrong
    packages = {name for name, path in FILES.items() if path.name == "__init__.py"} | {"apt_diffusion.miniature"}
    outside = [(a, b) for a in order for b in GRAPH[a] - packages if b not in order and ".miniature" not in b]
    assert not outside


def test_the_package_knows_nothing_of_what_uses_it():
    for name, path in FILES.items():
        assert not OUTSIDE & {imported.split(".")[0] for imported in imports(path)}, name


def test_meter_knows_nothing_of_apt():
    for name in FILES:
        if name.startswith("apt_diffusion.models.meter"):
            assert all(other.startswith("apt_diffusion.models.meter") for other in GRAPH[name]), name


def test_the_equation_needs_torch_only():
    roots = {name.split(".")[0] for name in imports(PACKAGE / "equation.py")} - {"apt_diffusion", "typing"}
    assert roots == {"torch"}


# Folders of the package, from the ground up: each imports its own level and those below it.
LEVELS = [
    {"io"},
    {"baselines", "data", "models"},
    {"convert", "miniature"},
    {"pipelines", "serving", "export"},
    {"training"},
    {"integrations", "server", "studio"},
    {"cli"},
]


def level(name: str) -> int:
    """Modules that stand in no folder are the ground; a folder that is not in the list stands above all."""
    parts = name.split(".")
    if len(parts) < 3 and not (PACKAGE / parts[-1]).is_dir():
        return -1
    return next((index for index, folders in enumerate(LEVELS) if parts[1] in folders), len(LEVELS))


def test_folders_import_downwards():
    top = {"apt_diffusion", "apt_diffusion.__main__"}
    wrong = [(a, b) for a in GRAPH for b in GRAPH[a] - top if level(b) > max(level(a), 1) and a not in top]
    assert not wrong


def test_scripts_do_not_import_each_other():
    for path in (ROOT / "train").glob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & (OUTSIDE | {"pipelines"}) and not any(root.startswith("train") for root in roots), path


def test_no_file_is_too_long_to_read():
    folders = [PACKAGE, *(ROOT / name for name in ("train", "tests", "tools", "benchmarks", "examples"))]
    lengths = {path: len(path.read_text().splitlines()) for folder in folders for path in folder.rglob("*.py")}
    assert len(lengths) > 150
    assert not {str(path): length for path, length in lengths.items() if length > 450}
