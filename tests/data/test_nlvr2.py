"""NLVR2: files of both kinds, accuracy and evaluation by brute force, where a second picture starts, clear errors."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.vl_helpers import results, rows, train, words

from apt_diffusion import load_apt_weights
from apt_diffusion.data import nlvr2
from apt_diffusion.data.processors import load_processor
from apt_diffusion.data.sources import read_source


def test_reading_the_official_files(nlvr2_dir, tmp_path):
    statements = nlvr2.load_statements(nlvr2_dir, "train")
    assert len(statements) == 12 and [s.label for s in statements[:3]] == [True, False, True]
    third = statements[2]
    assert third.identifier == "train-0-2-0" and third.sentence == "the color is the same 1"
    assert third.left == nlvr2_dir / "images" / "train" / "0" / "train-0-2-img0.png"
    assert third.sentence_id == ("train-0", "0")
    assert nlvr2.load_statements(nlvr2_dir, "dev")[5].right == nlvr2_dir / "dev" / "dev-1-5-img1.png"
    # As the repository of the data set is laid out, with all pictures under images/.
    clone = tmp_path / "clone"
    shutil.copytree(nlvr2_dir / "data", clone / "nlvr2" / "data")
    shutil.copytree(nlvr2_dir / "dev", clone / "images" / "dev")
    assert nlvr2.load_statements(clone, "dev")[0].left.parent == clone / "images" / "dev"


def test_examples_carry_the_released_prompt_only_where_it_is_asked_for(nlvr2_dir):
    statements = nlvr2.load_statements(nlvr2_dir, "dev")
    plain, prompted = nlvr2.make_examples(statements), nlvr2.make_examples(statements, nlvr2.OFFICIAL_PROMPT)
    assert [e.text for e in plain] == [s.sentence for s in statements]
    assert prompted[0].text == "Does the images satisfy the description: the color is the same 0"
    assert [e.target for e in plain] == [1, 0, 1, 0, 1, 0]


def test_accuracy_and_consistency_by_brute_force():
    generator = random.Random(0)
    statements = [
        nlvr2.Statement(f"dev-{set_id}-{pair}-{number}", "", Path(), Path(), generator.random() < 0.5)
        for set_id in range(8) for pair in range(4) for number in range(2)
    ]  # fmt: skip
    guesses = [int(s.label) if generator.random() < 0.85 else int(not s.label) for s in statements]
    consistent = []
    for set_id in range(8):
        for number in range(2):
            own = [
                bool(guess) == s.label
                for s, guess in zip(statements, guesses, strict=True)
                if s.identifier.startswith(f"dev-{set_id}-") and s.identifier.endswith(f"-{number}")
            ]
            assert len(own) == 4
            consistent.append(all(own))
    found = nlvr2.nlvr2_accuracy(statements, guesses)
    right = [bool(guess) == s.label for s, guess in zip(statements, guesses, strict=True)]
    assert found == {"accuracy": np.mean(right), "consistency": np.mean(consistent)} and 0 < np.mean(consistent) < 1


def break_folder(nlvr2_dir, tmp_path, how):
    folder = tmp_path / "broken"
    shutil.copytree(nlvr2_dir, folder)
    file = folder / "data" / "train.json"
    lines = file.read_text().splitlines()
    if how == "pictures":
        for picture in sorted((folder / "images" / "train" / "1").iterdir())[:5]:
            picture.unlink()
    elif how == "json":
        file.write_text("\n".join([*lines[:2], "{", *lines[3:]]))
    elif how == "key":
        file.write_text("\n".join([lines[0], json.dumps({"sentence": "x", "label": "True"})]))
    elif how == "label":
        file.write_text(lines[0].replace('"True"', '"maybe"'))
    elif how == "path":
        file.write_text(lines[0].replace("train-0-0-0", "../../secret-0"))
    else:
        file.unlink()
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("pictures", r"5 of 24 pictures are missing: .*img\d\.png, .*, .*, \.{3,4} They should be in .*images/train"),
        ("json", r"train\.json, line 3 is no statement of NLVR2"),
        ("key", r"train\.json, line 2 is no statement of NLVR2: KeyError\('identifier'\)"),
        ("label", r"line 1 is no statement.*the label 'maybe'"),
        ("path", r"line 1 is no statement.*the identifier '\.\./\.\./secret-0'"),
        ("no file", r"no file with the statements of NLVR2's train split; looked for .*data/train\.json"),
    ],
)
def test_errors_come_before_a_model_is_loaded(nlvr2_dir, tiny_vl, tmp_path, how, message, monkeypatch):
    import train_apt_nlvr2

    monkeypatch.setattr(train_apt_nlvr2, "load_model", lambda *args, **kwargs: pytest.fail("too late"))
    folder = break_folder(nlvr2_dir, tmp_path, how)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train("nlvr2", tiny_vl["vilt"], folder, tmp_path / "out")


def test_a_data_set_of_the_hub_is_the_same_data_set(nlvr2_dir, tiny_vl, tmp_path):
    import datasets

    folder = tmp_path / "hub"
    folder.mkdir()
    for split, name in (("train", "train"), ("dev", "validation"), ("test1", "test")):
        statements = nlvr2.load_statements(nlvr2_dir, split)
        columns = {
            "identifier": [s.identifier for s in statements],
            "sentence": [s.sentence for s in statements],
            "label": [str(s.label) for s in statements],
            "left_image": [{"bytes": s.left.read_bytes(), "path": None} for s in statements],
            "right_image": [{"bytes": s.right.read_bytes(), "path": None} for s in statements],
        }
        table = datasets.Dataset.from_dict(columns)
        for side in ("left_image", "right_image"):
            table = table.cast_column(side, datasets.Image())
        table.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    for ours, theirs in zip(
        nlvr2.load_statements(nlvr2_dir, "dev"), nlvr2.load_hub_statements(str(folder), "dev"), strict=True
    ):
        assert (ours.identifier, ours.sentence, ours.label) == (theirs.identifier, theirs.sentence, theirs.label)
        for side in ("left", "right"):
            assert np.array_equal(read_source(getattr(ours, side)), read_source(getattr(theirs, side)))
    files = train("nlvr2", tiny_vl["vilt"], nlvr2_dir, tmp_path / "files", max_train_steps=1)
    hub = train("nlvr2", tiny_vl["vilt"], None, tmp_path / "table", dataset_name=folder, max_train_steps=1)
    assert rows(files) == rows(hub) and results(files)["metrics"] == results(hub)["metrics"]


@pytest.mark.parametrize("kind", ["vilt", "meter"])
def test_evaluation_by_two_passes_of_the_bare_model(nlvr2_dir, tiny_vl, tmp_path, kind):
    """One statement at a time, one picture at a time: pooled features side by side, then the head."""
    import train_apt_nlvr2

    out = train("nlvr2", tiny_vl[kind], nlvr2_dir, tmp_path, num_prompts=3, learning_rate=0.05, head_lr_multiplier=1)
    settings = {"num_images": 2} if kind == "vilt" else {}
    model = train_apt_nlvr2.MODELS[kind].from_pretrained(
        tiny_vl[kind], modality_type_vocab_size=3, num_labels=2, ignore_mismatched_sizes=True, **settings
    )
    load_apt_weights(model.eval(), out)
    processor = load_processor(kind, tiny_vl[kind])

    @torch.no_grad()
    def judge(statement):
        pooled = []
        for place, picture in enumerate((statement.left, statement.right)):
            inputs = processor(Image.open(picture), statement.sentence, return_tensors="pt")
            output = model.base_model(**inputs, image_token_type_idx=place + 1)
            pooled.append(output.pooler_output)
        return bool(model.classifier(torch.cat(pooled, -1)).argmax())

    for split, name in (("dev", "dev"), ("test1", "test_p")):
        right = [judge(s) == s.label for s in nlvr2.load_statements(nlvr2_dir, split)]
        assert results(out)["metrics"][f"{name}_accuracy"] == pytest.approx(np.mean(right))


def test_a_file_with_a_mark_blank_lines_and_odd_separators(nlvr2_dir, tmp_path):
    """A sentence may hold U+2028, which ends no line of JSON; an editor may put a mark before the first line."""
    folder = shutil.copytree(nlvr2_dir, tmp_path / "copy")
    file = folder / "data" / "dev.json"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["sentence"] = "one\u2028two"
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    file.write_text("\ufeff" + text + "\n", encoding="utf-8")
    found = nlvr2.load_statements(folder, "dev")
    assert [s.sentence for s in found] == [line["sentence"] for line in lines]
    file.write_bytes(b'{"sentence": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"dev\.json is not UTF-8 text"):
        nlvr2.load_statements(folder, "dev")


@pytest.mark.parametrize("kind", ["vilt", "meter"])
def test_the_second_picture_starts_with_the_first_ones_row(nlvr2_dir, tiny_vl, tmp_path, kind):
    import train_apt_nlvr2

    from apt_diffusion.training.vision_language.models import find_base, load_model

    args = train_apt_nlvr2.parse_args(words(tiny_vl[kind], nlvr2_dir, tmp_path))
    base_model = find_base(args, train_apt_nlvr2.RECIPES, num_processes=1)
    settings = {"num_images": 2} if kind == "vilt" else {}
    models = [
        load_model(
            args, base_model, 0, train_apt_nlvr2.MODELS[kind], num_labels=2, modality_type_vocab_size=3, **settings
        )
        for _ in range(2)
    ]
    from transformers import ViltModel

    from apt_diffusion.models.meter import MeterModel

    base = {"vilt": ViltModel, "meter": MeterModel}[kind].from_pretrained(tiny_vl[kind])
    table = {n: p for n, p in base.named_parameters() if "token_type" in n and "text" not in n}
    (before,) = table.values()
    (after,) = (p for n, p in models[0].named_parameters() if "token_type" in n and "text" not in n)
    assert torch.equal(after[:2], before) and torch.equal(after[2], before[1])
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], second[key]) for key in first)  # the head follows from the seed
