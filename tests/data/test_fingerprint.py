"""What a run's data was: names, changes of each kind, and that a resumed run refuses other data by name."""

import hashlib
import json
import shutil

import pytest
from PIL import Image
from support.training_helpers import assert_same_adapter

from apt_diffusion.data.fingerprint import changes, fingerprint
from apt_diffusion.data.folders import FolderOptions, scan_pictures


def save(path, color="red"):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (40, 40), color).save(path)
    return path


def prints(*folders, prompt="default"):
    scans = [scan_pictures(folder, prompt, FolderOptions(masked=True)) for folder in folders]
    return fingerprint([p for scan in scans for p in scan.pictures * 2], folders, ("default", None))


def test_names_do_not_depend_on_the_place_and_hashes_are_those_of_the_files(tmp_path):
    save(tmp_path / "here" / "a.png")
    (tmp_path / "here" / "a.txt").write_text("a caption")
    save(tmp_path / "here" / "b.png")
    save(tmp_path / "here" / "b-mask.png", "white")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    found = prints(tmp_path / "here")
    assert found == prints(tmp_path / "there")

    def digest(content):
        return hashlib.sha256(content).hexdigest()[:16]

    a, b, mask = ((tmp_path / "here" / name).read_bytes() for name in ("a.png", "b.png", "b-mask.png"))
    assert found == {"a.png": [digest(a), "", digest(b"a caption")], "b.png": [digest(b), digest(mask), ""]}
    both = prints(tmp_path / "here", tmp_path / "there")
    assert list(both)[2] == "a.png of folder 2 (there)" and len(both) == 4
    assert prints(tmp_path / "here", prompt="another")["b.png"][2]


def test_every_kind_of_change_is_named(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        save(tmp_path / name)
    save(tmp_path / "c-mask.png", "white")
    before = prints(tmp_path)
    assert changes(before, prints(tmp_path)) == []
    save(tmp_path / "a.png", "blue")
    (tmp_path / "a.txt").write_text("a caption")
    (tmp_path / "b.caption").write_text("a caption")
    save(tmp_path / "c-mask.png", "grey")
    (tmp_path / "d.png").unlink()
    save(tmp_path / "e.png")
    assert changes(before, prints(tmp_path)) == [
        "a.png has another content and another caption", "b.png has another caption", "c.png has another mask",
        "d.png is gone", "e.png is new",
    ]  # fmt: skip


def test_masks_of_all_folders_that_have_a_picture_count(tmp_path):
    save(tmp_path / "p" / "a.png")
    for side in ("left", "right"):
        save(tmp_path / side / "a.png", "white")

    def of_both():
        options = [FolderOptions(masked=True, mask_folder=tmp_path / side) for side in ("left", "right")]
        pictures = [
            p for number, option in enumerate(options) for p in scan_pictures(tmp_path / "p", "x", option).pictures
        ]
        return fingerprint(pictures, [tmp_path / "p", tmp_path / "p"], ("x",))

    equal = of_both()
    for side in ("left", "right"):
        save(tmp_path / side / "a.png", "grey")
        (change,) = changes(equal, of_both())
        assert change.startswith("a.png of folder 1 (p) has another mask")
        save(tmp_path / side / "a.png", "white")
    assert of_both() == equal
    (name,) = equal
    assert changes({name: equal[name][:3]}, equal) == []  # as old checkpoints have it


# Resuming


@pytest.fixture
def pictures(instance_dir, tmp_path):
    return shutil.copytree(instance_dir, tmp_path / "pictures")


def test_a_run_resumes_with_its_own_data_wherever_it_is(go, pictures, tmp_path):
    straight = go("straight", instance_data_dir=pictures, max_train_steps=4)
    go("parts", instance_data_dir=pictures, max_train_steps=2)
    moved = pictures.rename(tmp_path / "moved")
    parts = go("parts", instance_data_dir=moved, max_train_steps=4, resume_from_checkpoint="latest")
    assert_same_adapter(straight, parts)


def test_other_data_is_named_before_models_are_loaded(go, pictures, caplog):
    flags = {"max_train_steps": 4, "validation_split": 0.2}
    out = go("out", instance_data_dir=pictures, **(flags | {"max_train_steps": 2}))
    save(pictures / "picture-1.png", "blue")
    (pictures / "picture-3.txt").write_text("another caption")
    (pictures / "picture-0.png").rename(pictures / "renamed.png")
    with pytest.MonkeyPatch.context() as patch:
        from apt_diffusion.training.text_to_image.stable_diffusion import StableDiffusionBase

        patch.setattr(StableDiffusionBase, "denoiser", None)
        patch.setattr(StableDiffusionBase, "text_encoders", None)
        with pytest.raises(
            ValueError,
            match=r"pictures of the subject are not those of checkpoint-2: picture-0\.png is gone; picture-1\.png has "
            r"another content; picture-3\.png has another caption; renamed\.png is new\. Put them back, or go on with "
            "--allow_changed_data",
        ):
            go("out", instance_data_dir=pictures, resume_from_checkpoint="latest", **flags)
    go("out", instance_data_dir=pictures, resume_from_checkpoint="latest", allow_changed_data=True, **flags)
    assert "that differ from those of the checkpoint: picture-0.png is gone" in caplog.text
    state = json.loads((out / "checkpoint-4" / "training_state.json").read_text())
    assert list(state["data"]["subject"]) != [] and "renamed.png" in state["data"]["subject"]


def test_another_prompt_is_no_change_of_the_data_and_old_checkpoints_say_nothing(go, pictures):
    out = go("out", instance_data_dir=pictures, max_train_steps=2)
    go("out", instance_data_dir=pictures, instance_prompt="x", max_train_steps=3, resume_from_checkpoint="latest")
    file = out / "checkpoint-3" / "training_state.json"
    state = json.loads(file.read_text())
    del state["data"]
    file.write_text(json.dumps(state))
    save(pictures / "more.png")
    go("out", instance_data_dir=pictures, max_train_steps=4, resume_from_checkpoint="latest")


def test_a_class_that_is_added_by_flags_is_no_change_of_the_data(go, pictures, instance_dir):
    flags = {"instance_data_dir": pictures, "resume_from_checkpoint": "latest"}
    of_class = {
        "with_prior_preservation": True, "class_data_dir": instance_dir, "class_prompt": "x", "num_class_images": 5,
    }  # fmt: skip
    go("out", max_train_steps=2, **flags)
    go("out", max_train_steps=3, **flags, **of_class)
    out = go("out", max_train_steps=4, **flags)
    kept = [json.loads((out / f"checkpoint-{n}" / "training_state.json").read_text())["data"] for n in (2, 3, 4)]
    assert [set(data) for data in kept] == [{"subject"}, {"subject", "class"}, {"subject"}]


def test_pictures_of_the_class_and_the_file_of_folders_are_compared_too(go, pictures, instance_dir, tmp_path):
    file = tmp_path / "data.toml"
    text = (
        f'[[folders]]\ninstance_data_dir = "{pictures}"\ninstance_prompt = "x"\n'
        f'class_data_dir = "{shutil.copytree(instance_dir, tmp_path / "class")}"\nclass_prompt = "y"\n'
    )
    file.write_text(text)
    flags = {"instance_data_dir": None, "instance_prompt": None, "dataset_config": file}
    go("out", max_train_steps=2, **flags)
    file.write_text(text + "weight = 0.5\n")
    with pytest.raises(ValueError, match=r"not those of checkpoint-2: data\.toml has another content"):
        go("out", max_train_steps=4, resume_from_checkpoint="latest", **flags)
    file.write_text(text)
    (tmp_path / "class" / "picture-0.png").unlink()
    with pytest.raises(ValueError, match=r"pictures of the class are not those of .*: picture-0\.png is gone"):
        go("out", max_train_steps=4, resume_from_checkpoint="latest", **flags)
