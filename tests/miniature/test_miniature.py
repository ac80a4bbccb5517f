"""The embedded model, its world, its subjects and the judges of both."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from apt_diffusion.miniature import STABLE_DIFFUSION
from apt_diffusion.miniature.grade import GRADER_FILE, draw, grade, grade_real, load_grader, row_scenes
from apt_diffusion.miniature.models import CLASS_WORD, MAX_TOKENS, TRIGGERS, make_tokenizer
from apt_diffusion.miniature.personalise import class_captions, save_class_pictures
from apt_diffusion.miniature.subjects import (
    OTHER_PROMPTS,
    RECOGNISED,
    SUBJECTS,
    draw_subject,
    prompt_on,
    save_subject,
    subject_score,
)
from apt_diffusion.miniature.world import COLORS, HELD_OUT_COLOR, LAYOUTS, RGB, caption, render, sample_scenes

ROOT = Path(__file__).parents[2]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nearest_color(pixels: torch.Tensor) -> list[str]:
    """Names of the colours of the world nearest to `(B, 3)` in [-1, 1]."""
    return [COLORS[index] for index in torch.cdist((pixels + 1) / 2, RGB).argmin(1)]


@pytest.fixture(scope="module")
def miniature():
    """As a user without this library would load it."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(STABLE_DIFFUSION, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_caption_says_what_the_picture_shows():
    scenes = sample_scenes(300, generator(), patterned=0.0)
    pictures = render(scenes, generator())
    axis = torch.arange(64) - 31.5
    for index, ground in enumerate(nearest_color(pictures[:, :, 1, 1])):
        text = caption(scenes, index)
        assert text.endswith(f"on a {ground} background")
        if not scenes.has_two[index] or "inside" in text:
            continue
        first, second = (RGB[color] * 2 - 1 for color in scenes.color[index])
        masks = [(pictures[index] - rgb[:, None, None]).abs().amax(0) < 0.3 for rgb in (first, second)]
        (x1, y1), (x2, y2) = [((m * axis).sum() / m.sum(), (m * axis[:, None]).sum() / m.sum()) for m in masks]
        where = {"left of": x1 < x2 - 9, "right of": x1 > x2 + 9, "above": y1 < y2 - 9, "below": y1 > y2 + 9}
        assert where[LAYOUTS[scenes.layout[index]]], text


def test_held_out_pairs_are_drawn_only_on_request():
    scenes = sample_scenes(5000, generator())
    shown = [
        scenes.shape[:, 0] * 10 + scenes.color[:, 0],
        (scenes.shape[:, 1] * 10 + scenes.color[:, 1])[scenes.has_two],
    ]
    shown = set(torch.cat(shown).tolist())
    held_out = {shape * 10 + color for shape, color in enumerate(HELD_OUT_COLOR.tolist())}
    assert shown == set(range(90)) - held_out
    asked = sample_scenes(500, generator(), held_out=True)
    assert set((asked.shape[:, 0] * 10 + asked.color[:, 0]).tolist()) == held_out


def test_parts_of_a_scene_differ_in_colour_and_seeds_decide():
    scenes = sample_scenes(500, generator(3))
    colors = torch.cat([scenes.color, scenes.ground], 1).sort(1).values
    patterned = scenes.pattern > 0
    assert (colors[patterned].diff(dim=1) > 0).all()
    assert ((colors[~patterned].diff(dim=1) > 0).sum(1) == 2).all()  # a plain background names its colour twice
    assert torch.equal(render(scenes, generator(5)), render(sample_scenes(500, generator(3)), generator(5)))


def test_every_word_is_one_token_and_any_text_encodes():
    tokenizer = make_tokenizer()
    words = {word for index in range(300) for word in caption(sample_scenes(300, generator()), index).split()}
    for word in [*words, *TRIGGERS, CLASS_WORD]:
        assert len(tokenizer(word).input_ids) == 3, word
    assert max(len(tokenizer(text).input_ids) for text in OTHER_PROMPTS) < MAX_TOKENS
    assert (
        tokenizer.decode(tokenizer("Ünusual words!").input_ids, skip_special_tokens=True).strip() == "ünusual words !"
    )


def test_embedded_files_are_small_and_not_pickled():
    files = [file for file in STABLE_DIFFUSION.rglob("*") if file.is_file()] + [GRADER_FILE]
    assert sum(file.stat().st_size for file in files) < 16 * 2**20
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


@pytest.mark.slow
def test_the_grader_reads_real_pictures(miniature):
    table = grade_real(load_grader(), miniature.vae, 64)
    for row, values in table.items():
        assert values["shape"] > 0.9 and values["color"] > 0.95 and values["background"] > 0.95, (row, values)


@pytest.mark.slow
def test_the_model_draws_what_a_caption_says(miniature):
    for row, least in (
        ("one shape, plain, large", 0.85),
        ("one shape, plain, small", 0.8),
        ("two shapes, plain", 0.5),
    ):
        scenes = row_scenes(16, seed=7)[row]
        pictures = draw(miniature, [caption(scenes, index) for index in range(16)], steps=12)
        assert nearest_color(pictures[:, :, 1, 1]) == [COLORS[ground] for ground in scenes.ground[:, 0]]
        assert grade(load_grader(), pictures, scenes)["all right"] >= least, row


@pytest.mark.parametrize("name", SUBJECTS)
def test_subject_score_tells_the_subject_from_everything_else(name):
    subject = SUBJECTS[name]
    real = subject_score(draw_subject(subject, subject.grounds + subject.unseen_grounds, seed=4), subject)
    world = subject_score(render(sample_scenes(100, generator()), generator()), subject)
    assert real.min() > 0.75 > RECOGNISED > world.max() + 0.1
    for other in set(SUBJECTS) - {name}:
        assert subject_score(draw_subject(SUBJECTS[other], subject.grounds), subject).max() < 0.4
    assert not set(subject.grounds) & set(subject.unseen_grounds)
    assert not {color for color, _ in subject.parts} & {*subject.grounds, *subject.unseen_grounds}


def test_training_pictures_of_the_repository_are_those_of_the_subject(tmp_path):
    save_subject(SUBJECTS["mushroom"], tmp_path)
    for file in sorted(tmp_path.iterdir()):
        kept = ROOT / "examples" / "subject" / file.name
        if file.suffix == ".txt":
            assert kept.read_text() == file.read_text()
            assert file.read_text().strip() == prompt_on(file.stem.split("-")[1])
        else:
            assert np.abs(np.asarray(Image.open(kept), float) - np.asarray(Image.open(file), float)).max() <= 1


def test_class_pictures_are_the_base_models_own_with_captions(miniature, tmp_path):
    save_class_pictures(miniature, tmp_path, class_captions("miniature", 2, seed=3), seed=3)
    text = (tmp_path / "001.txt").read_text().strip()
    picture = draw(miniature, [(tmp_path / "000.txt").read_text().strip(), text], seed=3)[1]
    expected = picture.clamp(-1, 1).add(1).mul(127.5).round().permute(1, 2, 0)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "001.png")), expected.numpy().astype(np.uint8))
    with pytest.raises(
        ValueError, match="'someone/model' is no embedded Stable Diffusion: miniature, miniature-sd3, miniature-emoji"
    ):
        class_captions("someone/model")
    assert class_captions("miniature-sd3", 2, seed=3) == class_captions("miniature", 2, seed=3)  # of one world


def test_pretraining_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import pretrain_miniature
    import stages

    def interrupt(step: int) -> None:
        raise KeyboardInterrupt

    def weights(folder: str, *runs: str) -> dict[str, torch.Tensor]:
        (tmp_path / folder).mkdir()
        for run in runs:
            arguments = ["--output_dir", str(tmp_path / folder), "--text_steps", "4", "--save_every", "2"]
            args = pretrain_miniature.parse_args(arguments)
            torch.manual_seed(0)
            stage = pretrain_miniature.text_stage(args, pretrain_miniature.make_text_encoder(make_tokenizer()))
            if run == "killed":
                with pytest.raises(KeyboardInterrupt):
                    stages.fit(stage, args.output_dir, args.seed, args.save_every, interrupt)
            else:
                stages.fit(stage, args.output_dir, args.seed, args.save_every)
        return stage.modules["text_encoder"].state_dict()

    straight, resumed = weights("straight", "whole"), weights("resumed", "killed", "rest")
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
