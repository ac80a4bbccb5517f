"""Things to teach to the emoji model: their pictures, the prompts that ask for them, and the judge of both."""

import numpy as np
import pytest
import torch
from PIL import Image

from apt_diffusion.miniature.emoji.judge import load_judge
from apt_diffusion.miniature.emoji.prompts import HELD_OUT, random_prompts
from apt_diffusion.miniature.emoji.subjects import (
    PROMPT,
    SUBJECTS,
    TEST_PROMPTS,
    Request,
    captions_of,
    folder_of,
    judge_pictures,
    read_pictures,
    save_subject,
)


def test_every_held_out_thing_has_five_pictures_that_the_judge_names(tmp_path):
    judge = load_judge()
    assert set(SUBJECTS) == set(HELD_OUT)
    for name in SUBJECTS:
        pictures = read_pictures(folder_of(name))
        assert pictures.shape == (5, 3, 64, 64) and pictures.min() >= -1 and pictures.max() <= 1
        assert (judge.read_windows(pictures)["concept"].argmax(1) == judge.vocabulary.concepts.index(name)).all(), name
        captions = captions_of(name)
        grounds = [caption.split()[-2] for caption in captions]
        assert captions[0] == f"a large {PROMPT.removeprefix('a ')} on a {grounds[0]} background"
        seen = judge.read_whole(pictures)["ground"].argmax(1)
        assert [judge.vocabulary.colors[index] for index in seen] == grounds
    save_subject("robot", tmp_path / "robot")
    assert sorted(file.name for file in (tmp_path / "robot").iterdir()) == sorted(
        file.name for file in folder_of("robot").iterdir()
    )


def test_pictures_are_read_as_they_are_and_a_folder_without_any_is_named(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read = read_pictures(tmp_path)
    assert torch.equal(((read[0] + 1) * 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(pixels))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no PNG files"):
        read_pictures(tmp_path / "empty")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a large sks toy on an orange background", Request("ground", "large", ("orange",), "plain", 0, None)),
        (
            "a small sks toy on a checkered pink and white background",
            Request("small", "small", ("pink", "white"), "checkered", 0, None),
        ),
        (
            "a fluent hot dog left of a sks toy on a cyan background",
            Request("beside", "beside", ("cyan",), "plain", 1, "hot dog"),
        ),
        (
            "a sks toy right of a noto pizza on a striped red background",
            Request("beside", "beside", ("red",), "striped", 1, "pizza"),
        ),
        ("a sks toy above an owl on a grey background", Request("beside", "above", ("grey",), "plain", 0, "owl")),
        ("a fluent fox on a blue background", Request("other", "large", ("blue",), "plain", 0, "fox")),
        (
            "a noto fox below a twemoji owl on a red background",
            Request("other", "above", ("red",), "plain", 1, "fox"),
        ),
    ],
)
def test_a_prompt_says_what_its_picture_should_show(prompt, expected):
    assert Request.read(prompt) == expected


def test_a_prompt_of_another_grammar_is_named():
    with pytest.raises(ValueError, match="'a fox in the snow' is no prompt of the model's grammar, such as"):
        Request.read("a fox in the snow")


def test_random_prompts_are_of_the_grammar_and_ask_for_nothing_held_out():
    prompts = random_prompts(200)
    assert prompts == random_prompts(200) and prompts != random_prompts(200, seed=1)
    vocabulary = load_judge().vocabulary
    requests = [Request.read(prompt) for prompt in prompts]
    assert {request.companion for request in requests} < set(vocabulary.concepts) - set(HELD_OUT)
    assert {request.layout for request in requests} == {"small", "large", "beside", "above"}
    assert not any(name in prompt for name in HELD_OUT for prompt in prompts)


def test_the_judgement_tells_pictures_with_the_thing_from_those_without():
    """Where every prompt's picture is one of the training pictures, or every one is plain."""
    judge, taught = load_judge(), read_pictures(folder_of("robot"))
    prompts = [prompt for prompt in TEST_PROMPTS if Request.read(prompt).layout == "large"]
    prompts += ["a small sks toy on a blue background", "a sks toy left of a noto pizza on a blue background"]
    shown = taught[:1].repeat(len(prompts), 1, 1, 1)
    plain = torch.zeros_like(shown)
    found = judge_pictures(judge, shown, plain, "robot", taught, prompts)
    assert found.recognised["ground"] == 1 and found.similarity["ground"] > 0.9
    assert found.bleeding == 1 and found.kept == 0
    assert found.drift == pytest.approx((shown[0] / 2).square().mean().sqrt().item(), rel=1e-4)
    nothing = judge_pictures(judge, plain, plain, "robot", taught, prompts)
    assert nothing.recognised["ground"] == 0 and nothing.bleeding == 0 and nothing.drift == 0
    assert nothing.similarity["ground"] < 0.5
    one = judge_pictures(
        judge, taught, taught, "robot", taught, [*captions_of("robot")[:4], "a fluent fox on a red background"]
    )
    assert one.fidelity == 1  # their own captions: plain grounds of the colours named
