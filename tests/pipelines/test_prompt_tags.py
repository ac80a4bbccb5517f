"""`<apt:name:0.8>` in a prompt: the picture is that of the same adapters named in the call."""

import numpy as np
import pytest
from conftest import draw, randomize

import apt_diffusion as apt
from apt_diffusion.pipelines.prompt_tags import split_tags

SMALL = apt.APTConfig(num_prompts=6, rank=2)


@pytest.fixture
def two(pipe):
    apt.add_apt(pipe, SMALL, "a")
    apt.add_apt(pipe, apt.APTConfig(num_prompts=9, rank=2), "b.v2")
    randomize(pipe)
    pipe.set_apt_adapters("a")
    pipe.apt_prompt_tags = True
    return pipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red dog", ("a red dog", {})),
        ("a dog <apt:dog:0.8> on a beach", ("a dog on a beach", {"dog": 0.8})),
        ("<apt:dog>a dog<apt:cat:-1e-1>", ("a dog", {"dog": 1.0, "cat": -0.1})),
        ("a < b <apt: my dog v1.5 : 2 >", ("a < b", {"my dog v1.5": 2.0})),
        ("<apt:a:0.5> x <apt:a:0.25>", ("x", {"a": 0.75})),
        ("a <lora:dog:1>  dog", ("a <lora:dog:1>  dog", {})),
    ],
)
def test_tags_and_text_are_told_apart(text, expected):
    assert split_tags(text) == expected


def test_a_strangers_long_text_is_read_once():
    text = "a" + " " * 10**6 + "<apt:" * 10**5
    assert split_tags(text) == (text, {})
    assert split_tags(text + "<apt:b:2>") == ("a " + "<apt:" * 10**5, {"b": 2.0})


@pytest.mark.parametrize(
    "tag", ["<apt:dog:loud>", "<apt:dog:nan>", "<apt:dog:>", "<apt:dog:1e999>", "<apt:>", "<apt::1>"]
)
def test_a_tag_that_cannot_be_read_is_named(tag):
    with pytest.raises(ValueError, match=r"<apt:"):
        split_tags(f"a dog {tag}")


def test_a_tag_is_exactly_these_adapters_for_this_prompt(two):
    expected = draw(two, prompt="a dog", apt_scale={"b.v2": 0.6, "a": 0.3})
    assert np.array_equal(draw(two, prompt="a dog <apt:b.v2:0.6> <apt:a:0.3>"), expected)
    active = draw(two, prompt="a dog")
    assert not np.array_equal(active, expected)
    two.apt_prompt_tags = False
    assert np.array_equal(draw(two, prompt="a dog"), active)
    assert not np.array_equal(draw(two, prompt="a dog <apt:b.v2:0.6> <apt:a:0.3>"), expected)  # text like any other


def test_each_prompt_of_a_batch_has_its_own(two):
    prompts = ["a dog <apt:b.v2:0.6>", "a cat", "a cat <apt:a:0>"]
    mixed = draw(two, prompt=prompts)
    for row, (prompt, scale) in enumerate((("a dog", {"b.v2": 0.6}), ("a cat", None), ("a cat", {"a": 0.0}))):
        same = draw(two, prompt=[prompt] * 3, apt_adapter_names=[scale or "a"] * 3)
        np.testing.assert_allclose(mixed[row], same[row], rtol=0, atol=1e-5)


def test_a_number_scales_what_the_tags_say(two):
    expected = draw(two, prompt="a dog", apt_adapter_names=[{"b.v2": 0.6}], apt_scale=0.5)
    assert np.array_equal(draw(two, prompt="a dog <apt:b.v2:0.6>", apt_scale=0.5), expected)


def test_adapters_of_the_store_may_be_named(two, tmp_path):
    two.save_apt_weights(tmp_path / "kept", "b.v2")
    expected = draw(two, prompt="a dog", apt_scale={"b.v2": 0.6})
    two.delete_apt_adapters("b.v2")
    two.apt_store = apt.AdapterStore(tmp_path)
    assert np.array_equal(draw(two, prompt="a dog <apt:kept:0.6>"), expected)
    assert two.get_list_apt_adapters()["unet"] == ["a"]


def test_mistakes_are_told_before_anything_is_drawn(two):
    for kwargs, message in (
        ({"prompt": "a <apt:zebra>"}, "zebra"),
        ({"prompt": "a", "negative_prompt": "b <apt:a>"}, "negative"),
        ({"prompt": "a <apt:a>", "apt_adapter_names": ["a"]}, "one place"),
        ({"prompt": "a <apt:a>", "apt_scale": {"a": 1.0}}, "one place"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(two, **kwargs)
    assert two.get_active_apt_adapters() == ["a"]
