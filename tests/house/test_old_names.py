"""Modules that have moved are still imported under their old names, with a warning, and are the same things."""

import importlib
import pickle
import subprocess
import sys

import pytest

import apt_diffusion

OLD = {
    "core": ("ApproximatedPrompt", "equation"),
    "sites": ("find_modules", "places"),
    "module_cache": ("ModuleCache", "memo"),
    "attach": ("add_apt", "api"),
    "keys": ("group_tensors", "io.names"),
    "files": ("read_adapter_file", "io.files"),
    "weights": ("save_apt_weights", "io.save"),
    "loaders": ("APTLoaderMixin", "pipelines.mixin"),
    "store": ("AdapterStore", "serving.store"),
    "methods.attach": ("MethodConfig", "baselines.attach"),
    "methods.sites": ("trained_beside", "baselines.families"),
    "methods": ("__doc__", "baselines"),
    "meter": ("MeterModel", "models.meter"),
    "meter.encoder_cache": ("EncoderCache", "models.meter.encoder_cache"),
    "vilt": ("__doc__", "models.vilt"),
    "clip_classifier": ("__doc__", "models.clip_classifier"),
    "retrieval": ("__doc__", "models.retrieval"),
}


def forget(old):
    """Python warns once: of what was imported before, it says nothing."""
    top = f"apt_diffusion.{old.split('.')[0]}"
    for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
        del sys.modules[name]


@pytest.mark.parametrize("old", OLD)
def test_an_old_name_is_the_new_module(old):
    attribute, new = OLD[old]
    code = f"from apt_diffusion.{old} import {attribute}"
    forget(old)
    with pytest.warns(DeprecationWarning, match=f"apt_diffusion.{old.split('.')[0]}.* has moved: import from"):
        found = {}
        exec(code, found)
    assert found[attribute] is getattr(importlib.import_module(f"apt_diffusion.{new}"), attribute)


def test_every_old_name_is_tested():
    from apt_diffusion.old_names import OLD_NAMES

    assert {name.split(".")[0] for name in OLD_NAMES} == {name.split(".")[0] for name in OLD}
    assert {name for name in OLD_NAMES if "." in name} <= set(OLD)


def test_a_pickle_of_before_is_read():
    """A whole pickled model names its classes by module."""
    forget("core")
    with pytest.warns(DeprecationWarning):
        cls = pickle.loads(b"capt_diffusion.core\nApproximatedPrompt\n.")
    assert cls is apt_diffusion.ApproximatedPrompt


def test_the_warning_names_the_line_that_imports(tmp_path):
    script = tmp_path / "old_script.py"
    script.write_text("import apt_diffusion\nfrom apt_diffusion.core import ApproximatedPrompt\n")
    done = subprocess.run([sys.executable, "-W", "default", script], capture_output=True, text=True, check=True)
    assert "old_script.py:2: DeprecationWarning: apt_diffusion.core has moved: import from apt_diffusion.equation" in (
        done.stderr
    )


@pytest.mark.parametrize("name", ["apt_diffusion.nothing", "apt_diffusion.corex", "core"])
def test_other_names_are_unknown(name):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


def test_what_an_old_package_never_had_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'apt_diffusion\.methods\.nothing'"):
        importlib.import_module("apt_diffusion.methods.nothing")
