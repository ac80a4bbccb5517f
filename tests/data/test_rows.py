"""Data sets of the hub as the trainer reads them: columns, captions, pictures, and what is refused."""

import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image
from support.training_helpers import assert_same_adapter, losses

from apt_diffusion.data.folders import FolderOptions
from apt_diffusion.data.rows import scan_rows

ENCODED = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}


def png(color=(255, 0, 0), size=(40, 30), mode="RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, format="PNG")
    return file.getvalue()


def saved(folder, split="train", features=None, **columns):
    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_dict(columns, features=features)
    if "image" in columns and features is None:
        table = table.cast_column("image", datasets.Image())
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def scan(folder, caption_column=None, image_column="image", **options):
    return scan_rows(str(folder), None, image_column, caption_column, "default", FolderOptions(**options))


def test_pictures_and_captions_come_from_the_columns(tmp_path):
    images = [{"bytes": png(size=(40, 30 + index)), "path": None} for index in range(3)]
    folder = saved(tmp_path / "set", image=images, text=["a dog ", "", None], other=["x", "y", "z"])
    found = scan(folder).checked()
    assert [(p.prompt, p.width, p.height) for p in found] == [
        ("a dog", 40, 30),
        ("default", 40, 31),
        ("default", 40, 32),
    ]
    assert [picture.prompt for picture in scan(folder, "other").checked()] == ["x", "y", "z"]
    sources = scan(folder, prompt_from="--instance_prompt").captions_from
    assert list(sources.values()) == ["column text", "--instance_prompt", "--instance_prompt"]
    plain = saved(tmp_path / "plain", image=images)
    assert [picture.prompt for picture in scan(plain).checked()] == ["default"] * 3


def test_bytes_dicts_and_transparency(tmp_path):
    content = png((255, 0, 0, 51), mode="RGBA")
    in_bytes = saved(
        tmp_path / "bytes", features=datasets.Features({"photo": datasets.Value("binary")}), photo=[content]
    )
    in_dicts = saved(
        tmp_path / "dicts", features=datasets.Features({"photo": ENCODED}), photo=[{"bytes": content, "path": None}]
    )
    for folder in (in_bytes, in_dicts):
        (picture,) = scan(folder, image_column="photo", masked=True).checked()
        assert (
            picture.mask == picture.path
            and picture.path.name == "row 0"
            and (picture.width, picture.height) == (40, 30)
        )


@pytest.mark.parametrize(
    ("columns", "flags", "message"),
    [
        ({"picture": [1]}, {}, r"has no column \['image'\]: its columns are \['picture'\]"),
        ({"image": [None]}, {"caption_column": "caption"}, r"has no column \['caption'\]"),
        (
            {"image": [None], "text": [["a", "b"]]},
            {},
            r"'text' .* should hold texts: name another one",
        ),
        ({"photo": [1]}, {"image_column": "photo"}, r"should hold pictures: name another one with --image_column"),
    ],
)
def test_columns_are_checked_before_models_are_loaded(go, tmp_path, no_models, columns, flags, message):
    saved(tmp_path / "set", **columns)
    with pytest.raises(ValueError, match=message):
        go(instance_data_dir=None, dataset_name=tmp_path / "set", **flags)


def test_splits_and_data_sets_that_are_not_there_are_refused(tmp_path):
    folder = saved(tmp_path / "set", split="test", image=[{"bytes": png(), "path": None}])
    assert len(scan(folder).checked()) == 1
    saved(folder, split="validation", image=[{"bytes": png(), "path": None}])
    with pytest.raises(ValueError, match=r"no split 'train': its splits are \['test', 'validation'\]"):
        scan(folder)
    with pytest.raises(ValueError, match="cannot be loaded"):
        scan(tmp_path / "nowhere")


def test_a_data_set_that_was_saved_to_disk_is_loaded(tmp_path):
    datasets.Dataset.from_dict({"image": [{"bytes": png(), "path": None}], "text": ["a dog"]}).save_to_disk(
        tmp_path / "s"
    )
    (picture,) = scan(tmp_path / "s").checked()
    assert picture.caption == "a dog"


def test_everything_wrong_with_rows_is_found_and_no_foreign_file_is_read(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    images = [
        {"bytes": png(), "path": None},
        {"bytes": b"no picture", "path": "x.png"},
        {"bytes": None, "path": str(secret)},
        {"bytes": None, "path": None},
        {"bytes": png(size=(5, 300)), "path": None},
    ]
    folder = saved(tmp_path / "set", features=datasets.Features({"image": ENCODED}), image=images)
    found = scan(folder)
    assert len(found.pictures) == 1
    expected = ("row 1", "secret.png, which is outside of the data set", "the row holds none", "more than 50 times")
    assert all(part in problem for part, problem in zip(expected, found.problems, strict=True))


# Training


@pytest.fixture
def captioned(instance_dir, tmp_path):
    """Pictures in a folder that both we and `datasets` read: some have captions."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    lines = []
    for index, path in enumerate(sorted(instance_dir.iterdir())):
        (folder / path.name).write_bytes(path.read_bytes())
        lines.append(json.dumps({"file_name": path.name, "text": f"a sks glyph, number {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_a_data_set_trains_as_the_folder_does(go, captioned, tmp_path):
    flags = {"random_flip": True, "shuffle_caption": True, "max_train_steps": 3}
    plain = go(instance_data_dir=captioned, **flags)
    as_folder = go(instance_data_dir=None, dataset_name=captioned, **flags)
    assert_same_adapter(plain, as_folder)
    images = [{"bytes": path.read_bytes(), "path": None} for path in sorted(captioned.glob("*.png"))]
    texts = [json.loads(line)["text"] for line in (captioned / "metadata.jsonl").read_text().splitlines()]
    parquet = saved(tmp_path / "parquet", image=images, caption=texts)
    uncached = {"no-cache_latents": True, "dataloader_num_workers": 1}
    in_rows = go(instance_data_dir=None, dataset_name=parquet, caption_column="caption", **uncached, **flags)
    assert np.allclose(losses(in_rows), losses(plain), atol=1e-4)
    assert_same_adapter(in_rows, plain, tolerance=2e-4)


def test_rows_beside_files_of_the_class_are_cut_held_out_and_reported(go, captioned, instance_dir, capsys):
    flags = {
        "instance_data_dir": None, "dataset_name": captioned, "with_prior_preservation": True, "num_class_images": 5,
        "class_data_dir": instance_dir, "class_prompt": "a glyph", "validation_split": 0.2,
    }  # fmt: skip
    out = go(**flags)
    assert len(losses(out)) == 2
    go(check_data=True, **flags)
    printed = capsys.readouterr().out
    assert "row 0    40 x 40  32 x 32     1          column text   a sks glyph, number 0" in printed
    assert "5 pictures, 5 per epoch. Captions: 5 from column text." in printed


def test_two_sources_contradict_each_other(go, captioned):
    with pytest.raises(ValueError, match="--instance_data_dir and --dataset_name both say where the pictures are"):
        go(dataset_name=captioned)
    with pytest.raises(ValueError, match="--dataset_name needs --instance_prompt"):
        go(instance_data_dir=None, dataset_name=captioned, instance_prompt=None)
