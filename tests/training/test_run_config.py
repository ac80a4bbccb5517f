"""`--config`: what a run writes makes it again, the command line overrides it, and mistakes are told all at once."""

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from support.training_helpers import SCRIPT, WEIGHTS, assert_same_adapter, command, header, losses
from support.vl_helpers import assert_same_weights, words
from support.vl_helpers import train as train_vl

from apt_diffusion.training.run_config import local_path

ROOT = SCRIPT.parents[1]


def run(script: Path, *words, cwd: Path) -> None:
    """A second process, in another folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, *map(str, words)], check=True, cwd=cwd, env=environment)


def parsed(script: str, *argv):
    """What a trainer's parser makes of a command line, as it was before checks changed it."""
    sys.path.insert(0, str(SCRIPT.parent))
    if script == "sd":
        from apt_diffusion.training.text_to_image.arguments import parse_args
    elif script == "clip":
        from apt_diffusion.training.vision_language import clip_arguments

        return clip_arguments.parse_args("", list(map(str, argv))).given
    else:
        parse_args = importlib.import_module(f"train_apt_{script}").parse_args
    return parse_args(list(map(str, argv))).given


# What a run writes


@pytest.mark.slow
def test_the_written_file_makes_the_same_file_in_a_second_process(go, tmp_path, instance_dir):
    out = go(
        seed=None, max_train_steps=3, train_text_encoder=True, random_flip=True, lora_dropout=0.2,
        instance_prompt='a "sks" glyph\\ # é\n', num_prompts=3, target_modules=["attn2", "self_attn"],
        checkpointing_steps=2, class_data_dir=instance_dir, class_prompt="a glyph", with_prior_preservation=True,
        num_class_images=2,
    )  # fmt: skip
    (tmp_path / "elsewhere").mkdir()
    again = tmp_path / "elsewhere" / out.name
    run(SCRIPT, "--config", out / "config.toml", "--output_dir", out.name, cwd=tmp_path / "elsewhere")
    assert (again / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()
    assert (again / "losses.jsonl").read_bytes() == (out / "losses.jsonl").read_bytes()
    assert (again / "config.toml").read_bytes() == (out / "config.toml").read_bytes()
    assert (again / "README.md").read_bytes() == (out / "README.md").read_bytes()


def test_the_file_says_all_flags_and_where_the_machines_folders_are_stands_apart(go, tiny_sd_path, instance_dir):
    out = go(seed=None, hub_token="secret", max_train_steps=1, learning_rate=1e-5, optimizer_args=["foreach=False"])
    text = (out / "config.toml").read_text()
    said, local = tomllib.loads(text), tomllib.loads((out / "config.local.toml").read_text())
    assert said["rank"] == 4 and said["train_text_encoder"] is False and said["optimizer_args"] == ["foreach=False"]
    assert said["learning_rate"] == 1e-5 and said["seed"] >= 0 and "hub_token" not in said and "config" not in said
    assert (said["pretrained_model_name_or_path"], said["output_dir"]) == (tiny_sd_path.name, out.name)
    assert local == {
        "pretrained_model_name_or_path": str(tiny_sd_path), "instance_data_dir": str(instance_dir),
        "output_dir": str(out),
    }  # fmt: skip
    assert "# adapter\nrank = 4\n" in text and "secret" not in text
    assert local_path(out, tiny_sd_path.name) == str(tiny_sd_path) and local_path(out, "miniature") == "miniature"
    assert local_path(out.parent, "x") == "x"


def test_the_command_of_a_run_makes_it_again(go, tiny_sd_path, instance_dir, tmp_path):
    out = go(seed=None, max_train_steps=1, **{"no-cache_latents": True, "caption_prefix=-x": True})
    words = shlex.split(header(out)["command_line"])
    assert words[0] == "train/train_apt_sd.py" and "--no-cache_latents" in words and "--caption_prefix=-x" in words
    places = {
        tiny_sd_path.name: tiny_sd_path,
        instance_dir.name: instance_dir,
        out.name: tmp_path / "again" / out.name,
    }
    assert parsed("sd", *(places.get(word, word) for word in words[1:]))["seed"] == int(
        words[words.index("--seed") + 1]
    )
    import train_apt_sd
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    train_apt_sd.main([str(places.get(word, word)) for word in words[1:]])
    assert (tmp_path / "again" / out.name / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_vision_language_run_is_made_again(tiny_vl, vqa_dir, tmp_path):
    out = train_vl("vqa", tiny_vl["vilt"], vqa_dir, tmp_path / "a" / "out", min_answer_count=3, seed=None, rank=3)
    (tmp_path / "b").mkdir()
    script = SCRIPT.parent / "train_apt_vqa.py"
    run(script, "--config", out / "config.toml", "--output_dir", "out", cwd=tmp_path / "b")
    assert_same_weights(out, tmp_path / "b" / "out")
    for name in ("results.json", "config.toml", "README.md", WEIGHTS):
        assert (tmp_path / "b" / "out" / name).read_bytes() == (out / name).read_bytes(), name


@pytest.mark.slow
def test_each_seed_of_clip_has_its_own_file(tiny_clip, classes_dir, tmp_path):
    flags = {"seed": None, "num_shots": 1, "max_train_steps": 1}
    out = train_vl("clip", tiny_clip["clip"], classes_dir, tmp_path / "out", seeds=[1, 2], **flags)
    said = tomllib.loads((out / "seed-2" / "config.toml").read_text())
    assert (said["seeds"], said["output_dir"]) == ([2], "seed-2")
    again = tmp_path / "again"
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    importlib.import_module("train_apt_clip").main(
        ["--config", str(out / "seed-2" / "config.toml"), "--output_dir", str(again)]
    )
    assert_same_weights(out / "seed-2", again)


# What a file may say


@pytest.mark.parametrize("script", ["sd", "vqa", "nlvr2", "retrieval", "clip"])
def test_every_trainer_reads_a_file_and_the_command_line_overrides_it(script, tmp_path):
    argv = command("m", "d", "o", seed=5) if script == "sd" else words("m", "d", "o", seed=None)
    expected = parsed(script, *argv)
    flags, lines = iter(argv), []
    for flag in flags:
        value = next(flags)
        lines.append(f"{flag.removeprefix('--')} = {value if value.replace('.', '').isdigit() else repr(value)}")
    file = tmp_path / "run.toml"
    file.write_text("\n".join(lines))
    assert parsed(script, "--config", file) == expected
    overridden = parsed(script, "--config", file, "--rank", 7, "--gradient_checkpointing")
    assert overridden == expected | {"rank": 7, "gradient_checkpointing": True}


def test_switches_lists_and_words_with_dashes(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        "pretrained_model_name_or_path = 'm'\ninstance_data_dir = 'd'\ninstance_prompt = '--a dog'\n"
        "lora_dropout = 0.5\ncache_latents = false\ntrain_text_encoder = true\ncenter_crop = false\n"
        "target_modules = ['attn1', 'attn2']\noptimizer_args = []\nstreams = 'query'\nlearning_rate = 1e-4\n"
        "caption_prefix = ''\n"
    )
    given = parsed("sd", "--config", file)
    assert given["instance_prompt"] == "--a dog" and given["caption_prefix"] == "" and given["dropout"] == 0.5
    assert given["cache_latents"] is False and given["train_text_encoder"] is True and given["center_crop"] is False
    assert given["target_modules"] == ["attn1", "attn2"] and given["optimizer_args"] == []
    assert given["streams"] == ["query"] and given["learning_rate"] == 1e-4
    assert parsed("sd", "--config", file, "--cache_latents", "--streams", "context")["cache_latents"] is True


def test_all_mistakes_are_told_at_once_with_their_lines(tmp_path, no_models):
    file = tmp_path / "run.toml"
    file.write_text(
        "pretrained_model_name_or_path = 'm'\nrnk = 4\n\nnum_prompts = 0\nlr_scheduler = 'cosin'\n"
        "learning_rate = 'fast'\ncenter_crop = 'yes'\n"
        "rank = [1, 2]\nmax_train_steps = 1.5\nseed = 1979-05-27\nstreams = ['query', '-x']\n"
        "zzz = 1\nhelp = 'x'\n[adapter]\ninit = 'identity'\n"
    )
    with pytest.raises(ValueError) as error:
        parsed("sd", "--config", file)
    assert str(error.value).splitlines() == [
        f"--config: {file} has 12 mistakes:",
        "  line 2: 'rnk' is no flag of this trainer: is 'rank' meant?",
        "  line 4: num_prompts: must be at least 1, got 0.",
        "  line 5: lr_scheduler: 'cosin' is not one of linear, cosine, cosine_with_restarts, polynomial, constant, "
        "constant_with_warmup.",
        "  line 6: learning_rate: 'fast' is no number.",
        "  line 7: center_crop must be true or false, got 'yes'.",
        "  line 8: rank takes one value, got [1, 2].",
        "  line 9: max_train_steps: '1.5' is no whole number.",
        "  line 10: seed: datetime.date(1979, 5, 27) is neither a text nor a number.",
        "  line 11: streams: '-x' is not one of query, context, text.",
        "  line 12: 'zzz' is no flag of this trainer; --help lists all flags.",
        "  line 13: 'help' is no flag of this trainer; --help lists all flags.",
        "  line 14: 'adapter' is a table, of which this file has none: write all keys above.",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--config: there is no file"),
        ("rank = \n", r"is no TOML: .*line 1"),
        ("optimizer_args = ['-x']", "a mistake:\n  line 1: optimizer_args: '-x' begins with a dash, as flags do"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, text, message):
    if text is not None:
        (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parsed("sd", "--config", tmp_path / "run.toml")


def test_what_a_file_leaves_out_is_still_required(tmp_path, capsys):
    (tmp_path / "run.toml").write_text("rank = 4\n")
    with pytest.raises(SystemExit):
        parsed("sd", "--config", tmp_path / "run.toml")
    assert "required: --pretrained_model_name_or_path" in capsys.readouterr().err


def test_a_home_folder_and_control_characters_in_a_file(go, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "anna"))
    (tmp_path / "run.toml").write_text('output_dir = "~/run"\ninstance_prompt = "\\u001b[31m red"')
    go(config=tmp_path / "run.toml", output_dir=None, instance_prompt=None, max_train_steps=1)
    out = tmp_path / "anna" / "run"
    assert (out / WEIGHTS).is_file()
    said = tomllib.loads((out / "config.toml").read_text())
    assert said["instance_prompt"] == "\x1b[31m red" and said["output_dir"] == "run"


def test_folders_that_the_run_makes_are_named_alike_before_and_after(go, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    flags = {"output_dir": "../clients/acme/x", "cache_encoder_outputs": "../secret/cache", "max_train_steps": 1}
    found = []
    for _ in range(2):
        go(**flags)
        out = tmp_path / "clients" / "acme" / "x"
        found.append({name: (out / name).read_bytes() for name in (WEIGHTS, "config.toml", "README.md")})
        assert not any(b"acme" in content or b"secret" in content for content in found[-1].values())
    assert found[0] == found[1]
    local = tomllib.loads((out / "config.local.toml").read_text())
    assert local["output_dir"] == str(out) and local["cache_encoder_outputs"] == str(tmp_path / "secret" / "cache")


def test_a_folder_that_was_changed_in_the_file_is_meant(go, instance_dir, tmp_path):
    out = go(max_train_steps=1)
    file = out / "config.toml"
    assert parsed("sd", "--config", file)["instance_data_dir"] == str(instance_dir)
    text = file.read_text()
    file.write_text(text.replace(f'"{instance_dir.name}"', '"other"'))
    assert parsed("sd", "--config", file)["instance_data_dir"] == "other"
    (out / "config.local.toml").unlink()
    file.write_text(text)
    assert parsed("sd", "--config", file)["instance_data_dir"] == instance_dir.name


def test_a_resumed_run_writes_the_seed_that_it_had(go):
    out = go("out", seed=3, max_train_steps=1)
    go("out", seed=4, max_train_steps=2, resume_from_checkpoint="latest")
    said = tomllib.loads((out / "config.toml").read_text())
    assert (said["seed"], said["max_train_steps"]) == (3, 2) and "resume_from_checkpoint" not in said
    straight = go("straight", seed=3, max_train_steps=2)
    assert_same_adapter(out, straight)
    assert losses(out) == losses(straight)
