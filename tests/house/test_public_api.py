"""The names that other code relies on."""

import subprocess
import sys

import pytest

import apt_diffusion

CONTRACT = [
    "APTAttnProcessor",
    "APTConfig",
    "ApproximatedPrompt",
    "MeterConfig",
    "MeterForImageAndTextRetrieval",
    "MeterForImagesAndTextClassification",
    "MeterForQuestionAnswering",
    "MeterModel",
    "MeterProcessor",
    "StableDiffusionAPTImg2ImgPipeline",
    "StableDiffusionAPTInpaintPipeline",
    "StableDiffusionAPTPipeline",
    "StableDiffusionXLAPTPipeline",
    "add_apt",
    "delete_apt_adapters",
    "disable_apt",
    "enable_apt",
    "enable_apt_hotswap",
    "freeze_base",
    "get_active_apt_adapters",
    "get_list_apt_adapters",
    "load_apt_weights",
    "remove_apt",
    "save_apt_weights",
    "set_apt_adapters",
    "set_apt_scale",
]


@pytest.mark.parametrize("name", CONTRACT)
def test_it_can_be_imported(name):
    assert getattr(apt_diffusion, name).__name__ == name and name in dir(apt_diffusion)


def test_all_names_exist_and_others_do_not():
    assert set(CONTRACT) <= set(apt_diffusion.__all__)
    for name in apt_diffusion.__all__:
        getattr(apt_diffusion, name)
    with pytest.raises(AttributeError, match="no attribute 'MeterForEverything'"):
        _ = apt_diffusion.MeterForEverything


def test_importing_the_package_loads_nothing_heavy():
    heavy = "{'torch', 'diffusers', 'transformers', 'numpy', 'PIL'}"
    code = f"import sys, apt_diffusion; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
