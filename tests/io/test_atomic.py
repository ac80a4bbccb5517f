"""Files and folders that are whole or not there."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from apt_diffusion.io.atomic import new_folder, replacing, write_text


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_a_file_appears_when_it_is_whole(tmp_path):
    file = tmp_path / "new" / "a.txt"
    with replacing(file) as temporary:
        temporary.write_text("one")
        assert not file.exists() and temporary.suffix == ".txt" and temporary.name.startswith(".")
    assert content(file.parent) == {"a.txt": "one"}
    with pytest.raises(OSError, match="in between"), replacing(file) as temporary:
        temporary.write_text("half")
        raise OSError("in between")
    assert content(file.parent) == {"a.txt": "one"}
    assert write_text(file, "zwei ✓") == file and content(file.parent) == {"a.txt": "zwei ✓"}


def test_others_may_read_it(tmp_path):
    mask = os.umask(0o022)
    try:
        write_text(tmp_path / "a", "x")
        with new_folder(tmp_path / "b") as folder:
            (folder / "c").write_text("x")
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644 and (tmp_path / "b").stat().st_mode & 0o777 == 0o755


def test_a_picture_is_saved_by_its_ending(tmp_path):
    with replacing(tmp_path / "a.png") as temporary:
        Image.new("RGB", (2, 2), "red").save(temporary)
    assert Image.open(tmp_path / "a.png").format == "PNG"


def test_a_folder_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "folder"
    with new_folder(target) as folder:
        (folder / "a").write_text("one")
        assert not target.exists()
    assert content(target) == {"a": "one"}
    with pytest.raises(OSError), new_folder(target) as folder:
        (folder / "b").write_text("two")
    assert content(target) == {"a": "one"}
    with new_folder(target, replace=True) as folder:
        (folder / "b").write_text("two")
    assert content(target) == {"b": "two"}
    with pytest.raises(ValueError), new_folder(target, replace=True) as folder:
        raise ValueError
    assert content(target) == {"b": "two"} and [path.name for path in target.parent.iterdir()] == ["folder"]


def test_a_kill_leaves_what_was_there(tmp_path):
    file = write_text(tmp_path / "a", "before")
    code = (
        "import os, sys\nfrom apt_diffusion.io.atomic import replacing\n"
        "with replacing(sys.argv[1]) as temporary:\n    temporary.write_text('half')\n    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)])
    assert done.returncode == -9 and file.read_text() == "before"
