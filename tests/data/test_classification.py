"""Few-shot classification data: CoOp's layouts and names, its shots, base and new classes, the crops of training."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from apt_diffusion.data import classification as ours
from apt_diffusion.data import crops
from apt_diffusion.data.classification_sets import DATA_SETS, describe
from apt_diffusion.data.sources import read_source


def paint(path, value=0, size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)


def write_zhou(folder, image_dir="images", name="Toy", classes=5, of_class=4):
    """Classes interleaved; class 0 has two training pictures only."""
    rows = {"train": [], "val": [], "test": []}
    for split in rows:
        for index in range(of_class):
            for label in range(classes):
                if split == "train" and label == 0 and index > 1:
                    continue
                path = f"{label}/{split}-{index}.png"
                paint(folder / image_dir / path, 40 * label)
                rows[split].append([path, label, f"class_{label}"])
    (folder / f"split_zhou_{name}.json").write_text(json.dumps(rows))
    return rows


def labels(items):
    return [label for _, label in items]


@pytest.mark.parametrize(("image_dir", "name"), [("images", None), (".", None), ("2750", "eurosat"), ("jpg", None)])
def test_coops_split_file(tmp_path, image_dir, name):
    rows = write_zhou(tmp_path, image_dir)
    data = ours.read_data_set(tmp_path, name)
    assert data.class_names == [f"class_{label}" for label in range(5)]
    for split, items in rows.items():
        found = [(path.relative_to(tmp_path / image_dir).as_posix(), label) for path, label in getattr(data, split)]
        assert found == [(path, label) for path, label, _ in items]


def test_missing_pictures_are_counted_and_named(tmp_path):
    write_zhou(tmp_path)
    for index in range(4):
        (tmp_path / f"images/3/test-{index}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"4 of 58 pictures are missing: .*3/test-0\.png, .*, \.\.\.\. split_"):
        ours.read_data_set(tmp_path)


def test_split_files_that_cannot_be_used(tmp_path):
    rows = write_zhou(tmp_path)
    file = tmp_path / "split_zhou_Toy.json"

    def refused(match, kind=ValueError, **changes):
        file.write_text(json.dumps(rows | changes))
        with pytest.raises(kind, match=match):
            ours.read_data_set(tmp_path)

    refused("two names for class 1: 'class_1' and 'other'", val=[["1/val-0.png", 1, "other"]])
    refused("leads out of", test=[["../../secret.png", 1, "class_1"]])
    refused(
        r"4 classes have no pictures to train on, e\.g\. \['class_0', 'class_2', 'class_3'\]",
        train=[["1/train-0.png", 1, "class_1"]],
    )
    refused("no pictures to test on", test=[])
    refused("has not the format", train={"a": 1})
    refused("has not the format", train=[["path", "no number", "name"]])
    file.unlink()
    for picture in tmp_path.rglob("*.png"):
        if picture.name != "train-0.png":
            picture.unlink()
    with pytest.raises(ValueError, match="no pictures to train on"):  # folders with one picture each cannot be cut
        ours.read_data_set(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        ours.read_data_set(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no data set"):
        ours.read_data_set(tmp_path / "empty")


def test_aircrafts_lists(tmp_path):
    (tmp_path / "variants.txt").write_text("A318\nCessna 172\n")
    for split, lines in {"train": "1 Cessna 172\n2 A318\n", "val": "3 A318\n", "test": "4 Cessna 172\n"}.items():
        (tmp_path / f"images_variant_{split}.txt").write_text(lines)
    for index in range(1, 5):
        paint(tmp_path / f"images/{index}.jpg")
    data = ours.read_data_set(tmp_path, "fgvc_aircraft")
    assert data.class_names == ["A318", "Cessna 172"]
    assert [(path.name, label) for path, label in data.train] == [("1.jpg", 1), ("2.jpg", 0)]
    assert labels(data.test) == [1]
    (tmp_path / "images_variant_val.txt").write_text("3 A319\n")
    with pytest.raises(ValueError, match="'A319' is none of the 2 variants"):
        ours.read_data_set(tmp_path, "fgvc_aircraft")


def test_folders_with_splits_and_imagenets_names(tmp_path):
    for split in ("train", "val"):
        for folder in ("n01440764", "n02119789"):
            paint(tmp_path / f"images/{split}/{folder}/{split}.JPEG")
    (tmp_path / "classnames.txt").write_text("n01440764 tench\nn02119789 kit fox\n")
    data = ours.read_data_set(tmp_path, "imagenet")
    assert data.class_names == ["tench", "kit fox"]
    assert [path.name for path, _ in data.test] == ["val.JPEG"] * 2 and data.val == []  # val is for testing
    assert labels(data.train) == [0, 1]


def test_folders_without_splits_are_cut_like_coops_and_always_alike(tmp_path):
    for folder in ("Faces", "Faces_easy", "BACKGROUND_Google", "accordion"):
        for index in range(10):
            paint(tmp_path / f"101_ObjectCategories/{folder}/image_{index}.jpg")
    data = ours.read_data_set(tmp_path, "caltech101")
    assert data.class_names == ["face", "accordion"]
    parts = [[path for path, label in split if label == 0] for split in (data.train, data.val, data.test)]
    assert [len(part) for part in parts] == [5, 2, 3] and len(set().union(*parts)) == 10
    assert ours.read_data_set(tmp_path, "caltech101") == data


@pytest.mark.parametrize(
    ("name", "folder", "text"),
    [
        ("imagenet", "goldfish", "a photo of a goldfish."),
        ("caltech101", "Motorbikes", "a photo of a motorbike."),
        ("caltech101", "water_lilly", "a photo of a water lilly."),
        ("oxford_pets", "Egyptian_Mau", "a photo of a egyptian mau, a type of pet."),
        ("stanford_cars", "AM General Hummer SUV 2000", "a photo of a 2000 AM General Hummer SUV."),
        ("oxford_flowers", "pink primrose", "a photo of a pink primrose, a type of flower."),
        ("food101", "apple_pie", "a photo of apple pie, a type of food."),
        ("fgvc_aircraft", "707-320", "a photo of a 707-320, a type of aircraft."),
        ("sun397", "a/apartment_building/outdoor", "a photo of a outdoor apartment building."),
        ("sun397", "a/abbey", "a photo of a abbey."),
        ("dtd", "banded", "banded texture."),
        ("eurosat", "AnnualCrop", "a centered satellite photo of Annual Crop Land."),
        ("eurosat", "River", "a centered satellite photo of River."),
        ("ucf101", "ApplyEyeMakeup", "a photo of a person doing Apply Eye Makeup."),
        ("ucf101", "YoYo", "a photo of a person doing Yo Yo."),
    ],
)
def test_names_and_templates_are_coops(name, folder, text):
    assert describe(DATA_SETS[name].class_name(folder), ours.template_of(name)) == text
    assert len(DATA_SETS) == 11


def test_shots_are_the_draws_of_coop(tmp_path, caplog):
    write_zhou(tmp_path, classes=3, of_class=9)
    data = ours.read_data_set(tmp_path)
    caplog.set_level("INFO")
    shots = ours.few_shot(data, num_shots=3, seed=2)
    assert "1 of 3 classes have fewer than 3 training pictures." in caplog.text
    random.seed(2)  # as CoOp: one global generator, classes as they first appear, training before validation
    expected = {}
    for split, count in (("train", 3), ("val", 3)):
        by_class = {}
        for item in getattr(data, split):
            by_class.setdefault(item[1], []).append(item)
        chosen = [random.sample(items, count) if len(items) >= count else items for items in by_class.values()]
        expected[split] = [item for items in chosen for item in items]
    assert shots.train == expected["train"] and shots.val == expected["val"] and shots.test == data.test
    assert labels(shots.train).count(0) == 2 and labels(shots.train).count(1) == 3  # class 0 has two
    assert len(ours.few_shot(data, 8, 2).val) == 3 * 4
    assert ours.few_shot(data, 3, 1).train != shots.train


def test_base_and_new_classes(tmp_path):
    write_zhou(tmp_path)
    data = ours.read_data_set(tmp_path)
    base, new = ours.class_group(data, "base"), ours.class_group(data, "new")
    assert base.class_names == ["class_0", "class_1", "class_2"] and new.class_names == ["class_3", "class_4"]
    assert set(labels(base.test)) == {0, 1, 2} and set(labels(new.test)) == {0, 1}
    assert sorted(path for group in (base, new) for path, _ in group.test) == sorted(path for path, _ in data.test)
    for path, label in new.test:
        assert path.parent.name == str(label + 3)
    assert ours.class_group(data, "all") is data


def test_labels_are_unique_and_names_need_not_be(tmp_path):
    rows = write_zhou(tmp_path)
    for items in rows.values():
        for item in items:
            item[2] = {1: "missile", 4: "missile"}.get(item[1], item[2])
    (tmp_path / "split_zhou_Toy.json").write_text(json.dumps(rows))
    data = ours.read_data_set(tmp_path)
    assert data.class_names == ["class_0", "missile", "class_2", "class_3", "missile"]
    base, new = ours.class_group(data, "base"), ours.class_group(data, "new")
    assert base.class_names == ["class_0", "missile", "class_2"] and new.class_names == ["class_3", "missile"]
    assert all(path.parent.name == str(label + 3) for path, label in new.test)


@pytest.mark.parametrize("layout", ["zhou", "folders"])
def test_an_evaluation_alone_needs_no_training_pictures(tmp_path, layout):
    if layout == "zhou":
        write_zhou(tmp_path)
        root = tmp_path / "images"
        missing = list(root.glob("*/train-*")) + list(root.glob("*/val-*"))
    else:
        root = tmp_path
        for split in ("train", "test"):
            for label in range(5):
                paint(root / split / f"class_{label}" / "0.png")
        missing = list(root.glob("train/*/*"))
    whole = ours.read_data_set(tmp_path)
    for path in missing:
        path.unlink()
    if layout == "folders":
        shutil.rmtree(tmp_path / "train")
    alone = ours.read_data_set(tmp_path, training=False)
    assert alone.test == whole.test and alone.class_names == whole.class_names
    assert ours.class_group(alone, "new").class_names == ["class_3", "class_4"]
    with pytest.raises((FileNotFoundError, ValueError)):
        ours.read_data_set(tmp_path)


def test_files_of_names_that_cannot_be_used_are_named(tmp_path):
    for split in ("train", "test"):
        paint(tmp_path / split / "n01" / "0.png")
    (tmp_path / "classnames.txt").write_text("n01 great white shark\n\n")
    assert ours.read_data_set(tmp_path).class_names == ["great white shark"]
    for content, message in ((b"n01\n", r"classnames\.txt: 'n01' should be"), (b"n01 caf\xe9", "is not UTF-8 text")):
        (tmp_path / "classnames.txt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            ours.read_data_set(tmp_path)


def test_a_group_without_test_pictures_is_refused_before_training(tmp_path):
    rows = write_zhou(tmp_path)
    rows["test"] = [item for item in rows["test"] if item[1] < 3]
    (tmp_path / "split_zhou_Toy.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="no test pictures of the 2 new classes"):
        ours.class_group(ours.read_data_set(tmp_path), "new")


def test_harmonic_mean():
    assert ours.harmonic_mean(82.28, 75.14) == pytest.approx(78.55, abs=0.005)  # MaPLe's table
    assert ours.harmonic_mean(0, 50) == 0


@pytest.fixture
def hub_folder(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["AnnualCrop", "b"])})
    for split, count in {"train": 3, "test": 2}.items():
        rows = {
            "image": [Image.new("L", (8, 8), 100 * (i % 2)) for i in range(count)],
            "label": [i % 2 for i in range(count)],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "hub" / f"{split}.parquet")
    return str(tmp_path / "hub")


def test_a_data_set_of_the_hub(hub_folder):
    data = ours.read_hub(hub_folder, "eurosat")
    assert data.class_names == ["Annual Crop Land", "b"]
    assert labels(data.train) == [0, 1, 0] and data.val == []
    assert read_source(data.test[1][0]).getpixel((0, 0)) == (100, 100, 100)
    with pytest.raises(ValueError, match=r"no column \['fine_label'\]"):
        ours.read_hub(hub_folder, label_column="fine_label")


def hub(folder, labels_of, label):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": label})
    for split, values in labels_of.items():
        rows = {"image": [Image.new("L", (8, 8), 9 * i) for i in range(len(values))], "label": values}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def test_a_test_split_with_secret_labels(tmp_path, caplog):
    """ImageNet's on the hub: labels of -1. The validation split is what is tested on, as in CoOp."""
    import datasets

    caplog.set_level("INFO")
    kind = datasets.ClassLabel(names=["a", "b"])
    secret = {"train": [0, 1, 1], "validation": [1, 0], "test": [-1, -1]}
    data = ours.read_hub(hub(tmp_path / "three", secret, kind))
    assert labels(data.test) == [1, 0] and data.val == [] and "its validation split is tested on" in caplog.text
    del secret["validation"]
    with pytest.raises(ValueError, match=r"split 'test', row 0: the label is int \(-1\), and should be from 0 to 1"):
        ours.read_hub(hub(tmp_path / "two", secret, kind))
    secret["test"] = [0, None]
    with pytest.raises(ValueError, match=r"split 'test', row 1: the label is nothing"):
        ours.read_hub(hub(tmp_path / "none", secret, kind))


def test_labels_that_are_texts_and_labels_without_names(tmp_path):
    import datasets

    texts = {"train": ["moon", "a_star", "moon"], "test": ["a_star"]}
    data = ours.read_hub(hub(tmp_path / "texts", texts, datasets.Value("string")))
    assert data.class_names == ["a_star", "moon"] and labels(data.train) == [1, 0, 1] and labels(data.test) == [0]
    with pytest.raises(ValueError, match="carry no class names: the column 'label' is"):
        ours.read_hub(hub(tmp_path / "numbers", {"train": [0, 1], "test": [1]}, datasets.Value("int64")))
    alone = hub(tmp_path / "alone", {"test": [1, 0]}, datasets.ClassLabel(names=["a", "b"]))
    assert ours.read_hub(alone, training=False).class_names == ["a", "b"]
    with pytest.raises(ValueError, match="needs the splits train and test"):
        ours.read_hub(alone)


def test_training_pictures_depend_on_seed_and_position_alone(tmp_path):
    write_zhou(tmp_path)
    items = ours.read_data_set(tmp_path).train
    processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    collate = crops.ClipPictures(processor)
    first, again, other = (crops.TrainingPictures(items, seed) for seed in (0, 0, 1))
    epoch = collate([first[position] for position in range(len(first))])
    assert sorted(epoch["labels"].tolist()) == sorted(labels(items)) and epoch["pixel_values"].shape == (18, 3, 8, 8)
    red = epoch["pixel_values"][:, 0, 0, 0] * processor.image_std[0] + processor.image_mean[0]
    assert (red * 255 - 40 * epoch["labels"]).abs().max() < 1.5
    for position in (5, 2, 17):
        assert torch.equal(collate([again[position]])["pixel_values"][0], epoch["pixel_values"][position])
    assert [other[p][0] for p in range(18)] != [first[p][0] for p in range(18)]
    still = crops.TrainingPictures(items, 0, augment=False)[3]
    assert still == (first[3][0], None)


def test_pictures_of_tests_are_the_processors_and_training_mirrors_half():
    processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    pictures = crops.ClipPictures(processor)
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 10, dtype=np.uint8), (16, 1))).convert("RGB")
    expected = processor(ramp, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pictures.pixels(ramp), expected)
    rises = [np.diff(pictures.pixels(ramp, np.random.default_rng(seed))[0, 0].numpy()).mean() for seed in range(60)]
    assert 15 < sum(rise < 0 for rise in rises) < 45


def test_crops_are_those_of_random_resized_crop():
    """Area uniform in (0.08, 1), shape uniform in the logarithm, always within; a mirrored half."""
    draws = np.random.default_rng(0)
    boxes = np.array([crops.random_box(300, 200, draws, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 300 and bottom.max() <= 200
    area, shape = (right - left) * (bottom - top) / 60_000, (right - left) / (bottom - top)
    small = area < 0.4  # there, nothing is refused for want of room
    assert area.min() == pytest.approx(0.08, abs=0.01)
    assert np.quantile(area[small], [0.25, 0.75]) == pytest.approx([0.16, 0.32], abs=0.02)
    assert np.log(shape[small]).mean() == pytest.approx(0, abs=0.01)
    assert np.log(shape[small]).std() == pytest.approx(np.log(16 / 9) / 12**0.5, abs=0.01)
    assert (left[small] / (300 - (right - left)[small])).mean() == pytest.approx(0.5, abs=0.02)


def test_a_crop_resizes_its_box_and_a_long_picture_gives_its_middle():
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1))).convert("RGB")
    draws = np.random.default_rng(3)
    left, _, right, _ = crops.random_box(200, 100, np.random.default_rng(3), (0.08, 1.0), (3 / 4, 4 / 3))
    square = np.asarray(crops.random_resized_crop(ramp, 16, draws))[8, :, 0]
    assert square[0] == pytest.approx(left + (right - left) / 32, abs=1.5)
    assert square[-1] == pytest.approx(right - (right - left) / 32, abs=1.5)
    assert crops.random_box(1000, 10, draws, (0.5, 1.0), (3 / 4, 4 / 3)) == (493, 0, 506, 10)
