"""Pages of the site that no file in docs/ holds: README as the first one, and one for each module of the package."""

import ast
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "apt_diffusion"
PROJECT = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
# Programs and scripts: their --help says more than their functions.
LEFT_OUT = {"__main__", "cli", "scripts"}

sys.path.insert(0, str(ROOT))


def definitions() -> dict[str, list[str]]:
    """Public classes and functions of every module that has some, packages before what is in them."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if LEFT_OUT & set(parts):
            continue
        nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        names = [node.name for node in nodes if not node.name.startswith("_")]
        if names:
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = names
    return found


def on_config(config: Any) -> Any:
    """The menu: guides, the API by folder of the package, the project."""
    guides = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    api: dict[str, list[dict[str, str]]] = {}
    for module in definitions():
        parts = module.split(".")
        group = parts[1] if len(parts) > 2 or (PACKAGE / parts[-1]).is_dir() else "apt_diffusion"
        api.setdefault(group, []).append({".".join(parts[1:]): f"api/{module}.md"})
    config.nav = [
        {"Home": "index.md"},
        {"Guides": guides},
        {"API": ["api/index.md", *({group: pages} for group, pages in api.items())]},
        {"Project": list(PROJECT.values())},
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages to those of docs/."""
    pages = {"index.md": (ROOT / "README.md").read_text(), "api/index.md": public_names()}
    pages |= {page: (ROOT / file).read_text() for file, page in PROJECT.items()}
    pages |= {f"api/{module}.md": f"# {module}\n\n::: {module}\n" for module in definitions()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that hold in the repository, as links between pages of the site."""
    markdown = (
        markdown.replace("](docs/", "](").replace("](../README.md", "](index.md").replace("](README.md", "](index.md")
    )
    for file, page in PROJECT.items():
        markdown = markdown.replace(f"](../{file}", f"]({page}").replace(f"]({file}", f"]({page}")
    return markdown


def public_names() -> str:
    """What `from apt_diffusion import ...` gives, with links where a name stands in a module as it is."""
    import apt_diffusion

    home = {name: module for module, names in definitions().items() for name in names}
    lines = [
        "# API",
        "",
        "`from apt_diffusion import ...` gives these names, each imported when it is first used:",
        "",
    ]
    for name in apt_diffusion.__all__:
        link = f"[`{name}`][{home[name]}.{name}] in `{home[name]}`" if name in home else f"`{name}`"
        lines.append(f"- {link}")
    return "\n".join(lines) + "\n"
