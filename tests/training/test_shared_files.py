"""What a run leaves for the hub, or for whoever is given it, says nothing of the machine that it was made on."""

import json
import shutil
from pathlib import Path

import pytest
from support.training_helpers import header
from support.training_helpers import train as train_sd
from support.vl_helpers import train as train_vl

from apt_diffusion import StableDiffusionAPTPipeline, add_apt, save_apt_weights
from apt_diffusion.io.public_names import is_local, placeholder, public_name, public_value


@pytest.fixture
def uploaded(monkeypatch):
    """The files that `upload_folder` would send, once a run has called it."""
    import huggingface_hub

    sent = []

    def upload_folder(*, folder_path, allow_patterns, ignore_patterns, **others):
        found = huggingface_hub.utils.filter_repo_objects(
            [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()],
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        )
        sent.extend(Path(folder_path, name) for name in found)

    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    repository = type("Repository", (), {"repo_id": "me/glyph"})
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *args, **options: repository)
    return sent


def assert_says_nothing_of(places, files):
    for file in files:
        content = file.read_bytes()
        for place in places:
            assert str(place).encode() not in content, (file.name, place)
            assert json.dumps(str(place))[1:-1].encode() not in content, (file.name, place)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder within `tmp_path`, so that every path of the run leads through it."""
    monkeypatch.setenv("HOME", str(tmp_path / "anna"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "anna"))
    (tmp_path / "anna").mkdir()
    return tmp_path / "anna"


def machine(home, *others):
    """Beginnings of paths that nothing shared may have."""
    return [home, home.parent, Path.home(), Path.cwd(), *(Path(other).parent for other in others)]


@pytest.mark.parametrize("push", [True, False], ids=["pushed", "kept"])
def test_a_run_of_stable_diffusion(tiny_sd_path, instance_dir, home, uploaded, push):
    base = shutil.copytree(tiny_sd_path, home / "models" / "tiny")
    for folder in ("dog", "dogs", "held"):
        shutil.copytree(instance_dir, home / "data" / folder)
    out = train_sd(
        base, home / "data" / "dog", home / "runs" / "glyph", class_data_dir=home / "data" / "dogs",
        with_prior_preservation=True, class_prompt="a glyph", num_class_images=2, push_to_hub=push,
        validation_data_dir=home / "data" / "held", validation_images=[str(home / "data" / "dog" / "picture-0.png")],
        num_validation_images=1, num_inference_steps=4, tokenizer_name=base / "tokenizer", keep_best=True,
        pretrained_vae_model_name_or_path=base / "vae", max_train_steps=1,
    )  # fmt: skip
    assert not push or len({path.suffix for path in uploaded}) >= 4
    kept_here = ("training_state.json", ".local.toml")  # of checkpoints; and to make the run again on this machine
    files = uploaded or [path for path in out.rglob("*") if path.is_file() and not path.name.endswith(kept_here)]
    names = {path.name for path in files}
    assert {"README.md", "pytorch_apt_weights.safetensors", "losses.jsonl", "config.toml"} <= names
    assert "config.local.toml" not in names
    assert_says_nothing_of(machine(home, tiny_sd_path, instance_dir), files)
    said = header(out)
    assert said["base_model"] == "tiny"
    for words in ("--instance_data_dir dog ", "--output_dir glyph", "--validation_images picture-0.png"):
        assert words in said["command_line"], words
    settings = json.loads(said["training"])
    assert (settings["class_data_dir"], settings["validation_images"]) == ("dogs", ["picture-0.png"])
    card = (out / "README.md").read_text()
    assert "from_pretrained('path/to/tiny')" in card and "Base model: `tiny`, a folder of" in card
    assert f"load_apt_weights('{'me/glyph' if push else 'path/to/glyph'}')" in card


@pytest.mark.slow
@pytest.mark.parametrize("method", ["apt", "lora"])
def test_a_run_of_a_vision_language_model(tiny_vl, vqa_dir, home, uploaded, method):
    out = train_vl(
        "vqa", tiny_vl["vilt"], vqa_dir, home / "runs" / "vqa", min_answer_count=3, method=method, push_to_hub=True
    )
    names = {path.name for path in uploaded}
    assert {"README.md", "results.json", "answers.json", "losses.jsonl", "metrics.jsonl", "config.toml"} <= names
    assert_says_nothing_of(machine(home, tiny_vl["vilt"], vqa_dir), uploaded)
    found = json.loads((out / "results.json").read_text())
    assert found["base_model"] == tiny_vl["vilt"].name and found["settings"]["data_dir"] == vqa_dir.name


def test_an_adapter_that_is_saved_by_hand_names_its_base(pipe, tiny_sd_path, tmp_path):
    add_apt(pipe)
    assert header(save_apt_weights(pipe, tmp_path / "hand").parent)["base_model"] == tiny_sd_path.name
    embedded = StableDiffusionAPTPipeline.from_pretrained("miniature")
    add_apt(embedded)
    assert header(save_apt_weights(embedded, tmp_path / "embedded").parent)["base_model"] == "miniature"


def test_names_in_place_of_paths(tmp_path, monkeypatch):
    (tmp_path / "pictures" / "dog").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for value, name in {
        str(tmp_path / "pictures" / "dog"): "dog",
        str(tmp_path / "not" / "yet" / "there"): "there",
        "pictures/dog": "dog",
        "./pictures/dog/": "dog",
        "../elsewhere": "../elsewhere",
        "..": "..",
        "~/models/sd": "sd",
        f"path={tmp_path}/dog": "path=dog",
        "stabilityai/stable-diffusion-xl-base-1.0": "stabilityai/stable-diffusion-xl-base-1.0",
        "miniature": "miniature",
        "/imagine a dog": "/imagine a dog",
        "a dog and/or a cat": "a dog and/or a cat",
        "a" * 5000: "a" * 5000,
        "": "",
    }.items():
        assert public_name(value) == name, value
        assert is_local(value) or name == value or "=" in value
    assert public_value([str(tmp_path / "a.png"), 3]) == ["a.png", 3] and public_value(True) is True
    assert placeholder("pictures") == "path/to/pictures" and placeholder("me/sd") == "me/sd"
