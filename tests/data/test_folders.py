"""Subfolders, and what is found in a folder: pictures, where captions come from, what is left out, what is wrong."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from apt_diffusion.data.folders import FolderOptions, find_pictures, has_pictures, scan_pictures
from apt_diffusion.data.report import report


def save(path: Path, size=(40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


@pytest.fixture
def tree(tmp_path) -> Path:
    """Pictures at three depths, with captions of each kind."""
    for name in ("a.png", "in/b.png", "in/deep/c.png", "in/deep/d.png", "3_sks dog/e.png", "3_sks dog/more/f.png"):
        save(tmp_path / name)
    rows = {"in/b.png": "from above", "in/deep/c.png": "from far above"}
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows.items()]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "in" / "metadata.jsonl").write_text(json.dumps({"file_name": "deep/c.png", "text": "from nearer"}))
    (tmp_path / "in" / "deep" / "d.txt").write_text("beside it")
    return tmp_path


def test_subfolders_are_read_with_the_nearest_caption_and_the_repeats_above_them(tree):
    found = find_pictures(tree, "default", recursive=True)
    assert [(p.path.relative_to(tree).as_posix(), p.prompt) for p in found] == [
        ("a.png", "default"),
        *[("3_sks dog/e.png", "sks dog")] * 3,
        *[("3_sks dog/more/f.png", "sks dog")] * 3,
        ("in/b.png", "from above"),
        ("in/deep/c.png", "from nearer"),
        ("in/deep/d.png", "beside it"),
    ]


def test_hidden_folders_and_links_are_not_entered(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / ".thumbnails" / "b.png")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    scan = scan_pictures(tmp_path, "x", FolderOptions(recursive=True))
    assert [picture.path.name for picture in scan.checked()] == ["a.png"]
    assert scan.left_out == {".thumbnails": "hidden", "loop": "a link to a folder"}


def test_pictures_below_are_told_of_where_nothing_else_is_there(tmp_path, caplog):
    save(tmp_path / "in" / "a.png")
    assert not has_pictures(tmp_path) and has_pictures(tmp_path, recursive=True)
    with pytest.raises(ValueError, match=r"no pictures in .* Its subfolders have some: --recursive reads them\."):
        find_pictures(tmp_path, "x")
    save(tmp_path / "b.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "in/a.png", "text": "x"}')
    with pytest.raises(
        ValueError, match=r"no picture 'in/a\.png' in this folder\. Pictures in subfolders are read with"
    ):
        find_pictures(tmp_path, "x")
    assert "(--recursive reads subfolders): in" in caplog.text
    assert len(find_pictures(tmp_path, "x", recursive=True)) == 2


@pytest.mark.parametrize("name", ["../outside.png", "in/../../outside.png"])
def test_metadata_reaches_no_picture_outside_its_folder(tmp_path, name):
    save(tmp_path / "outside.png")
    save(tmp_path / "data" / "in" / "a.png")
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    with pytest.raises(ValueError, match="there is no picture"):
        find_pictures(tmp_path / "data", "x", recursive=True)


def test_everything_that_is_wrong_is_found_at_once(tmp_path):
    save(tmp_path / "good.png")
    (tmp_path / "fake.png").write_text("no picture")
    (tmp_path / "good.txt").write_text("one")
    (tmp_path / "good.caption").write_text("two")
    (tmp_path / "metadata.jsonl").write_text('{broken\n{"file_name": "gone.png", "text": "x"}')
    save(tmp_path / "0_dog" / "a.png")
    scan = scan_pictures(tmp_path, "x")
    expected = ("0_dog has 0 repeats", "line 1", "'gone.png'", "fake.png cannot be read", "good.png has two captions")
    assert len(scan.problems) == len(expected)
    assert all(part in problem for part, problem in zip(expected, scan.problems, strict=True))
    with pytest.raises(ValueError, match=r"has 0 repeats.*\(And 4 more: --check_data lists all\.\)"):
        scan.checked()


def test_a_report_has_sizes_repeats_captions_and_reasons(tree):
    (tree / "notes.pdf").write_text("x")
    (tree / "lonely.txt").write_text("x")
    scan = scan_pictures(tree, "default\nprompt", FolderOptions("text", True, "--instance_prompt"))
    lines = report(scan, "Dogs", lambda picture: (32, 48)).splitlines()
    cells = [line.split() for line in lines if line.startswith("  ")]
    assert cells[1] == ["a.png", "40", "x", "30", "48", "x", "32", "1", "--instance_prompt", "default", "prompt"]
    assert " ".join(cells[2]) == "3_sks dog/e.png 40 x 30 48 x 32 3 the folder's name sks dog"
    assert lines[0] == f"Dogs: {tree}" and len(cells) == 7
    assert lines[8:] == [
        "6 pictures, 10 per epoch. Captions: 1 from text files, 1 from --instance_prompt, 2 from the folder's name, 2 "
        "from metadata.jsonl.",
        "Smaller than they are trained at, so that they are enlarged: 6.",
        "Left out: lonely.txt (a caption without a picture)",
        "Left out: notes.pdf (no picture)",
    ]


def test_folders_with_another_role_are_not_read_as_a_part_of_it(tmp_path):
    for name in ("a.png", "masks/a.png", "class/b.png", "class/in/c.png", "in/d.png"):
        save(tmp_path / name, (30, 20))
    masked = FolderOptions(recursive=True, masked=True, mask_folder=tmp_path / "in" / ".." / "masks")
    scan = scan_pictures(tmp_path, "x", masked, {tmp_path / "class": "the folder of the class"})
    assert [p.path.relative_to(tmp_path).as_posix() for p in scan.checked()] == ["a.png", "in/d.png"]
    assert scan.left_out == {"masks": "the folder of masks", "class": "the folder of the class"}
    within = scan_pictures(tmp_path / "class", "x", FolderOptions(recursive=True), {tmp_path / "class": "itself"})
    assert len(within.pictures) == 2
    assert not has_pictures(
        save(tmp_path / "other" / "in" / "e.png").parents[1], True, {tmp_path / "other" / "in": "the subject"}
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"file_name": "a.png", "text": null}', None),
        ('{"file_name": "a.png", "text": null}\n{"file_name": "a.png", "text": "x"}', None),
        ('{"file_name": "a.png", "text": ["x", "y"]}', "expected"),
        ('{"file_name": "a.png", "text": 5}', "expected"),
        ('{"file_name": 3, "text": "x"}', "expected"),
        ('{"file_name": "a.png", "caption": "x"}', "--caption_column names another key"),
        ("[" * 100_000, "expected"),
        ('{"file_name": "a.png", "text": "one"}\n{"file_name": "a.png", "text": "two"}', "line 2: a.png has another"),
    ],
)
def test_captions_that_are_no_text_are_refused_and_null_is_none(tmp_path, line, problem):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    scan = scan_pictures(tmp_path, "x")
    if problem is None:
        assert [picture.caption for picture in scan.checked()] == ["x"]
    else:
        (found,) = scan.problems
        assert problem in found and "line" in found


def test_the_ending_of_captions_can_be_said(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    for name, text in {"a.txt": "tags", "a.caption": "prose", "b.txt": "tags"}.items():
        (tmp_path / name).write_text(text)
    scan = scan_pictures(tmp_path, "x", FolderOptions(sidecars=(".caption",)))
    assert [picture.caption for picture in scan.checked()] == ["prose", "x"]
    assert scan.left_out == dict.fromkeys(("a.txt", "b.txt"), "a caption, where .caption files are read")
    assert "two captions, b.txt and b.caption" not in str(scan_pictures(tmp_path, "x").problems)


def test_pictures_far_below_are_told_of_and_names_that_cannot_be_are_not_called_readable(tmp_path):
    save(tmp_path / "img" / "10_sks dog" / "a.png")
    assert "Its subfolders have some: --recursive reads them." in scan_pictures(tmp_path, "x").problems[0]
    for name in ("x/.thumbs/a.png", "y/class/a.png"):
        save(tmp_path / "other" / name)
    others = {tmp_path / "other" / "y" / "class": "the folder of the class"}
    assert "--recursive" not in scan_pictures(tmp_path / "other", "x", others=others).problems[0]
    save(tmp_path / "0_x" / "a.png")
    scan = scan_pictures(tmp_path, "x")
    assert scan.left_out["0_x"] == "a folder with a number of repeats that cannot be"


@pytest.mark.parametrize("size", [(6, 6), (300, 7), (1, 1)])
def test_small_jpegs_are_read(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.jpg")
    (picture,) = find_pictures(tmp_path, "x")
    assert (picture.width, picture.height) == size


# In the trainer


def test_check_data_finds_what_stops_a_run_whose_pictures_can_be_read(go, instance_dir, tmp_path, capsys):
    shutil.copytree(instance_dir, tmp_path / "p")
    resumed = {"instance_data_dir": tmp_path / "p", "resume_from_checkpoint": "latest"}
    go("run", instance_data_dir=tmp_path / "p", checkpointing_steps=1)
    some = sorted((tmp_path / "p").iterdir())[0]
    some.with_suffix(".txt").write_text("another caption")
    with pytest.raises(SystemExit):
        go("run", check_data=True, **resumed)
    assert "Stops the run: The pictures of the subject are not those" in (printed := capsys.readouterr().out)
    assert f"{some.name} has another caption" in printed and printed.endswith("Problems that stop the run: 1.\n")
    go("run", check_data=True, allow_changed_data=True, **resumed)
    save(tmp_path / "one" / "a.png")
    with pytest.raises(SystemExit):
        go(instance_data_dir=tmp_path / "one", check_data=True, validation_split=0.5)
    assert "Stops the run: --validation_split needs two pictures" in capsys.readouterr().out


def test_a_name_that_is_no_text_does_not_stop_the_report(go, tmp_path, no_models, capsys):
    (tmp_path / "p").mkdir()
    save(tmp_path / "p" / os.fsdecode(b"caf\xe9.png"))
    go(instance_data_dir=tmp_path / "p", check_data=True)
    assert "caf\\udce9.png" in capsys.readouterr().out


def test_the_class_and_held_out_pictures_are_not_trained_on_as_the_subject(
    go, instance_dir, tmp_path, no_models, capsys
):
    shutil.copytree(instance_dir, tmp_path / "all")
    for role in ("class", "val"):
        save(tmp_path / "all" / role / f"{role}.png")
    flags = {"with_prior_preservation": True, "class_data_dir": tmp_path / "all" / "class", "class_prompt": "a dog"}
    go(instance_data_dir=tmp_path / "all", recursive=True, check_data=True,
       validation_data_dir=tmp_path / "all" / "val", **flags)  # fmt: skip
    printed = capsys.readouterr().out
    assert "class/class.png" not in printed and "val/val.png" not in printed
    assert "Left out: class (the folder of the class)" in printed and "Left out: val (held out)" in printed


def test_check_data_ends_with_a_report_before_models_are_loaded(go, tree, tmp_path, no_models, capsys, caplog):
    (tree / "3_sks dog" / "e.txt").write_text("a caption that is far too long " * 9)
    flags = {"with_prior_preservation": True, "class_data_dir": tmp_path / "none", "class_prompt": "a dog"}
    go("checked", instance_data_dir=tree, check_data=True, recursive=True, **flags)
    printed = capsys.readouterr().out
    assert "in/deep/c.png" in printed and "32 x 32" in printed and printed.endswith("Nothing stops the run.\n")
    assert "1 of 9 texts are longer than the 77 tokens" in caplog.text and caplog.text.count("e.png loses") == 1
    assert "100 missing ones will be drawn by the base model" in printed
    assert not (tmp_path / "checked").exists()
    (tree / "fake.png").write_text("no picture")
    with pytest.raises(SystemExit) as leave:
        go(instance_data_dir=tree, check_data=True, recursive=True, validation_data_dir=tmp_path / "nowhere")
    printed = capsys.readouterr().out
    assert leave.value.code == 1 and printed.endswith("Problems that stop the run: 2.\n")
    assert "Stops the run: There is no folder" in printed and "fake.png cannot be read" in printed
    with pytest.raises(ValueError, match=r"fake\.png cannot be read"):
        go(instance_data_dir=tree, recursive=True)


def test_a_run_reads_subfolders(go, instance_dir, tmp_path):
    from support.training_helpers import assert_same_adapter

    for path in instance_dir.iterdir():
        (tmp_path / "below" / "in").mkdir(parents=True, exist_ok=True)
        (tmp_path / "below" / "in" / path.name).write_bytes(path.read_bytes())
    assert_same_adapter(go(instance_data_dir=tmp_path / "below", recursive=True), go())
