"""The embedded model of emoji, its judge, and the scripts that made them (on sprites of the test's own)."""

import functools
import hashlib
import io
import json
import os
import stat
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from apt_diffusion.miniature import MODELS
from apt_diffusion.miniature.emoji.judge import JUDGE_FILE, VOCABULARY_FILE, load_judge, look_at

ROOT = Path(__file__).parents[2]
FOLDER = MODELS["miniature-emoji"]
HELD_OUT = ("teddy bear", "robot", "castle", "octopus", "cherries", "wrapped gift")


@pytest.fixture(scope="module")
def emoji():
    """As a user without this library would load it."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


@pytest.fixture
def world(tools, tmp_path):
    """Eight things in two styles: discs and squares, one colour each."""
    from emoji_scenes import World

    names = [*HELD_OUT, "fox", "apple"]
    sprites = np.zeros((len(names), 2, 64, 64, 4), np.uint8)
    y, x = np.mgrid[:64, :64] - 31.5
    for row in range(len(names)):
        for column, mask in enumerate((np.hypot(x, y) < 30, np.maximum(abs(x), abs(y)) < 30)):
            sprites[row, column][mask] = (255 * (row % 2), 30 * row, 255 - 30 * row, 255)
    np.savez(tmp_path / "sprites.npz", sprites=sprites, names=names, styles=["noto", "twemoji"])
    return World(tmp_path / "sprites.npz")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipeline, prompts: list[str], seed: int = 0, steps: int = 12) -> torch.Tensor:
    generators = [generator(seed + index) for index in range(len(prompts))]
    images = pipeline(
        prompts, num_inference_steps=steps, guidance_scale=3.0, generator=generators, output_type="pt"
    ).images
    return images * 2 - 1


# The model


@pytest.mark.slow
def test_it_draws_the_things_and_grounds_of_the_prompt_and_seeds_decide(emoji):
    vocabulary = load_judge().vocabulary
    things = ["fox", "pizza", "rocket", "sunflower"]
    grounds = ["green", "blue", "white", "purple"]
    prompts = [f"a large noto {thing} on a {g} background" for thing, g in zip(things, grounds, strict=True)]
    pictures = draw(emoji, prompts)
    read, whole = load_judge().read_windows(pictures), load_judge().read_whole(pictures)
    assert [vocabulary.concepts[index] for index in read["concept"].argmax(1)] == things
    assert [vocabulary.colors[index] for index in whole["ground"].argmax(1)] == grounds
    again = draw(emoji, prompts[1:2], seed=1)
    assert torch.allclose(again[0], pictures[1], atol=1e-3)
    assert not torch.allclose(draw(emoji, prompts[1:2], seed=2)[0], pictures[1], atol=0.1)


def test_two_things_stand_where_the_prompt_says(emoji):
    judge = load_judge()
    picture = draw(emoji, ["a noto pumpkin left of a noto soccer ball on a cyan background"])
    windows = look_at(picture.expand(2, -1, -1, -1), torch.tensor([[16.0, 32], [48, 32]]), torch.tensor([36.0, 36]))
    seen = judge.read_windows(windows)["concept"].argmax(1)
    assert [judge.vocabulary.concepts[index] for index in seen] == ["pumpkin", "soccer ball"]


def test_the_library_draws_with_it_by_name(emoji):
    from apt_diffusion import StableDiffusionAPTPipeline

    pipeline = StableDiffusionAPTPipeline.from_pretrained("miniature-emoji")
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a large fluent rocket on a blue background"]
    assert torch.allclose(draw(pipeline, prompts, steps=2), draw(emoji, prompts, steps=2), atol=1e-4)


@pytest.mark.slow
def test_its_adapters_are_trained_by_the_script_and_served_from_a_store(tmp_path, monkeypatch):
    """Three steps change the picture; a batch from a store holds what each row gives alone."""
    monkeypatch.syspath_prepend(str(ROOT / "train"))
    import train_apt_sd

    from apt_diffusion import AdapterStore, StableDiffusionAPTPipeline
    from apt_diffusion.miniature.emoji.subjects import PROMPT, folder_of

    command = (
        "--pretrained_model_name_or_path miniature-emoji --max_train_steps 3 --train_batch_size 1 --num_prompts 8"
    )
    command += " --learning_rate 1e-1 --lr_scheduler constant --train_text_encoder --report_to none"
    places = ["--instance_data_dir", str(folder_of("octopus")), "--output_dir", str(tmp_path / "store" / "octopus")]
    train_apt_sd.main([*command.split(), *places, "--instance_prompt", PROMPT])
    pipeline = StableDiffusionAPTPipeline.from_pretrained("miniature-emoji")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.apt_store = AdapterStore(tmp_path / "store")

    def pictures(names: list[str | None]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(0) for _ in names]
        prompts = ["a large sks toy on a pink background"] * len(names)
        call = {"num_inference_steps": 2, "output_type": "pt", "generator": generators}
        return pipeline(prompts, apt_adapter_names=names, **call).images

    taught, base = pictures(["octopus"]), pictures([None])
    assert (taught - base).abs().max() > 0.01
    assert torch.allclose(pictures(["octopus", None]), torch.cat([taught, base]), atol=1e-4)


def test_every_word_is_one_token_and_free_words_are_not_in_captions(emoji):
    vocabulary = load_judge().vocabulary
    words = {word for text in (*vocabulary.concepts, *vocabulary.styles, *vocabulary.colors) for word in text.split()}
    free = {"sks", "zwx", "mascot", "toy", "figure"}
    for word in words | free | {"background", "striped", "left", "thing"}:
        assert len(emoji.tokenizer(word).input_ids) == 3, word
    assert not words & free
    assert set(HELD_OUT) < set(vocabulary.concepts)


def test_no_file_is_pickled_and_the_notices_are_there():
    files = [file for file in FOLDER.rglob("*") if file.is_file()] + [JUDGE_FILE, VOCABULARY_FILE]
    assert {file.suffix for file in files} == {".safetensors", ".json", ".md"}
    notice, card = (ROOT / "NOTICE").read_text(), (FOLDER / "README.md").read_text()
    owners = {
        "Google Inc": "Apache",
        "Twitter, Inc and other contributors": "CC-BY 4.0",
        "Microsoft Corporation": "MIT License",
        "Miles Johnson": "MIT License",
    }
    for text in (notice, card):
        assert all(owner in text and licence in text for owner, licence in owners.items())
        assert "https://creativecommons.org/licenses/by/4.0/" in text
    assert "WITHOUT WARRANTY OF ANY KIND" in notice
    project = (ROOT / "pyproject.toml").read_text()
    assert 'license-files = ["LICENSE", "NOTICE"]' in project


# Scenes and captions


def test_captions_are_those_that_the_tokenizer_would_encode(world, emoji):
    from emoji_scenes import Captions

    captions = Captions(world, emoji.tokenizer)
    scenes = world.sample(300, generator())
    texts = captions.text(scenes)
    encoded = emoji.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(captions.encode(scenes), encoded)
    assert any("an apple" not in text and "apple" in text for text in texts)
    for index, text in enumerate(texts):
        two = bool(scenes.has_two[index])
        assert two == any(f" {words} " in text for words in ("left of", "right of", "above", "below"))
        assert two != text.startswith(("a small ", "a large "))
        assert text.endswith(" background") and " on a" in text
        assert not any(name in text for name in HELD_OUT)
    part = captions.encode(scenes, generator())
    empty = (part == captions.empty).all(1).float().mean()
    assert 0.04 < empty < 0.18 and not torch.equal(part, encoded)


def test_pictures_show_what_their_scenes_say(world):
    from emoji_scenes import COLORS, LAYOUTS

    scenes = world.sample(200, generator(), patterns=(1, 0, 0, 0))
    pictures = (world.render(scenes, generator()) + 1) / 2
    grounds = torch.tensor(list(COLORS.values()))[scenes.ground[:, 0]]
    assert (pictures[:, :, 0, 0] - grounds).abs().max() < 0.04
    covered = ((pictures - grounds[:, :, None, None]).abs().amax(1) > 0.15).float().sum((1, 2))
    small, large = (covered[scenes.layout == LAYOUTS.index(size)] for size in ("small", "large"))
    assert small.max() < 1100 < large.max() and small.mean() < large.mean() / 2
    axis = torch.arange(64) - 31.5
    for index in (scenes.layout == LAYOUTS.index("left of")).nonzero()[:, 0].tolist():
        scene = scenes.take(torch.tensor([index, index]))
        scene.concept[1] = scene.concept[0].flip(0)
        scene.style[1] = scene.style[0].flip(0)
        scene.layout[1] = LAYOUTS.index("right of")
        first, second = world.render(scene, generator(1))  # A left of B is B right of A
        assert ((first - second).abs() * (axis.abs() < 24)).mean() < 0.12


def test_held_out_things_are_drawn_on_request_alone(world):
    scenes = world.sample(500, generator())
    assert set(scenes.concept.flatten().tolist()) == {6, 7}
    assert set(world.sample(100, generator(), world.held_out).concept.flatten().tolist()) == set(range(6))


def test_the_judge_reads_windows_where_objects_stand(world):
    from emoji_grade import windows_on

    scenes = world.sample(200, generator(), layouts=(0, 0, 1, 1, 1, 1), patterns=(1, 0, 0, 0))
    pictures = world.render(scenes, generator())
    sprites = world.banks[0].float().reshape(8, 2, 4, 64, 64)
    for slot in (0, 1):
        middle = windows_on(pictures, scenes, torch.full((200,), slot))[:, :, 28:36, 28:36].mean((2, 3))
        expected = sprites[scenes.concept[:, slot], scenes.style[:, slot], :3, 32, 32] * 2 - 1
        assert (middle - expected).abs().max() < 0.1


# The scripts


def tiny_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=2,
        norm_num_groups=8,
    )


@pytest.mark.slow
def test_training_of_every_stage_resumes_exactly(world, tmp_path, monkeypatch):
    import pretrain_miniature_emoji as script
    import stages

    monkeypatch.setattr(script, "make_unet", tiny_unet)

    def interrupt(step: int) -> None:
        raise KeyboardInterrupt

    def trained(folder: str, *runs: str) -> dict[str, dict[str, torch.Tensor]]:
        (tmp_path / folder).mkdir()
        args = script.parse_args(
            ["--steps", "2", "2", "2", "2", "--batch_sizes", "2", "2", "4", "4", "--save_every", "1"]
        )
        results = {}
        torch.manual_seed(0)
        vae = script.make_autoencoder().requires_grad_(False)
        vae.register_to_config(scaling_factor=1.0)
        modules: dict = {}
        for name in ("autoencoder", "denoiser", "decoder", "judge"):
            for run in runs:
                torch.manual_seed(0)
                if name == "autoencoder":
                    stage = script.autoencoder_stage(args, world)
                elif name == "denoiser":
                    stage = script.denoiser_stage(args, world, vae)
                    modules = stage.modules
                elif name == "decoder":
                    vae = script.make_autoencoder().requires_grad_(False)
                    vae.register_to_config(scaling_factor=1.0)
                    stage = script.decoder_stage(args, world, vae, modules)
                else:
                    stage = script.judge_stage(args, world, vae)
                if run == "killed":
                    with pytest.raises(KeyboardInterrupt):
                        stages.fit(stage, tmp_path / folder, 0, 1, interrupt)
                else:
                    stages.fit(stage, tmp_path / folder, 0, 1)
            results[name] = {f"{key}.{k}": v for key, m in stage.modules.items() for k, v in m.state_dict().items()}
        return results

    straight, resumed = trained("straight", "whole"), trained("resumed", "killed", "rest")
    for name in straight:
        assert all(torch.equal(straight[name][key], resumed[name][key]) for key in straight[name]), name


@pytest.mark.slow
def test_an_exported_model_is_graded_beside_real_pictures(world, tmp_path, monkeypatch):
    import pretrain_miniature_emoji as script
    from emoji_export import CARD, export_judge, export_pipeline

    monkeypatch.setattr(script, "save_sheet", functools.partial(script.save_sheet, count=2))
    tokenizer = script.make_emoji_tokenizer(world.names, world.styles)
    modules = {"unet": tiny_unet(), "text_encoder": script.make_text_encoder(tokenizer)}
    pipeline = script.pipeline_of(world, script.make_autoencoder(), modules)
    export_pipeline(tmp_path / "model" / script.MODEL_FOLDER, pipeline, CARD)
    vocabulary = script.Vocabulary(tuple(world.names), tuple(world.styles), script.PATTERNS, tuple(script.COLORS))
    export_judge(tmp_path / "model", script.Judge(vocabulary))
    flags = ["--sprites", str(tmp_path / "sprites.npz"), "--export_dir", str(tmp_path / "model")]
    script.main(["--grade", *flags, "--output_dir", str(tmp_path / "out"), "--grade_count", "2", "--grade_limit", "2"])
    grades = json.loads((tmp_path / "out" / "grades.json").read_text())
    assert set(grades) == {"drawn", "real"}
    for table in grades.values():
        assert list(table) == ["large, every pair", "large, plain", "small", "two"]
        assert all(share in (0, 0.5, 1) for row in table.values() for share in row.values())
    assert (tmp_path / "out" / "graded.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "parts"),
    [("decoder", ("vae.decoder.", "vae.post_quant_conv.")), ("denoiser", ("unet.", "text_encoder."))],
)
def test_a_stage_goes_on_from_what_was_exported(world, tmp_path, monkeypatch, stage, parts):
    """Its own weights move by no more than a few steps do; all others stay as they were, to the last bit."""
    import pretrain_miniature_emoji as script
    from emoji_export import CARD, export_judge, export_pipeline
    from safetensors.torch import load_file

    monkeypatch.setattr(script, "make_unet", tiny_unet)
    monkeypatch.setattr(script, "save_samples", lambda *args: None)
    monkeypatch.setattr(script, "report", lambda args, world: None)
    tokenizer = script.make_emoji_tokenizer(world.names, world.styles)
    vae = script.make_autoencoder()
    vae.register_to_config(scaling_factor=0.75)
    modules = {"unet": tiny_unet(), "text_encoder": script.make_text_encoder(tokenizer)}
    model = tmp_path / "model" / script.MODEL_FOLDER
    export_pipeline(model, script.pipeline_of(world, vae, modules), CARD)
    vocabulary = script.Vocabulary(tuple(world.names), tuple(world.styles), script.PATTERNS, tuple(script.COLORS))
    export_judge(tmp_path / "model", script.Judge(vocabulary))
    files = [*sorted(model.glob("*/*.safetensors")), tmp_path / "model" / "judge.safetensors"]
    before = {file: load_file(file) for file in files}
    flags = ["--sprites", str(tmp_path / "sprites.npz"), "--export_dir", str(tmp_path / "model")]
    flags += ["--steps", "1", "2", "2", "1", "--batch_sizes", "4", "4", "4", "4", "--stages", stage, "export"]
    script.main([*flags, "--further", "--output_dir", str(tmp_path / "out")])
    moved = {
        f"{file.parent.name}.{name}": (value - before[file][name]).abs().max().item()
        for file in files
        for name, value in load_file(file).items()
    }
    changed = {name: by for name, by in moved.items() if by}
    assert changed and all(name.startswith(parts) for name in changed)
    assert max(changed.values()) < 0.01
    assert json.loads((model / "vae" / "config.json").read_text())["scaling_factor"] == 0.75


def archive(folder: Path, package, licence: str) -> Path:
    """A package as `npm pack` would leave it: one red square."""
    body = {"info.json": {"license": {"spdx": licence}}}
    body["icons.json"] = {
        "width": 32,
        "height": 16,
        "icons": {"box": {"body": '<rect x="8" y="4" width="16" height="8" fill="red"/>'}},
    }
    file = folder / package.archive
    with tarfile.open(file, "w:gz") as files:
        for name, value in body.items():
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            files.addfile(member, io.BytesIO(data))
    return file


@pytest.fixture
def package(tools):
    from emoji_sprites import Package

    return Package("@example/icons", "1.0.0", "", "MIT")


def with_checksum(package, file: Path):
    import dataclasses

    return dataclasses.replace(package, sha256=hashlib.sha256(file.read_bytes()).hexdigest())


def fake_npm(monkeypatch, folder: Path, script: str) -> None:
    """Stands in for the client, first on the path."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod((folder / "npm").stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_package_is_fetched_once_and_drawn(package, tmp_path, monkeypatch):
    from emoji_sprites import draw_icon, fetch, read_icons

    (tmp_path / "registry").mkdir()
    package = with_checksum(package, archive(tmp_path / "registry", package, "MIT"))
    calls = tmp_path / "calls"
    fake_npm(monkeypatch, tmp_path / "bin", f'echo "$@" >> {calls}; cp {tmp_path}/registry/*.tgz "$4"')
    for _ in range(2):
        file = fetch(package, tmp_path / "npm")
    assert calls.read_text() == f"pack @example/icons@1.0.0 --pack-destination {tmp_path / 'npm'}\n"
    sprite = draw_icon(read_icons(file, package), "box")
    assert sprite.shape == (64, 64, 4) and tuple(sprite[32, 32]) == (255, 0, 0, 255)
    assert np.flatnonzero(sprite[:, 32, 3]).tolist() == list(range(16, 48))  # twice as wide as high, and centred


def test_no_network_a_wrong_archive_and_a_wrong_licence_are_clear_errors(package, tmp_path, monkeypatch):
    from emoji_sprites import fetch, read_icons

    fake_npm(monkeypatch, tmp_path / "bin", 'echo "npm error network request failed" >&2; exit 1')
    with pytest.raises(RuntimeError, match=r"network request failed.*put example-icons-1.0.0.tgz into"):
        fetch(package, tmp_path / "npm")
    file = archive(tmp_path / "npm", package, "CC-BY-SA-4.0")
    with pytest.raises(RuntimeError, match=r"checksum.*Delete it"):
        fetch(package, tmp_path / "npm")
    with pytest.raises(RuntimeError, match=r"declares the licence CC-BY-SA-4.0, not MIT"):
        read_icons(fetch(with_checksum(package, file), tmp_path / "npm"), package)
    file.unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(RuntimeError, match=r"not installed. Install Node"):
        fetch(package, tmp_path / "npm")


def test_the_list_of_things_is_what_the_judge_knows(tools):
    from emoji_scenes import HELD_OUT as NOT_SHOWN
    from emoji_sprites import PACKAGES, read_concepts

    vocabulary = load_judge().vocabulary
    assert vocabulary.concepts == tuple(read_concepts()) and vocabulary.styles == tuple(PACKAGES)
    assert NOT_SHOWN == HELD_OUT
