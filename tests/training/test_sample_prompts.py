"""`--sample_prompts`: each picture is what the APT pipeline draws with the line's settings; and the contact sheet."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.training_helpers import WEIGHTS, assert_same_adapter, losses, train

import apt_diffusion as apt
from apt_diffusion.training.grids import save_sheet
from apt_diffusion.training.text_to_image.sample_prompts import SamplePrompt, read_sample_prompts

PROMPTS = """\
# What to look at while it learns
a sks glyph in snow --w 48 --h 24 --d 7 --s 3 --l 2.5 --n dark and -- blurry --a 0.4

a sks glyph
the base alone --a 0 --d 3
"""


def pixels(path_or_image) -> np.ndarray:
    if isinstance(path_or_image, Image.Image):
        return np.asarray(path_or_image.convert("RGB")).astype(int)
    with Image.open(path_or_image) as image:
        return pixels(image)


def written(folder, text=PROMPTS):
    file = folder / "prompts.txt"
    file.write_text(text, encoding="utf-8")
    return file


def names(out):
    return sorted(path.name for path in (out / "samples").iterdir())


def assert_drawn(out, step, number, pipe, prompt, **settings):
    seed = settings.pop("seed")
    generator = torch.Generator().manual_seed(seed)
    expected = pixels(pipe(prompt, generator=generator, **settings).images[0])
    found = pixels(out / "samples" / f"step-{step:06d}-{number:02d}.png")
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 1, (number, settings)


@pytest.mark.parametrize("trains_text", [False, True], ids=["kept texts", "trained texts"])
def test_samples_are_what_the_pipeline_draws(go, tiny_sd_path, tmp_path, trains_text):
    out = go(
        sample_prompts=written(tmp_path), validation_steps=2, max_train_steps=3, seed=11, num_inference_steps=2,
        guidance_scale=3.0, train_text_encoder=trains_text, contact_sheet=True, num_validation_images=4,
        learning_rate=0.1,
    )  # fmt: skip
    assert names(out) == [
        "contact-sheet.png", *(f"step-{step:06d}-0{number}.png" for step in (2, 3) for number in (1, 2, 3)),
    ]  # fmt: skip
    pipe = apt.StableDiffusionAPTPipeline.from_pretrained(tiny_sd_path).load_apt_weights(out)
    usual = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32}
    first = {
        "height": 24, "width": 48, "num_inference_steps": 3, "guidance_scale": 2.5,
        "negative_prompt": "dark and -- blurry",
    }  # fmt: skip
    assert_drawn(out, 3, 1, pipe, "a sks glyph in snow", seed=7, apt_scale=0.4, **first)
    assert_drawn(out, 3, 2, pipe, "a sks glyph", seed=11, **usual)
    assert_drawn(out, 3, 3, pipe, "the base alone", seed=3, apt_scale=0.0, **usual)
    for number, prompt, seed, settings in ((1, "a sks glyph in snow", 7, first), (3, "the base alone", 3, usual)):
        whole = pixels(pipe(prompt, generator=torch.Generator().manual_seed(seed), **settings).images[0])
        difference = np.abs(pixels(out / "samples" / f"step-000003-0{number}.png") - whole).max()
        assert difference > 3, (number, difference)  # the weights have an effect that can be seen
    from huggingface_hub import ModelCard

    card = ModelCard.load(out / "README.md")
    assert [(entry["text"], entry["output"]["url"]) for entry in card.data.widget] == [
        ("a sks glyph in snow", "samples/step-000003-01.png"), ("a sks glyph", "samples/step-000003-02.png"),
        ("the base alone", "samples/step-000003-03.png"),
    ]  # fmt: skip
    assert "![samples while training](samples/contact-sheet.png)" in card.text


@pytest.mark.slow
def test_sdxl_with_and_without_a_negative_prompt(tiny_sdxl_path, instance_dir, tmp_path):
    """SDXL's pipeline takes zeros for no negative prompt, and the text for one."""
    file = written(tmp_path, "a sks glyph --d 1\na sks glyph --d 1 --n dark --w 64\n")
    out = train(
        tiny_sdxl_path, instance_dir, tmp_path / "out", sample_prompts=file, num_inference_steps=2, max_train_steps=1
    )
    pipe = apt.StableDiffusionXLAPTPipeline.from_pretrained(tiny_sdxl_path, add_watermarker=False)
    pipe.load_apt_weights(out)
    usual = {"num_inference_steps": 2, "guidance_scale": 7.5, "height": 32, "seed": 1}
    assert_drawn(out, 1, 1, pipe, "a sks glyph", width=32, **usual)
    assert_drawn(out, 1, 2, pipe, "a sks glyph", width=64, negative_prompt="dark", **usual)


def test_beside_a_validation_prompt_both_are_drawn(go, tmp_path):
    out = go(
        sample_prompts=written(tmp_path, "a dog --s 1"), validation_prompt="a cat", num_validation_images=1,
        num_inference_steps=1, max_train_steps=1,
    )  # fmt: skip
    assert names(out) == ["step-000001-01.png", "step-000001.png"]


@pytest.mark.slow
def test_samples_do_not_disturb_and_a_resumed_run_has_them_all_on_its_sheet(go, tmp_path):
    flags = {"lora_dropout": 0.3, "train_text_encoder": True, "use_ema": True}
    plain = go("plain", max_train_steps=4, **flags)
    flags |= {
        "sample_prompts": written(tmp_path),
        "validation_steps": 1,
        "contact_sheet": True,
        "num_inference_steps": 1,
    }
    watched = go("watched", max_train_steps=4, **flags)
    assert_same_adapter(plain, watched)
    assert losses(plain) == losses(watched)
    go("parts", max_train_steps=2, **flags)
    (tmp_path / "parts" / "samples" / "step-000009-01.png").write_bytes(b"of a run that was given up")
    parts = go("parts", max_train_steps=4, resume_from_checkpoint="latest", **flags)
    assert_same_adapter(plain, parts)
    assert (parts / WEIGHTS).is_file()
    for name in ("contact-sheet.png", "step-000004-01.png"):
        assert np.array_equal(pixels(parts / "samples" / name), pixels(watched / "samples" / name))


def test_flags_of_the_grid_have_no_effect_without_one(go, instance_dir, tmp_path, caplog):
    picture = str(next(instance_dir.iterdir()))
    file = written(tmp_path, "a dog --s 1")
    out = go(sample_prompts=file, num_validation_images=2, validation_images=[picture], max_train_steps=1)
    assert names(out) == ["step-000001-01.png"]
    for flag in ("validation_images", "num_validation_images"):
        assert f"--{flag} is for the grid of --validation_prompt" in caplog.text


def test_all_mistakes_are_told_at_once_before_weights_load(go, tmp_path, no_models):
    file = written(
        tmp_path,
        "a dog --w 30 --h 4\n# a comment --x\n\na cat --q 3 --seed 4\n--d 5\n"
        "a fox --d -1 --s 0 --l high --a nan --n\na cow --s 2 --s 3 --w 8192 --neg ugly\n",
    )
    with pytest.raises(ValueError) as error:
        go(sample_prompts=file)
    assert str(error.value).splitlines() == [
        f"--sample_prompts: {file} has 12 mistakes:",
        "  line 1: --w must be a multiple of 4, got 30.",
        "  line 4: --q is no option of a prompt: these are --w, --h, --d, --s, --l, --n, --a.",
        "  line 4: --seed is no option of a prompt: these are --w, --h, --d, --s, --l, --n, --a.",
        "  line 5: there is no prompt before the options.",
        "  line 6: --d must be a whole number from 0 to 2**63 - 1, got '-1'.",
        "  line 6: --s must be a whole number from 1 to 1000, got '0'.",
        "  line 6: --l must be a finite number, got 'high'.",
        "  line 6: --a must be a finite number, got 'nan'.",
        "  line 6: --n must be a text, got ''.",
        "  line 7: --s stands there twice.",
        "  line 7: --w must be a whole number from 1 to 4096, got '8192'.",
        "  line 7: --neg is no option of a prompt: these are --w, --h, --d, --s, --l, --n, --a.",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--sample_prompts: there is no file"),
        (b"# only a comment\n", "has no prompts"),
        (b"caf\xe9 \n", "is no text in UTF-8"),
    ],
)
def test_files_without_prompts_are_refused(go, tmp_path, no_models, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        go(sample_prompts=file)


def test_a_sheet_without_a_file_of_prompts_and_negative_prompts_of_flux_are_refused(go, tmp_path, no_models):
    with pytest.raises(ValueError, match="--contact_sheet lays out the pictures of --sample_prompts"):
        go(contact_sheet=True)
    with pytest.raises(ValueError, match="line 2: --n: this base takes no negative prompt"):
        read_sample_prompts(written(tmp_path, "a dog\na dog --n dark"), int, takes_negative=False)


def test_what_lines_say(tmp_path):
    file = written(tmp_path, "\ufeffa dog, sks--like --d 0 --l -1.5\n")
    assert read_sample_prompts(file, int) == [SamplePrompt(1, "a dog, sks--like", seed=0, guidance=-1.5)]


def test_texts_that_are_cut_are_named_by_their_lines(go, tmp_path, caplog):
    go(sample_prompts=written(tmp_path, f"a dog --s 1 --n {'dark ' * 90}"), max_train_steps=1)
    assert "--sample_prompts, line 1, --n" in caplog.text


def test_a_sheet_has_all_pictures_whatever_their_sizes(tmp_path):
    colors = {"red": (60, 30), "green": (60, 30), "blue": (20, 200), "yellow": (900, 300)}
    for color, size in colors.items():
        Image.new("RGB", size, color).save(tmp_path / f"{color}.png")
    rows = [
        ("a prompt " * 30, [tmp_path / "red.png", None, tmp_path / "green.png"]),
        ("another", [tmp_path / "blue.png", tmp_path / "yellow.png", None]),
    ]
    sheet = pixels(save_sheet(rows, ["step 1", "step 2", "step 3"], tmp_path / "s" / "sheet.png"))
    boxes = {}
    for color in colors:
        where = np.argwhere((sheet == pixels(Image.new("RGB", (1, 1), color))[0, 0]).all(-1))
        (top, left), (bottom, right) = where.min(0), where.max(0) + 1
        assert len(where) == (bottom - top) * (right - left), color  # whole, nothing over it
        boxes[color] = top, left, bottom, right
    sizes = {color: (right - left, bottom - top) for color, (top, left, bottom, right) in boxes.items()}
    # Small ones are enlarged by whole factors to 192 pixels at most, large ones made smaller.
    assert sizes == {"red": (180, 90), "green": (180, 90), "blue": (20, 200), "yellow": (384, 128)}
    assert boxes["red"][0] == boxes["green"][0] < boxes["blue"][0] == boxes["yellow"][0]  # rows
    assert boxes["red"][1] == boxes["blue"][1] < boxes["yellow"][1] < boxes["green"][1]  # columns
    assert boxes["yellow"][1] >= boxes["red"][3] and boxes["green"][1] >= boxes["yellow"][3]
    assert boxes["blue"][0] >= boxes["red"][2]
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["sheet.png"]


def test_a_sheet_of_a_long_run_stays_a_picture(tmp_path):
    Image.new("RGB", (600, 600), "red").save(tmp_path / "red.png")
    columns = [f"step {step}" for step in range(100)]
    with Image.open(save_sheet([("x", [tmp_path / "red.png"] * 100)], columns, tmp_path / "sheet.png")) as sheet:
        assert sheet.width <= 8192 + 8 and sheet.height < 200
