"""Puts the scripts of train/ into the wheel, as apt_diffusion/scripts. Everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithScripts(build_py):
    """The usual build, and the scripts; an editable install runs those of the checkout."""

    def run(self) -> None:
        """Copies modules, package data and scripts to the build folder."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "apt_diffusion" / "scripts"
            self.mkpath(str(target))
            for script in sorted(Path("train").glob("train_apt_*.py")):
                self.copy_file(str(script), str(target / script.name))


setup(cmdclass={"build_py": BuildWithScripts})
