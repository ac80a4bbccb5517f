"""The built wheel, in an environment of its own, and an uninstalled checkout: each does all that the other can.

The environment has the test environment's libraries through a .pth file, which does not run the .pth files there: an
editable install of this package is not found through it.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "apt_diffusion"
BUILT_FROM = ("apt_diffusion", "train", "pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE", "MANIFEST.in")
TASKS = {"vqa": "vilt", "nlvr2": "meter", "retrieval": "vilt", "classification": "clip"}
SIZES = {"vqa": 8, "nlvr2": 8, "retrieval": 4, "classification": 32}

pytestmark = pytest.mark.slow


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's variables, without those that lead to the checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | extra


def run(words: list, folder: Path, **extra: str) -> str:
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, env=clean_environment(**extra), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: the build leaves folders behind."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).is_file():
            shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    run([*pip, "--no-build-isolation", "--wheel-dir", target, source], target)
    (file,) = target.iterdir()
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a program of an environment that has this wheel, in an empty folder."""
    folder = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    binaries = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = run([binaries / "python", "-c", code], folder).strip()
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(site) / "libraries.pth").write_text("\n".join(sorted(libraries)))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", binaries / "python"]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], folder)
    work = folder / "work"
    work.mkdir()

    def start(program, *words):
        return run([binaries / program, *words], work)

    where = start("python", "-c", "import apt_diffusion; print(apt_diffusion.__file__)").strip()
    assert Path(where).is_relative_to(site)
    start.folder = work
    return start


def test_the_wheel_has_one_package_with_everything_in_it(wheel):
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        entry_points = content.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"apt_diffusion"}
    ignored = {"__pycache__"}
    source = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and not ignored & set(path.parts) and path.suffix != ".pyc"
    }
    scripts = {f"apt_diffusion/scripts/{path.name}" for path in (ROOT / "train").glob("train_apt_*.py")}
    assert len(scripts) == 5
    assert {name for name in names if ".dist-info/" not in name} == source | scripts
    assert "apt-diffusion = apt_diffusion.cli:main" in entry_points
    licences = {Path(name).name for name in names if "/licenses/" in name}
    assert licences == {name for name in ("LICENSE", "NOTICE") if (ROOT / name).is_file()}


def test_every_command_explains_itself(installed):
    listed = installed("apt-diffusion", "--help")
    commands = re.findall(r"^  ([a-z]+) {2,}", listed, re.MULTILINE)
    assert {"train", "generate", "studio", "convert", "costs"} <= set(commands)
    helps = [[name] for name in commands if name != "train"]
    helps += [["train"], *(["train", name] for name in ("sd", "vqa", "nlvr2", "retrieval", "clip"))]
    code = f"""
import contextlib, io
from apt_diffusion.cli import main
for words in {helps!r}:
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            status = main([*words, "--help"])
    except SystemExit as end:
        status = end.code or 0
    assert status == 0, words
    name = " ".join(["apt-diffusion", *words])
    assert text.getvalue().startswith("usage: " + name), text.getvalue()
    assert len(text.getvalue().splitlines()) > 8, words
"""
    installed("python", "-c", code)


def test_it_teaches_and_draws(installed):
    pictures = installed.folder / "pictures"
    pictures.mkdir()
    for index in range(2):
        Image.new("RGB", (64, 64), (80 * index, 40, 200)).save(pictures / f"{index}.png")
    flags = ["--pretrained_model_name_or_path", "miniature", "--instance_data_dir", "pictures", "--report_to", "none"]
    flags += ["--instance_prompt", "a sks glyph", "--output_dir", "out", "--num_prompts", "4"]
    flags += ["--max_train_steps", "1", "--train_batch_size", "1", "--num_validation_images", "0"]
    installed("apt-diffusion", "train", "sd", *flags)
    card = (installed.folder / "out" / "README.md").read_text()
    assert "apt-diffusion train sd --pretrained_model_name_or_path miniature" in card
    drawn = installed(
        "apt-diffusion", "generate", "a sks glyph", "--adapter", "out:0.5", "--steps", "1", "--output", "glyph.png"
    )
    assert drawn.split() == ["glyph.png"] and Image.open(installed.folder / "glyph.png").size == (64, 64)


@pytest.mark.parametrize("task", TASKS)
def test_it_teaches_a_vision_language_model(installed, task):
    trainer = "clip" if task == "classification" else task
    sizes = [word for split in ("train", "val", "test") for word in (f"--{split}", SIZES[task])]
    installed("python", "-m", "apt_diffusion.miniature.tasks", task, "--output_dir", f"data/{task}", *sizes)
    flags = ["--model_name_or_path", f"miniature-{TASKS[task]}", "--data_dir", f"data/{task}"]
    flags += ["--output_dir", f"out/{task}", "--max_train_steps", "1", "--num_prompts", "4", "--report_to", "none"]
    flags += {"clip": ["--num_shots", "1", "--train_batch_size", "4"]}.get(trainer, ["--train_batch_size", "2"])
    installed("apt-diffusion", "train", trainer, *flags)
    assert (installed.folder / "out" / task / "pytorch_apt_weights.safetensors").is_file()


def test_an_uninstalled_checkout_has_the_commands(tmp_path):
    """`-S`: not even the environment's own .pth files are read."""
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    path = os.pathsep.join([str(ROOT), *sorted(libraries)])
    code = (
        "import apt_diffusion, apt_diffusion.training.scripts as scripts; "
        "from apt_diffusion import StableDiffusionAPTPipeline; "
        "print(apt_diffusion.__file__, scripts.trainer_script('sd'), scripts.is_installed(), sep='\\n')"
    )
    lines = run([sys.executable, "-S", "-c", code], tmp_path, PYTHONPATH=path).splitlines()
    assert lines == [str(PACKAGE / "__init__.py"), str(ROOT / "train" / "train_apt_sd.py"), "False"]
    words = [sys.executable, "-S", "-m", "apt_diffusion", "train", "vqa", "--help"]
    assert "--data_dir" in run(words, tmp_path, PYTHONPATH=path)
    assert "--adapters" in run([sys.executable, "-S", ROOT / "app.py", "--help"], tmp_path, PYTHONPATH=path)
