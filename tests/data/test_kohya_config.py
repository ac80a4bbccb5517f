"""TOML files of kohya's scripts: what is taken from each level, what is said of the rest, and lines of mistakes."""

import re
from pathlib import Path

import pytest
from PIL import Image
from support.training_helpers import losses

from apt_diffusion.data.dataset_config import read_dataset_config
from apt_diffusion.data.toml_lines import TomlLines

DEFAULTS = {
    "instance_prompt": None, "recursive": False, "masked_loss": False, "caption_column": "text",
    "caption_dropout_rate": 0.0, "shuffle_caption": False, "keep_tokens": 0, "caption_separator": ",",
    "caption_tag_dropout_rate": 0.0, "caption_prefix": "", "caption_suffix": "", "trigger_word": "",
    "enable_wildcard": False, "keep_tokens_separator": "", "secondary_separator": "",
}  # fmt: skip

# After the example of the scripts' own page on these files.
EXAMPLE = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1
enable_bucket = false

[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'hoge'
  class_tokens = 'hoge girl'
  num_repeats = 10

  [[datasets.subsets]]
  image_dir = 'fuga'
  class_tokens = 'fuga boy'
  keep_tokens = 3
  alpha_mask = true
  cache_info = false

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'reg'
  class_tokens = 'human'

[[datasets]]
resolution = [768, 768]

  [[datasets.subsets]]
  image_dir = 'piyo'
  class_tokens = 'piyo'
  caption_dropout_rate = 0.1
"""


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("hoge", "fuga", "reg", "piyo"):
        (tmp_path / name).mkdir()
        Image.new("RGBA", (40, 40), (255, 0, 0, 200)).save(tmp_path / name / "a.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder, text):
    file = folder / "kohya.toml"
    file.write_text(text)
    return file


def test_subsets_are_folders_with_the_nearest_value_of_each_key(folders):
    config = read_dataset_config(written(folders, EXAMPLE), DEFAULTS)
    found = [(str(f.path), f.prompt, f.options.repeats, f.options.captions.keep_tokens) for f in config.folders]
    assert found == [("hoge", "hoge girl", 10, 2), ("fuga", "fuga boy", 1, 3), ("piyo", "piyo", 1, 1)]
    assert all(folder.options.captions.shuffle for folder in config.folders)
    assert [folder.options.masked for folder in config.folders] == [False, True, False]
    assert [folder.options.captions.dropout for folder in config.folders] == [0.0, 0.0, 0.1]
    assert [(str(f.path), f.prompt, f.options.captions.varies) for f in config.of_class] == [("reg", "human", False)]
    assert config.for_the_run == [
        "resolution = 512 (--resolution)", "batch_size = 4 (--train_batch_size)",
        "resolution = [768, 768] (--resolution)",
    ]  # fmt: skip


def test_mistakes_have_lines_and_the_names_of_the_file(folders):
    text = """
[general]
color_aug = true
keep_tokens = "one"
face_crop_aug_range = [1.0, 3.0]
token_warmup_step = 0
[[datasets]]
  [[datasets.subsets]]
  image_dir = 'nowhere'
  num_repeats = 0
  [[datasets.subsets]]
  class_tokens = 'x'
  caption_extension = '.cap'
[[datasets]]
  [[datasets.subsets]]
  image_dir = 'piyo'
  class_tokens = 'x'
  metadata_file = 'x.json'
  [[datasets.subsets]]
  is_reg = true
  image_dir = 'reg'
[other]
"""
    with pytest.raises(ValueError, match="has 11 mistakes") as error:
        read_dataset_config(written(folders, text), DEFAULTS)
    assert re.findall(r"line (\d+): (.{24})", str(error.value)) == [
        ("3", "'color_aug' of kohya's sc"[:24]), ("4", "keep_tokens must be a wh"), ("5", "'face_crop_aug_range' of"),
        ("8", "this subset has no class"), ("9", "image_dir: there is no f"), ("10", "num_repeats must be a wh"),
        ("11", "this subset has no image"), ("13", "caption_extension must b"), ("18", "'metadata_file' of kohya"),
        ("19", "this subset has no class"), ("22", "'other' is not known her"),
    ]  # fmt: skip


def test_wrong_types_and_masks_without_their_switch_are_told(folders):
    text = """general = 3
[[datasets]]
  [[datasets.subsets]]
  image_dir = 'piyo'
  class_tokens = 'x'
  is_reg = "true"
  [[datasets.subsets]]
  image_dir = 'fuga'
  class_tokens = 'x'
  conditioning_data_dir = 'hoge'
"""
    with pytest.raises(ValueError, match="has 3 mistakes") as error:
        read_dataset_config(written(folders, text), DEFAULTS)
    assert re.findall(r"line (\d+): (.{24})", str(error.value)) == [
        ("1", "[general] must be a tabl"), ("6", "is_reg must be true or f"), ("10", "conditioning_data_dir ne"),
    ]  # fmt: skip
    masked = text.replace("general = 3", "").replace('"true"', "true")
    (folder,) = read_dataset_config(written(folders, masked), DEFAULTS | {"masked_loss": True}).folders
    assert folder.options.mask_folder == Path("hoge")


def test_the_ending_of_captions_is_that_of_the_file(folders):
    text = "[[datasets]]\ncaption_extension = '.caption'\n[[datasets.subsets]]\nimage_dir = 'piyo'\nclass_tokens = 'x'"
    (folder,) = read_dataset_config(written(folders, text), DEFAULTS).folders
    assert folder.options.sidecars == (".caption",)


@pytest.mark.parametrize("text", ["datasets = 3", "[[datasets]]\nbatch_size = 1", "[[datasets]]\nsubsets = 2"])
def test_files_without_subsets_are_refused(folders, text):
    with pytest.raises(ValueError, match=r"line 1: there is no \[\[datasets\.subsets\]\] with pictures"):
        read_dataset_config(written(folders, text), DEFAULTS)


def test_lines_of_arrays_in_arrays_and_of_quoted_names():
    lines = TomlLines(
        'a = 1\n[[x]]\nk = 1\n[[x.y]]\nk = 2\n[[x.y]]\nk = 3\n["z"]\n"k" = 4\n[[x]]\n[[x.y]]\nk.l = 5\n[x.w]'
    )
    expected = {
        ("", "a"): 1, ("x[0]", "k"): 3, ("x[0].y[0]", "k"): 5, ("x[0].y[1]", "k"): 7, ("z", "k"): 9,
        ("x[1]", ""): 10, ("x[1].y[0]", "k"): 12, ("x[1]", "w"): 13, ("", "x"): 2, ("", "none"): 1,
    }  # fmt: skip
    assert {place: lines.of(*place) for place in expected} == expected


def test_a_run_says_which_settings_are_flags_here(go, folders, caplog):
    flags = {"instance_data_dir": None, "instance_prompt": None, "dataset_config": written(folders, EXAMPLE)}
    out = go(max_train_steps=2, **flags)
    assert len(losses(out)) == 2
    assert "flags of the whole run here: resolution = 512 (--resolution), batch_size = 4" in caplog.text
    assert "3 pictures of the subject, 1 of its class" in caplog.text
