"""Folders as other trainers have them train as they are: kohya's tree, ai-toolkit's folder, a data set of the hub."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image
from support.training_helpers import losses

from apt_diffusion.data.captions import CaptionOptions
from apt_diffusion.data.folders import FolderOptions, scan_pictures


def save(path, seed, size=(40, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def shown(monkeypatch):
    """The texts that each step of a run reads."""
    from apt_diffusion.training.text_to_image.prompts import Prompts

    seen = []
    original = Prompts.__call__

    def encode(self, texts, models):
        seen.extend(texts)
        return original(self, texts, models)

    monkeypatch.setattr(Prompts, "__call__", encode)
    return seen


def test_a_tree_of_kohyas_scripts(go, tmp_path, shown):
    for index in range(2):
        save(tmp_path / "img" / "3_sks dog" / f"{index}.jpg", index)
        save(tmp_path / "img" / "1_sks dog outside" / f"{index}.webp", 10 + index)
        save(tmp_path / "reg" / "1_dog" / f"{index}.png", 20 + index)
    (tmp_path / "img" / "3_sks dog" / "0.caption").write_text("sks dog, on grass, sunny")
    (tmp_path / "img" / "3_sks dog" / "0.npz").write_bytes(b"latents that kohya's scripts keep")
    out = go(
        instance_data_dir=tmp_path / "img", class_data_dir=tmp_path / "reg", with_prior_preservation=True,
        num_class_images=2, class_prompt="unused", shuffle_caption=True, keep_tokens=1, train_batch_size=4,
        aspect_ratio_buckets="32,40;32,32",
    )  # fmt: skip
    assert len(losses(out)) == 2
    assert set(shown[:4] + shown[8:12]) == {
        "sks dog", "sks dog outside", "sks dog, on grass, sunny", "sks dog, sunny, on grass",
    }  # fmt: skip
    assert set(shown[4:8]) == {"dog"}


def test_a_folder_of_ai_toolkit(go, tmp_path, shown):
    for index in range(3):
        save(tmp_path / f"{index}.jpg", index)
        (tmp_path / f"{index}.txt").write_text(f"photo of [trigger], number {index}")
    go(instance_data_dir=tmp_path, trigger_word="sks dog", train_batch_size=3, max_train_steps=1)
    assert set(shown) == {f"photo of sks dog, number {index}" for index in range(3)}
    found = scan_pictures(tmp_path, "x", FolderOptions(captions=CaptionOptions(trigger="sks", shuffle=True)))
    assert found.checked()[0].prompt == "photo of sks, number 0"
    with pytest.raises(ValueError, match=r"0\.txt of .*0\.jpg has \[trigger\]: say with --trigger_word"):
        scan_pictures(tmp_path, "x").checked()


def test_a_data_set_of_the_hub(go, tmp_path, shown):
    for index in range(3):
        save(tmp_path / "set" / "train" / f"{index}.png", index)
    rows = [{"file_name": f"{index}.png", "prompt": f"sks dog {index}"} for index in range(3)]
    (tmp_path / "set" / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert datasets.load_dataset(str(tmp_path / "set"))["train"].column_names == ["image", "prompt"]
    flags = {"dataset_name": tmp_path / "set", "caption_column": "prompt", "instance_data_dir": None}
    go(train_batch_size=3, max_train_steps=1, **flags)
    assert sorted(shown) == ["sks dog 0", "sks dog 1", "sks dog 2"]
