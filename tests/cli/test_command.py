"""The command `apt-diffusion` inside the test process: subcommands, how flags are shared out, what generate draws."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import randomize
from PIL import Image

from apt_diffusion import APTConfig, StableDiffusionAPTPipeline, add_apt, cli, save_apt_weights
from apt_diffusion.cli import generate, train
from apt_diffusion.miniature import TEXT_TO_IMAGE


def test_without_a_command_it_says_which_there_are(capsys):
    assert cli.main([]) == 2 and cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"\n  {name} " in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "no command 'trian'. Did you mean 'train'?"),
        (["x"], "no command 'x'. There are train, generate,"),
        (["train", "sdd"], "no trainer 'sdd'. Did you mean 'sd'?"),
        (["train", "--num_processes", "2"], "There are sd, vqa, nlvr2, retrieval, clip"),
    ],
)
def test_a_word_that_is_no_command_is_refused_with_the_nearest(words, message, capsys):
    assert cli.main(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_missing_library_is_named(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "lost", cli.Command("cli.lost", "of another world"))

    def missing(name):
        raise ModuleNotFoundError("No module named 'gradio'", name="gradio")

    monkeypatch.setattr("importlib.import_module", missing)
    assert cli.main(["lost"]) == 1
    assert "needs gradio, which is not installed" in capsys.readouterr().err


def test_the_command_itself_loads_nothing_heavy():
    code = (
        "import sys, apt_diffusion.cli as cli; cli.main(['--help']); cli.main(['train', '--help']);"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'accelerate'};"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sd", "--seed", "1"], ([], "sd", ["--seed", "1"])),
        (["--num_processes", "2", "vqa", "--rank", "4"], (["--num_processes", "2"], "vqa", ["--rank", "4"])),
        (
            ["sd", "--seed", "1", "--num_processes", "2", "--rank=3", "--gpu_ids=0,1", "--multi_gpu"],
            (["--num_processes", "2", "--gpu_ids=0,1", "--multi_gpu"], "sd", ["--seed", "1", "--rank=3"]),
        ),
        (["--config_file", "clip", "clip"], (["--config_file", "clip"], "clip", [])),
        (["--fp8_format", "E4M3", "sd"], (["--fp8_format", "E4M3"], "sd", [])),
        (["nothing"], ([], None, ["nothing"])),
    ],
)
def test_flags_go_to_the_launcher_or_to_the_trainer(words, expected):
    assert train.split(words) == expected


def test_every_flag_of_the_launcher_is_one_of_accelerates_and_of_no_trainer():
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    for flag, count in train.LAUNCH_FLAGS.items():
        args = parser.parse_args([flag, *["1"] * count, "script.py", "--own"])
        assert (args.training_script, args.training_script_args) == ("script.py", ["--own"]), flag
    for name in train.TRAINERS:
        text = train.trainer_script(name).read_text()
        assert not any(f'"{flag}"' in text for flag in train.LAUNCH_FLAGS)


def test_a_launcher_flag_starts_the_script_through_accelerate(monkeypatch):
    started = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", started.append)
    assert cli.main(["train", "nlvr2", "--num_processes", "2", "--cpu", "--data_dir", "a b"]) == 0
    (args,) = started
    assert args.num_processes == 2 and args.cpu
    assert args.training_script == str(train.trainer_script("nlvr2"))
    assert args.training_script_args == ["--data_dir", "a b"]


def test_costs_counts_one_method(capsys):
    words = ["costs", "--method", "apt", "--hidden_size", "768", "--num_tokens", "241", "--num_modules", "12"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == "apt: 1,916,940 parameters, 0.9032 GMAC per forward pass\n"
    assert cli.main(["costs"]) == 0
    assert "| ViLT | apt |" in capsys.readouterr().out
    for wrong, message in ((words[:-2], "--method needs --num_modules"), (["costs", "--rank", "3"], "give --model")):
        with pytest.raises(SystemExit):
            cli.main(wrong)
        assert message in capsys.readouterr().err


def test_costs_counts_all_methods_on_a_known_model(capsys):
    assert cli.main(["costs", "--model", "Flux.1-dev", "--unmerged"]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == "Flux.1-dev, 4096 image tokens; next to them 512 words"
    assert rows[0].split() == ["APT", "36,421,689", "parameters", "311.0781", "GMAC"]
    lora = next(row.split() for row in rows if row.startswith("LoRA "))  # 4 d r for query and value, unmerged
    assert lora[1:] == [
        f"{57 * 4 * 3072 * 4:,}",
        "parameters",
        f"{4 * 3072 * 4 * (19 * 4096 + 38 * 4608) / 1e9:.4f}",
        "GMAC",
    ]
    for words, message in ((["--num_modules", "3"], "leave --num_modules out"), (["--rank", "0"], "from 1 to 256")):
        with pytest.raises(SystemExit):
            cli.main(["costs", "--model", "METER", *words])
        assert message in capsys.readouterr().err


# generate


@pytest.fixture(scope="module")
def adapters(tiny_sd_path, tmp_path_factory):
    """Two adapters that act."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("ab"):
        pipe = StableDiffusionAPTPipeline.from_pretrained(tiny_sd_path)
        add_apt(pipe, APTConfig(num_prompts=4))
        randomize(pipe.unet, seed)
        randomize(pipe.text_encoder, seed)
        save_apt_weights(pipe, folder / name)
    return folder


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


def test_generate_draws_what_the_pipeline_draws(tiny_sd_path, adapters, tmp_path, capsys):
    words = ["generate", "a dog", "a cat", "--model", str(tiny_sd_path), "--num_images", "2", "--steps", "2"]
    words += ["--adapter", f"{adapters / 'a'}:0.7", "--adapter", f"{adapters / 'b'}:-0.5", "--seed", "5"]
    words += ["--guidance_scale", "3", "--height", "16", "--width", "32", "--scheduler", "euler", "--device", "cpu"]
    words += ["--negative_prompt", "bad", "--batch_size", "3", "--grid", str(tmp_path / "grid.png")]
    assert cli.main([*words, "--output", str(tmp_path / "drawn")]) == 0
    files = [tmp_path / "drawn" / f"picture-{number}.png" for number in (1, 2, 3, 4)]
    assert capsys.readouterr().out.split() == [*map(str, files), str(tmp_path / "grid.png")]
    assert Image.open(tmp_path / "grid.png").width > 4 * 32

    from diffusers import EulerDiscreteScheduler

    pipe = StableDiffusionAPTPipeline.from_pretrained(tiny_sd_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    for name in "ab":
        pipe.load_apt_weights(adapters / name, adapter_name=name)
    pipe.set_apt_adapters(["a", "b"], [0.7, -0.5])
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 32, "negative_prompt": "bad"}
    for file, (prompt, seed) in zip(files, [("a dog", 5), ("a dog", 6), ("a cat", 5), ("a cat", 6)], strict=True):
        expected = pipe(prompt, generator=torch.Generator().manual_seed(seed), **settings).images[0]
        assert np.abs(pixels(file) - np.asarray(expected).astype(int)).max() <= 1  # batches round otherwise


@pytest.mark.parametrize("model", [*TEXT_TO_IMAGE, "someone/model"])
def test_generate_knows_how_embedded_models_are_sampled(model):
    calls = []

    def pipe(*, prompt, generator, **settings):  # Flux.2's first argument is a picture
        calls.append(settings)
        return SimpleNamespace(images=[None] * len(prompt))

    args = generate.build_parser("generate").parse_args(["a", "--model", model])
    assert generate.draw(pipe, args, [("a", 0)]) == [None]
    embedded = {"num_inference_steps": 15, "guidance_scale": 3.0}
    assert calls == [embedded if model != "someone/model" else {}]


def test_generate_replaces_nothing_unless_told_to(tiny_sd_path, tmp_path, capsys, monkeypatch):
    words = ["generate", "a dog", "--model", str(tiny_sd_path), "--steps", "1", "--height", "16", "--width", "16"]
    file = tmp_path / "dog.jpg"
    file.write_text("precious")
    with monkeypatch.context() as patch:
        patch.setattr(generate, "load_pipeline", lambda *args: pytest.fail("too late"))
        assert cli.main([*words, "--output", str(file)]) == 1
    assert "add --overwrite" in capsys.readouterr().err and file.read_text() == "precious"
    assert cli.main([*words, "--output", str(file), "--overwrite"]) == 0
    assert Image.open(file).format == "JPEG" and [path.name for path in tmp_path.iterdir()] == ["dog.jpg"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--num_images", "-1"], "--num_images must be at least 1"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--output", "x.xyz"], "cannot be written as .xyz"),
        (["--adapter", "not/there/at/all"], "neither a file nor a folder"),
        (["--adapter", "x:nan"], "must be a finite number, got x:nan"),
        ([" "], "A prompt is empty"),
    ],
)
def test_generate_refuses_before_a_model_is_loaded(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *args, **kwargs: pytest.fail("too late"))
    assert cli.main(["generate", "a dog", *words]) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_scheduler_of_another_kind_of_model_is_refused(tiny_sd_path, tmp_path, capsys):
    words = ["generate", "a dog", "--model", str(tiny_sd_path), "--scheduler", "flow_euler"]
    assert cli.main([*words, "--output", str(tmp_path / "x.png")]) == 1
    assert "cannot be sampled with --scheduler flow_euler; these go: ddim" in capsys.readouterr().err


def test_generate_draws_with_a_transformer(tiny_transformer_path, tmp_path):
    from apt_diffusion import FluxAPTPipeline

    folder = tiny_transformer_path("flux")
    pipe = FluxAPTPipeline.from_pretrained(folder)
    add_apt(pipe, APTConfig(num_prompts=4))
    randomize(pipe)
    save_apt_weights(pipe, tmp_path)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 1, "height": 16, "width": 16}
    expected = pipe("a dog", generator=torch.Generator().manual_seed(3), **settings).images[0]
    words = ["generate", "a dog", "--model", str(folder), "--adapter", str(tmp_path), "--device", "cpu"]
    words += ["--steps", "1", "--height", "16", "--width", "16", "--seed", "3", "--output", str(tmp_path / "dog.png")]
    assert cli.main(words) == 0
    assert np.array_equal(pixels(tmp_path / "dog.png"), np.asarray(expected).astype(int))


@pytest.mark.parametrize(
    ("base", "reason"),
    [("flux", "FluxPipeline reads it only with true_cfg_scale above 1"), ("flux2", "Flux2Pipeline takes none")],
)
def test_generate_refuses_a_negative_prompt_without_effect(base, reason, tiny_transformer_path, capsys, monkeypatch):
    folder = tiny_transformer_path(base)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *args, **kwargs: pytest.fail("too late"))
    assert cli.main(["generate", "a dog", "--model", str(folder), "--negative_prompt", "dark"]) == 1
    assert f"--negative_prompt has no effect: {reason}" in capsys.readouterr().err


def test_labels_of_the_grid_are_short_and_its_title_has_the_prompts():
    assert generate.labels(["a dog"], [("a dog", 5), ("a dog", 6)]) == (["seed 5", "seed 6"], "a dog")
    wanted = [("a dog", 5), ("a dog", 6), ("a cat", 5), ("a cat", 6)]
    expected = ["1, seed 5", "1, seed 6", "2, seed 5", "2, seed 6"]
    assert generate.labels(["a dog", "a cat"], wanted) == (expected, "1: a dog; 2: a cat")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("out", ("out", 1.0)),
        ("out:0.7", ("out", 0.7)),
        ("user/repo:-1", ("user/repo", -1.0)),
        ("C:\\adapters\\x", ("C:\\adapters\\x", 1.0)),
        ("out:x", ("out:x", 1.0)),
    ],
)
def test_an_adapter_may_have_a_weight(text, expected):
    assert generate.parse_adapter(text) == expected
