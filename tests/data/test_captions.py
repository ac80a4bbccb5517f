"""Captions that change from sample to sample: their tags, words around them, and that nothing else changes."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from support.training_helpers import assert_same_adapter, command

from apt_diffusion.data.captions import CaptionOptions
from apt_diffusion.data.dreambooth import DreamBoothData, Framing
from apt_diffusion.data.folders import FolderOptions, scan_pictures
from apt_diffusion.data.order import Branch, Purpose, random_at

TAGS = "sks dog, grass, sunny, bucket, red collar"


def data_of(folder, options=None, seed=0, dropout=0.0):
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (40, 40)).save(folder / "a.png")
    found = scan_pictures(folder, TAGS, FolderOptions(captions=options or CaptionOptions())).checked()
    return DreamBoothData(found, [], Framing(32), (4, 8, 8), seed, caption_dropout=dropout)


def prompts(data, positions=range(120)):
    return [data[position][0].prompt for position in positions]


def test_tags_are_shuffled_behind_those_that_are_kept(tmp_path):
    found = prompts(data_of(tmp_path, CaptionOptions(shuffle=True, keep_tokens=1)))
    orders = [prompt.split(", ") for prompt in found]
    assert {order[0] for order in orders} == {"sks dog"}
    assert all(sorted(order) == sorted(TAGS.split(", ")) for order in orders)
    assert len(set(found)) == 24  # 4! orders of the other four
    for position in (0, 7, 10**12):
        draws = np.random.Generator(np.random.Philox(key=[0, position * 4 + 1], counter=[0, 0, 0, 1]))
        tags = TAGS.split(", ")
        expected = ", ".join([tags[0], *(tags[1 + index] for index in draws.permutation(4))])
        assert prompts(data_of(tmp_path, CaptionOptions(shuffle=True, keep_tokens=1)), [position]) == [expected]


def test_the_seed_and_the_position_decide_and_nothing_else(tmp_path):
    options = CaptionOptions(shuffle=True, tag_dropout=0.3, keep_tokens=1)
    data = data_of(tmp_path, options)
    straight = prompts(data)
    assert prompts(data, range(119, -1, -1)) == straight[::-1] == prompts(data_of(tmp_path, options))[::-1]
    assert prompts(data_of(tmp_path, options, seed=1)) != straight
    plain, varied = data_of(tmp_path)[5][0], data[5][0]
    assert plain.timestep == varied.timestep and torch.equal(plain.noise, varied.noise)
    assert torch.equal(plain.posterior_noise, varied.posterior_noise)
    dropped = [prompt == "" for prompt in prompts(data_of(tmp_path, options, dropout=0.5))]
    assert dropped == [prompt == "" for prompt in prompts(data_of(tmp_path, dropout=0.5))] and 30 < sum(dropped) < 90


def test_tags_are_left_out_as_often_as_asked_but_for_those_that_are_kept(tmp_path):
    found = prompts(data_of(tmp_path, CaptionOptions(tag_dropout=0.25, keep_tokens=2)), range(400))
    assert all(prompt.startswith("sks dog, grass") for prompt in found)
    tags = TAGS.split(", ")
    assert all([tags.index(tag) for tag in p.split(", ")] == sorted(map(tags.index, p.split(", "))) for p in found)
    for tag in tags[2:]:
        share = np.mean([tag in prompt.split(", ") for prompt in found])
        assert abs(share - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 400)


@pytest.mark.parametrize(
    ("separator", "caption", "expected"),
    [(",", "a,b , c,,", "a, b, c"), ("|", "a|b, c", "a| b, c"), (" | ", "a | b", "a | b"), (",", "one", "one")],
)
def test_separators(separator, caption, expected):
    draws = random_at(0, 0, Purpose.SAMPLE, Branch.CAPTION)
    assert CaptionOptions(tag_dropout=1e-9, separator=separator).drawn(caption, draws) == expected


def drawn(options, caption, count=200):
    return [options.drawn(caption, random_at(0, index, Purpose.SAMPLE, Branch.CAPTION)) for index in range(count)]


def test_separators_keep_tags_in_front_behind_and_together():
    """With the example of the page of kohya's scripts on these keys."""
    options = CaptionOptions(shuffle=True, keep_separator="|||", inner_separator=";;;")
    found = set(drawn(options, "aaa, bbb ||| ccc, ddd;;;eee, fff ||| ggg, hhh"))
    middles = itertools.permutations(["ccc", "ddd, eee", "fff"])
    assert found == {f"aaa, bbb, {', '.join(middle)}, ggg, hhh" for middle in middles}
    assert options.whole("a ||| b, c;;;d") == "a, b, c, d"
    assert set(drawn(CaptionOptions(shuffle=True, keep_separator="|||", keep_tokens=1), "a, b")) == {"a, b"}
    dropped = drawn(CaptionOptions(tag_dropout=0.5, keep_separator="|||", inner_separator=";;;"), "a ||| b;;;c ||| d")
    assert set(dropped) == {"a, d", "a, b, c, d"}


def test_wildcards_are_chosen_for_each_sample_alike():
    options = CaptionOptions(wildcards=True)
    found = drawn(options, "a {red|green|blue} {{dog}}{ today|}", 600)
    assert set(found) == {f"a {colour} {{dog}}{end}" for colour in ("red", "green", "blue") for end in (" today", "")}
    share = np.mean(["green" in text for text in found])
    assert abs(share - 1 / 3) < 4 * np.sqrt(2 / 9 / 600)
    assert options.varies and options.whole("a {red|green} dog\nanother line") == "a red dog"
    assert set(drawn(options, "one\n\ntwo")) == {"one", "two"} and drawn(options, "", 1) == [""]
    assert CaptionOptions().whole("{a|b}") == "{a|b}"


def test_the_longest_of_what_can_be_drawn_is_known():
    options = CaptionOptions(wildcards=True, prefix="photo of")
    found = options.longest("a {red|reddish} dog\n\na {{x}}{|, far away}")
    assert found == ["photo of a reddish dog", "photo of a {x}, far away"]
    assert CaptionOptions(suffix="b").longest("{a|bb}\nc") == ["{a|bb}\nc b"] and options.longest("") == ["photo of"]


def test_prefix_and_suffix_stay_where_they_are(tmp_path):
    data = data_of(tmp_path, CaptionOptions(shuffle=True, prefix="photo of", suffix="at home"))
    assert all(p.startswith("photo of ") and p.endswith(" at home") for p in prompts(data))
    assert data.prompts == [f"photo of {TAGS} at home"]
    still = data_of(tmp_path, CaptionOptions(suffix="at home"))
    assert prompts(still, [0, 1]) == [f"{TAGS} at home"] * 2


def test_branches_are_independent_and_the_first_is_what_it_was():
    same = np.random.Generator(np.random.Philox(key=np.array([3, 4 * 5 + 1], dtype=np.uint64)))
    assert np.array_equal(random_at(3, 5, Purpose.SAMPLE).random(4), same.random(4))
    first, other = random_at(3, 5, Purpose.SAMPLE), random_at(3, 5, Purpose.SAMPLE, Branch.CAPTION)
    assert abs(np.corrcoef(first.random(4000), other.random(4000))[0, 1]) < 0.06


# In the trainer


@pytest.fixture
def tagged(instance_dir, tmp_path):
    folder = tmp_path / "tagged"
    folder.mkdir()
    for path in instance_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / path.name).with_suffix(".txt").write_text(TAGS)
    return folder


def test_the_text_encoder_reads_what_the_sample_has(tiny_sd_path):
    from transformers import CLIPTextModel, CLIPTokenizer

    from apt_diffusion.training.text_to_image.bases import open_base
    from apt_diffusion.training.text_to_image.prompts import Prompts

    base = open_base(str(tiny_sd_path))
    known = Prompts([("", "a dog"), ("", "")], base)
    text_encoders = base.text_encoders(torch.float32)
    with torch.no_grad():
        found = known(["dog a", "a dog", "dog a"], text_encoders)["prompt_embeds"]
    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd_path, subfolder="tokenizer")
    model = CLIPTextModel.from_pretrained(tiny_sd_path, subfolder="text_encoder")
    tokens = tokenizer(["dog a", "a dog", "dog a"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(found, model(tokens)[0], atol=1e-6)


def test_shuffled_captions_train_and_resume_exactly(go, tagged, monkeypatch):
    from apt_diffusion.training.text_to_image.prompts import Prompts

    seen = []
    original = Prompts.__call__
    monkeypatch.setattr(
        Prompts, "__call__", lambda self, texts, models: seen.append(texts) or original(self, texts, models)
    )
    flags = {
        "instance_data_dir": tagged, "shuffle_caption": True, "keep_tokens": 1, "caption_prefix": "a photo of",
        "caption_tag_dropout_rate": 0.2,
    }  # fmt: skip
    straight = go("straight", max_train_steps=4, **flags)
    shown = [text for texts in seen for text in texts]
    assert len(shown) == 8 and len(set(shown)) > 4 and all(text.startswith("a photo of sks dog") for text in shown)
    seen.clear()
    go("parts", max_train_steps=2, **flags)
    parts = go("parts", max_train_steps=4, resume_from_checkpoint="latest", **flags)
    assert [text for texts in seen for text in texts] == shown
    assert_same_adapter(straight, parts)


@pytest.mark.parametrize("name", ["cache_text_embeddings", "pre_compute_text_embeddings"])
def test_kept_embeddings_and_changing_captions_contradict_each_other(name):
    from apt_diffusion.training.text_to_image.arguments import parse_args

    with pytest.raises(ValueError, match="--cache_text_embeddings keeps one text for each picture"):
        parse_args(command("x", "y", "z", shuffle_caption=True, **{name: True}))
    with pytest.raises(ValueError, match="--caption_separator must be more than spaces"):
        parse_args([*command("x", "y", "z"), "--caption_separator", " "])
    assert not parse_args(command("x", "y", "z", caption_tag_dropout_rate=0.5)).cache_text_embeddings


def test_kept_tags_without_shuffling_are_named_as_without_effect(go, caplog):
    go(keep_tokens=2)
    assert "--keep_tokens needs --shuffle_caption or --caption_tag_dropout_rate" in caplog.text
