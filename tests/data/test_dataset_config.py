"""The TOML file of several folders: what it says, all mistakes at once with their lines, and runs with one."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.training_helpers import assert_same_adapter, command, header, losses

from apt_diffusion.data.dataset_config import KEYS, read_dataset_config
from apt_diffusion.data.dreambooth import DreamBoothData, Framing, collate
from apt_diffusion.data.folders import scan_pictures

DEFAULTS = {
    "instance_prompt": None, "recursive": False, "masked_loss": False, "caption_column": "text",
    "caption_dropout_rate": 0.0, "shuffle_caption": False, "keep_tokens": 0, "caption_separator": ",",
    "caption_tag_dropout_rate": 0.0, "caption_prefix": "", "caption_suffix": "", "trigger_word": "",
    "enable_wildcard": False, "keep_tokens_separator": "", "secondary_separator": "",
}  # fmt: skip


def written(folder: Path, text: str) -> Path:
    file = folder / "data.toml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture
def folders(tmp_path):
    for number, name in enumerate(("dog", "cat", "dogs")):
        (tmp_path / name).mkdir()
        for index in range(2):
            pixels = np.random.default_rng(10 * number + index).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    return tmp_path


def test_the_example_of_the_docs_says_what_it_seems_to(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for name in ("dog", "dogs", "drawings of it"):
        (tmp_path / name).mkdir()
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    config = read_dataset_config(written(tmp_path, example), DEFAULTS)
    (first, second), (of_class,) = config.folders, config.of_class
    assert (first.path, first.prompt) == (tmp_path / "dog", "a photo of sks dog")
    assert (first.options.repeats, first.options.masked, first.options.weight) == (4, True, 1.0)
    assert (of_class.path, of_class.prompt) == (tmp_path / "dogs", "a photo of a dog") and not config.for_the_run
    assert (second.options.weight, second.options.recursive, second.options.masked) == (0.5, True, False)
    captions = second.options.captions
    assert (captions.shuffle, captions.keep_tokens, captions.suffix, captions.dropout) == (True, 1, "in pencil", 0.1)


def test_folders_of_one_class_share_it(folders):
    one = 'instance_prompt = "x"\nclass_data_dir = "dogs"\nclass_prompt = "a dog"\n'
    text = f'[[folders]]\ninstance_data_dir = "dog"\n{one}[[folders]]\ninstance_data_dir = "cat"\n{one}'
    config = read_dataset_config(written(folders, text), DEFAULTS)
    assert len(config.folders) == 2 and len(config.of_class) == 1
    other = text.replace('"a dog"', '"dogs"', 1)
    assert len(read_dataset_config(written(folders, other), DEFAULTS).of_class) == 2


def test_what_a_folder_leaves_out_is_as_the_command_line_says(folders):
    one = f'[[folders]]\ninstance_data_dir = "{folders}/dog"\n'
    file = written(folders, one + '[[folders]]\ninstance_data_dir = "cat"\nmasked_loss = false')
    given = DEFAULTS | {"instance_prompt": "sks", "masked_loss": True, "caption_prefix": " in ", "keep_tokens": 2}
    first, second = read_dataset_config(file, given).folders
    assert first.path == folders / "dog" and first.prompt == second.prompt == "sks"
    assert first.options.masked and not second.options.masked
    assert first.options.captions.prefix == "in" and second.options.captions.keep_tokens == 2
    assert set(DEFAULTS) <= set(KEYS)


WRONG = '''\
colour = "red"
[general]
x = 1

[[folders]]
instance_data_dir = "nowhere"
instance_propmt = "a dog"
repeats = 0
note = """
keep_tokens = "no key, but a line of a text"
"""

[[folders]]  # the second
masked_loss = "yes"
repeats = true
weight = -1.0
class_prompt = "a dog"
instance_prompt = " "
[folders.more]
a = 1
[[folders]]
instance_data_dir = "dog"
instance_prompt = "x"
caption_dropout_rate = 1.0
weight = nan
'''


def test_all_mistakes_are_told_at_once_with_their_lines(folders):
    with pytest.raises(ValueError, match=r"--dataset_config: .*data\.toml has 16 mistakes:") as error:
        read_dataset_config(written(folders, WRONG), DEFAULTS)
    lines = re.findall(r"line (\d+): (.*)", str(error.value))
    expected = [
        (1, "'colour' is not known here"), (2, "'general' is not known here"),
        (5, "this folder has no instance_prompt."),
        (6, f"instance_data_dir: there is no folder {folders / 'nowhere'}."),
        (7, "'instance_propmt' is no key of a folder: is 'instance_prompt' meant?"),
        (8, "repeats must be a whole number from 1 to 10000, got 0."), (9, "'note' is no key of a folder. Keys: "),
        (13, "this folder has no instance_data_dir."), (14, "masked_loss must be true or false, got 'yes'."),
        (15, "repeats must be a whole number from 1 to 10000, got True."),
        (16, "weight must be a number of at least 0, and finite, got -1.0."),
        (17, "class_prompt needs a class_data_dir beside it."),
        (18, "instance_prompt must be a text that is not empty, got ' '."), (19, "'more' is no key of a folder"),
        (24, "caption_dropout_rate must be a number of at least 0 and below 1, got 1.0."),
        (25, "weight must be a number of at least 0, and finite, got nan."),
    ]  # fmt: skip
    assert [int(line) for line, _ in lines] == [line for line, _ in expected]
    assert all(text.startswith(start) for (_, text), (_, start) in zip(lines, expected, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[folders]\n", r"data\.toml is no TOML: .*line 1"),
        (
            '[[folders]]\ninstance_data_dir = "dog"\ninstance_prompt = "x"\nmask_data_dir = "cat"',
            r"has a mistake:\n  line 4: mask_data_dir needs masked_loss = true",
        ),
        ("", r"has a mistake:\n  line 1: there is no \[\[folders\]\]"),
        ("\nfolders = 3", r"line 2: there is no \[\[folders\]\]"),
        ('\n[folders]\ninstance_data_dir = "dog"', r"line 2: there is no \[\[folders\]\]"),
    ],
)
def test_files_of_another_kind_are_refused(folders, text, message):
    with pytest.raises(ValueError, match=message):
        read_dataset_config(written(folders, text), DEFAULTS)
    with pytest.raises(ValueError, match="there is no file"):
        read_dataset_config(folders / "other.toml", DEFAULTS)
    (folders / "data.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is no TOML"):
        read_dataset_config(folders / "data.toml", DEFAULTS)


# Training

TWO = """
[[folders]]
instance_data_dir = "dog"
instance_prompt = "sks dog"
repeats = 3
class_data_dir = "dogs"
class_prompt = "a dog"
[[folders]]
instance_data_dir = "cat"
instance_prompt = "zwx cat"
weight = 0.25
caption_dropout_rate = 0.5
"""


def test_repeats_weights_and_dropout_are_those_of_each_folder(folders):
    read = read_dataset_config(written(folders, TWO), DEFAULTS).folders
    pictures = [p for folder in read for p in scan_pictures(folder.path, folder.prompt, folder.options).checked()]
    assert [picture.prompt for picture in pictures] == ["sks dog"] * 6 + ["zwx cat"] * 2
    data = DreamBoothData(pictures, [], Framing(32, stride=4), (4, 8, 8), 0)
    samples = [data[position][0] for position in range(800)]
    assert [sample.weight for sample in samples].count(0.25) == 200
    assert not any(sample.prompt == "" and sample.weight == 1 for sample in samples)
    assert 70 < sum(sample.prompt == "" for sample in samples) < 130
    pair = next(i for i in range(99) if samples[i].weight == 1 and samples[i + 1].weight == 0.25)
    assert collate([data[pair], data[pair + 1]]).weights.tolist() == [1, 0.25]
    assert collate([data[pair], data[pair]]).weights is None


def test_one_folder_in_a_file_is_that_folder(go, instance_dir, tmp_path):
    text = f'[[folders]]\ninstance_data_dir = "{instance_dir}"\ninstance_prompt = "a sks glyph"\n'
    file = written(tmp_path, text)
    plain = go()
    flags = {"instance_data_dir": None, "instance_prompt": None, "dataset_config": file}
    assert_same_adapter(go(**flags), plain)
    assert header(tmp_path / "out-1")["instance_prompt"] == "a sks glyph"
    written(tmp_path, text + "weight = 0.5\n")
    half = go(**flags)
    assert losses(half)[0] == pytest.approx(losses(plain)[0] / 2, rel=1e-5)


def test_a_file_with_class_and_captions_trains_and_resumes_exactly(go, folders):
    file = written(folders, TWO + "shuffle_caption = true\n")
    flags = {"instance_data_dir": None, "instance_prompt": None, "dataset_config": file}
    straight = go("straight", max_train_steps=4, **flags)
    go("parts", max_train_steps=2, **flags)
    parts = go("parts", max_train_steps=4, resume_from_checkpoint="latest", **flags)
    assert_same_adapter(straight, parts)
    assert losses(straight) == losses(parts)
    assert len(list((folders / "dogs").iterdir())) == 2  # nothing is drawn
    assert (straight / "README.md").read_text().count("sks dog")
    without = go(max_train_steps=4, prior_loss_weight=0.0, **flags)
    assert not np.allclose(losses(without), losses(straight), atol=1e-2)
    assert torch.isfinite(torch.tensor(losses(straight))).all()


def test_a_report_has_a_table_for_each_folder(go, folders, no_models, capsys):
    flags = {"instance_data_dir": None, "instance_prompt": None, "dataset_config": written(folders, TWO)}
    go(check_data=True, **flags)
    printed = capsys.readouterr().out
    titles = [f"The subject: {folders / 'dog'}", f"The subject: {folders / 'cat'}", f"The class: {folders / 'dogs'}"]
    assert all(title in printed for title in titles)
    assert "2 pictures, 6 per epoch. Captions: 2 from instance_prompt." in printed and "drawn" not in printed
    for path in (folders / "dogs").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="There are no pictures in"):
        go(**flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"instance_data_dir": None},
            "Give --instance_data_dir, --dataset_name or --dataset_config",
        ),
        ({"instance_prompt": None}, "--instance_data_dir needs --instance_prompt"),
        ({"dataset_config": "data.toml"}, "--instance_data_dir has no place beside --dataset_config"),
        (
            {"dataset_config": "data.toml", "instance_data_dir": None, "class_prompt": "x"},
            "--class_prompt has no place beside",
        ),
        (
            {"dataset_config": "data.toml", "instance_data_dir": None, "with_prior_preservation": True},
            r"no folder of data\.toml has a class_data_dir",
        ),
        (
            {"dataset_config": "data.toml", "instance_data_dir": None, "cache_text_embeddings": True},
            "--cache_text_embeddings keeps one text for each picture",
        ),
    ],
)
def test_flags_that_contradict_the_file_are_refused(folders, monkeypatch, flags, message):
    from apt_diffusion.training.text_to_image.arguments import parse_args

    written(folders, '[[folders]]\ninstance_data_dir = "dog"\ninstance_prompt = "x"\nshuffle_caption = true')
    monkeypatch.chdir(folders)
    with pytest.raises(ValueError, match=message):
        parse_args(command("x", folders / "dog", "out", **flags))
