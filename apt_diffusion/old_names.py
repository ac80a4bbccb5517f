"""Imports modules under their former names, with a `DeprecationWarning`.

The finder is last in `sys.meta_path`, so Python calls it only for names that no file has.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

# Old name -> new names; the warning recommends the first. An old package also covers its submodules.
OLD_NAMES: dict[str, tuple[str, ...]] = {
    "core": ("equation",),
    "sites": ("architectures", "places"),
    "module_cache": ("memo",),
    "attach": ("api", "calls", "components", "model", "hooks"),
    "keys": ("io.names",),
    "files": ("io.files",),
    "weights": ("io.load", "io.save", "io.hotswap"),
    "loaders": ("pipelines.mixin",),
    "store": ("serving.store",),
    "methods": ("baselines",),
    "methods.sites": ("baselines.families",),
    "meter": ("models.meter",),
    "vilt": ("models.vilt",),
    "clip_classifier": ("models.clip_classifier",),
    "retrieval": ("models.retrieval",),
}


class OldNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports `apt_diffusion.<old name>` as a module that looks everything up under the new name."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of an old name, `None` for any other."""
        package, _, rest = fullname.partition(".")
        if package != self.package or rest.split(".")[0] not in OLD_NAMES or not all(map(_exists, self.targets(rest))):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def targets(self, old: str) -> list[str]:
        """Full names of the new modules for an old name, without the package prefix."""
        name, _, inside = ("", "", "") if old in OLD_NAMES else old.partition(".")
        if inside:
            return [f"{self.package}.{OLD_NAMES[name][0]}.{inside}"]
        return [f"{self.package}.{new}" for new in OLD_NAMES[old]]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """A module whose attributes are those of the new modules."""
        targets = self.targets(spec.name.removeprefix(f"{self.package}."))
        # Python leaves the frames of the import system out of the count: 2 is the line with the import.
        warnings.warn(f"{spec.name} has moved: import from {targets[0]}.", DeprecationWarning, stacklevel=2)
        modules = [importlib.import_module(target) for target in targets]
        return _Renamed(spec.name, modules)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run: the new modules are imported."""


class _Renamed(types.ModuleType):
    def __init__(self, name: str, modules: list[types.ModuleType]) -> None:
        super().__init__(name, modules[0].__doc__)
        self._modules = modules

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for module in vars(self)["_modules"]:
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({name for module in self._modules for name in dir(module)})


def _exists(name: str) -> bool:
    """Whether there is a module of this new name: an old module may lack what `from` names."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its package is a module
        return False


def install(package: str) -> None:
    """Makes the old names importable; every other finder goes first."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.append(OldNames(package))
