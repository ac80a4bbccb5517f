"""Finds the trainers' scripts: `train/` of a checkout, or the folder `scripts` of an installed package."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# What each trains, by the name that `apt-diffusion train` knows it by.
TRAINERS = {
    "sd": "Stable Diffusion or Stable Diffusion XL, on a few pictures of a subject (DreamBooth)",
    "vqa": "ViLT or METER, to answer questions about pictures (VQAv2)",
    "nlvr2": "ViLT or METER, to judge statements about pairs of pictures (NLVR2)",
    "retrieval": "ViLT or METER, to find pictures for texts and texts for pictures (Flickr30K, COCO)",
    "clip": "CLIP, to tell classes of pictures apart from a few of each",
}


def scripts_folder() -> Path:
    """The folder of `train_apt_*.py`.

    Raises:
        FileNotFoundError: for a package that was copied without them.
    """
    for folder in (PACKAGE / "scripts", PACKAGE.parent / "train"):
        if (folder / "train_apt_sd.py").is_file():
            return folder
    raise FileNotFoundError(
        f"The training scripts are neither in {PACKAGE / 'scripts'} nor in {PACKAGE.parent / 'train'}: install "
        "apt-diffusion again, or run it from a whole checkout."
    )


def trainer_script(name: str) -> Path:
    """The script of one of `TRAINERS`; see `scripts_folder` for what is raised."""
    return scripts_folder() / f"train_apt_{name}.py"


def is_installed() -> bool:
    """Whether the scripts are those of an installed package, which no user has a path to."""
    return (PACKAGE / "scripts" / "train_apt_sd.py").is_file()


def shown(script: str) -> list[str]:
    """The words that start this script, as they are written down: without the path to it on this machine."""
    path = Path(script)
    name = path.stem.removeprefix("train_apt_")
    if script.startswith("apt-diffusion "):
        return script.split()
    if name in TRAINERS and is_installed():
        return ["apt-diffusion", "train", name]
    if name in TRAINERS and path.resolve().parent == PACKAGE.parent / "train":
        return [f"train/{path.name}"]
    return [script]


def environment() -> dict[str, str]:
    """Variables for a process that runs such a script: it imports this copy of the package, installed or not."""
    path = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}
