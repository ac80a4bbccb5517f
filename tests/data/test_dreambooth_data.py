"""DreamBooth data: what is read from a folder, how it is cut, and that every sample depends on its position alone."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from apt_diffusion.data.dreambooth import DreamBoothData, Framing, collate
from apt_diffusion.data.folders import find_pictures, has_pictures
from apt_diffusion.data.order import Purpose, entry_at, micro_batches, random_at
from apt_diffusion.data.pictures import INTERPOLATIONS, Picture, View, choose_view, cut, scaled_size

LATENTS = (4, 8, 8)


def save(path, color="red", size=(40, 40), mode="RGB", **options):
    Image.new(mode, size, color).save(path, **options)
    return path


def data_of(folder, seed=0, size=32, class_folder=None, noise=0.0, repeats=1, **framing):
    of_class = find_pictures(class_folder, "a glyph") if class_folder else []
    framing = Framing(size, stride=4, **framing)
    return DreamBoothData(find_pictures(folder, "a sks glyph"), of_class, framing, LATENTS, seed, repeats, noise)


# Finding


def test_hidden_and_foreign_files_are_named_in_one_warning(tmp_path, caplog):
    for name in ("a.PNG", "b.jpeg", "c.webp"):
        save(tmp_path / name, format={"a": "PNG", "b": "JPEG", "c": "WEBP"}[name[0]])
    (tmp_path / ".DS_Store").write_bytes(b"x")
    save(tmp_path / ".hidden.png")
    (tmp_path / "notes.pdf").write_text("x")
    (tmp_path / "lonely.txt").write_text("no picture beside it")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "a.txt").write_text("a caption")
    with caplog.at_level(logging.WARNING):
        pictures = find_pictures(tmp_path, "x")
    assert [picture.path.name for picture in pictures] == ["a.PNG", "b.jpeg", "c.webp"]
    assert len(caplog.records) == 1
    assert all(name in caplog.text for name in (".DS_Store", ".hidden.png", "notes.pdf", "lonely.txt", "folder.png"))
    assert "a.txt" not in caplog.text


def test_folders_and_pictures_that_cannot_be_used_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        find_pictures(tmp_path / "nowhere", "x")
    (tmp_path / "notes.pdf").write_text("x")
    with pytest.raises(ValueError, match=f"no pictures in {tmp_path}"):
        find_pictures(tmp_path, "x")
    save(tmp_path / "good.png")
    (tmp_path / "fake.png").write_text("this is no picture")
    with pytest.raises(ValueError, match=r"fake\.png cannot be read"):
        find_pictures(tmp_path, "x")
    (tmp_path / "fake.png").unlink()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be read"):
        find_pictures(tmp_path, "x")


# Captions


def test_captions_come_from_sidecars_then_metadata_then_the_prompt(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        save(tmp_path / name)
    (tmp_path / "a.txt").write_bytes("\ufeffa sks glyph on grass \n".encode())
    (tmp_path / "d.txt").write_text("  \n")
    rows = [{"file_name": "a.png", "text": "not this"}, {"file_name": "b.png", "text": "sks in snow", "other": "öl"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert [picture.prompt for picture in find_pictures(tmp_path, "default")] == [
        "a sks glyph on grass", "sks in snow", "default", "default",
    ]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows[1]), encoding="utf-8")
    assert find_pictures(tmp_path, "default", caption_column="other")[1].prompt == "öl"


def test_a_caption_may_hold_any_character(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    caption = "a sks glyph\u2028on \x85 green"  # what `str.splitlines` takes for ends of lines
    row = json.dumps({"file_name": "a.png", "text": caption}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(row + "\r\n", encoding="utf-8", newline="")
    assert [picture.prompt for picture in find_pictures(tmp_path, "x")] == [caption]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"file_name": "a.png", "text": "x"}\n{broken', "line 2"),
        ('{"text": "x"}', "line 1"),
        ('{"file_name": "a.png", "caption": "x"}', '"text"'),
        ('"a string"', "line 1"),
        ('{"file_name": "b.png", "text": "x"}', "no picture 'b.png'"),
    ],
)
def test_wrong_metadata_is_refused_with_its_line(tmp_path, content, message):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"metadata\.jsonl") as error:
        find_pictures(tmp_path, "default")
    assert message in str(error.value)


def test_a_folder_in_kohyas_layout_repeats_its_subfolders(tmp_path, caplog):
    for name in ("10_sks dog", "2_dog", "plain"):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "a.png")
    save(tmp_path / "10_sks dog" / "b.png")
    (tmp_path / "10_sks dog" / "b.caption").write_text("sks dog in a bucket\n")
    (tmp_path / "2_dog" / "notes.md").write_text("x")
    (tmp_path / "3_empty").mkdir()
    with caplog.at_level(logging.WARNING):
        found = find_pictures(tmp_path, "default")
    assert [(p.path.parent.name, p.path.name, p.prompt) for p in found] == [
        *[("10_sks dog", "a.png", "sks dog"), ("10_sks dog", "b.png", "sks dog in a bucket")] * 10,
        *[("2_dog", "a.png", "dog")] * 2,
    ]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.endswith("2_dog/notes.md, 3_empty, plain")
    assert has_pictures(tmp_path) and not has_pictures(tmp_path / "3_empty")
    data = DreamBoothData(found, [], Framing(32, stride=4), LATENTS, 0)
    assert data.epoch_length == 22 and len(set(found)) == 3


@pytest.mark.parametrize("repeats", ["0", "999999999"])
def test_repeats_that_make_no_sense_are_refused(tmp_path, repeats):
    (tmp_path / f"{repeats}_dog").mkdir()
    save(tmp_path / f"{repeats}_dog" / "a.png")
    with pytest.raises(ValueError, match=f"has {repeats} repeats in its name: expected a number from 1 to 10000"):
        find_pictures(tmp_path, "default")


def test_two_captions_of_one_picture_are_refused(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.caption").write_text("two")
    with pytest.raises(ValueError, match=r"a\.png has two captions, a\.txt and a\.caption: remove one"):
        find_pictures(tmp_path, "default")


def test_captions_are_dropped_at_places_that_the_seed_decides(tmp_path):
    save(tmp_path / "a.png")

    def prompts(rate, seed=0):
        data = DreamBoothData(find_pictures(tmp_path, "x"), [], Framing(32), LATENTS, seed, caption_dropout=rate)
        return [data[position][0].prompt for position in range(200)]

    assert prompts(0.0) == ["x"] * 200
    dropped = prompts(0.25)
    assert 30 < dropped.count("") < 70 and dropped == prompts(0.25) != prompts(0.25, seed=1)
    data = [
        DreamBoothData(find_pictures(tmp_path, "x"), [], Framing(32), LATENTS, 0, caption_dropout=r) for r in (0, 1)
    ]
    kept, empty = (one[3][0] for one in data)
    assert torch.equal(kept.noise, empty.noise) and kept.timestep == empty.timestep  # nothing else changes


def test_captions_that_are_not_utf8_are_refused_by_name(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.txt are not UTF-8"):
        find_pictures(tmp_path, "default")


# Cutting


def test_a_view_holds_exactly_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = torch.from_numpy(pixels[:, 3:11].astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
    view = View(tmp_path, 8, left=3)
    assert torch.equal(cut(image, view), expected)
    assert torch.equal(cut(image, View(tmp_path, 8, left=3, flipped=True)), expected.flip(-1))
    assert cut(image, view).min() >= -1 and cut(image, view).max() <= 1


def test_a_long_picture_is_cut_before_it_is_scaled(tmp_path, monkeypatch):
    """The whole of it, with its short side at 512, would have 13 million pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 500, 3), dtype=np.uint8)
    sizes, resize = [], Image.Image.resize

    def record(image, size, *args, **kwargs):
        sizes.append(size)
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", record)
    found = cut(Image.fromarray(pixels), View(tmp_path, 512, left=1024))
    assert sizes == [(512, 512)]
    whole = resize(Image.fromarray(pixels), scaled_size(500, 10, 512), Image.Resampling.LANCZOS)
    expected = np.asarray(whole.crop((1024, 0, 1536, 512)))
    assert np.allclose((found.permute(1, 2, 0).numpy() + 1) * 127.5, expected, atol=1.01)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "hamming"])
def test_cutting_first_changes_no_pixel_by_more_than_rounding(tmp_path, interpolation):
    draws = np.random.default_rng(0)
    for _ in range(20):
        width, height = draws.integers(20, 200, 2).tolist()
        image = Image.fromarray(draws.integers(0, 256, (height, width, 3), dtype=np.uint8))
        view = choose_view(Picture(tmp_path, "", width, height), 32, 8, False, False, (draws.random(), 0.9))
        whole = image.resize(scaled_size(width, height, 32), INTERPOLATIONS[interpolation])
        expected = np.asarray(whole.crop((view.left, view.top, view.left + 32, view.top + 32)))
        found = (cut(image, view, interpolation).permute(1, 2, 0).numpy() + 1) * 127.5
        assert np.abs(found - expected).max() < 1.01


def test_the_short_side_is_resized_and_never_falls_short(tmp_path):
    for size, expected in (((100, 50), (64, 32)), ((50, 100), (32, 64)), ((7, 7), (32, 32)), ((101, 100), (32, 32))):
        assert scaled_size(*size, 32) == expected


def test_random_cuts_reach_both_ends_in_steps_of_at_most_one_latent_cell(tmp_path):
    for width, height in ((90, 64), (64, 65), (64, 200)):
        picture = Picture(tmp_path, "x", width, height)
        draws = np.linspace(0, 1, 1000, endpoint=False)
        views = [choose_view(picture, 32, 8, False, False, (u, 0.0)) for u in draws]
        offsets = sorted({max(view.left, view.top) for view in views})
        slack = max(scaled_size(width, height, 32)) - 32
        assert offsets[0] == 0 and offsets[-1] == slack
        assert max(np.diff(offsets), default=0) <= 8
        assert all((view.left == 0) if height > width else (view.top == 0) for view in views)
        middle = choose_view(picture, 32, 8, True, False, (0.9, 0.0))
        assert max(middle.left, middle.top) == round(slack / 2)


def test_flips_are_random_only_where_asked_for(tmp_path):
    picture = Picture(tmp_path, "x", 32, 32)
    assert choose_view(picture, 32, 8, False, True, (0.5, 0.49)).flipped
    assert not choose_view(picture, 32, 8, False, True, (0.5, 0.51)).flipped
    assert not choose_view(picture, 32, 8, False, False, (0.5, 0.0)).flipped


# Order


def test_every_epoch_shows_every_entry_once_in_an_order_of_its_own():
    epochs = [[entry_at(7, position, 5) for position in range(epoch * 5, epoch * 5 + 5)] for epoch in range(20)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 10
    assert epochs != [[entry_at(8, e * 5 + i, 5) for i in range(5)] for e in range(20)]


def test_processes_share_the_stream_without_gaps():
    one = micro_batches(10, 3, 4)
    two = [micro_batches(10, 3, 2, process, 2) for process in (0, 1)]
    assert [list(batch) for batch in one] == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19, 20, 21]]
    assert [[*first, *second] for first, second in zip(*two, strict=True)] == [list(batch) for batch in one]


def test_generators_of_different_places_and_purposes_are_independent():
    draws = {
        (seed, position, purpose): tuple(random_at(seed, position, purpose).integers(2**32, size=2).tolist())
        for seed in (0, 1, 2**32 - 1)
        for position in (0, 1, 2, 10**9)
        for purpose in Purpose
    }
    assert len(set(draws.values())) == len(draws)


# Samples


def test_repeats_and_class_pictures_make_the_epoch(instance_dir, tmp_path):
    for index in range(12):
        save(tmp_path / f"{index:02}.png")
    assert data_of(instance_dir).epoch_length == 5
    assert data_of(instance_dir, repeats=3).epoch_length == 15
    data = data_of(instance_dir, class_folder=tmp_path)
    assert data.epoch_length == 12 and data.prompts == ["a sks glyph", "a glyph"]
    views = [data.views_at(position) for position in range(12)]
    assert sorted(pair[1].path.name for pair in views) == [f"{index:02}.png" for index in range(12)]
    counts = np.unique([pair[0].path.name for pair in views], return_counts=True)[1]
    assert sorted(counts) == [2, 2, 2, 3, 3]
    batch = collate([data[0], data[1]])
    assert batch.prompts == ["a sks glyph", "a sks glyph", "a glyph", "a glyph"]
    assert batch.images.shape == (4, 3, 32, 32) and batch.noise.shape == (4, *LATENTS)
    assert not torch.equal(batch.noise[0], batch.noise[2])


def test_a_sample_depends_on_seed_and_position_alone(tmp_path):
    save(tmp_path / "wide.png", size=(100, 40))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)).save(tmp_path / "b.png")
    forwards, backwards = data_of(tmp_path, random_flip=True), data_of(tmp_path, random_flip=True)
    first = [forwards[position][0] for position in range(8)]
    torch.manual_seed(1)
    np.random.seed(1)
    second = [backwards[position][0] for position in reversed(range(8))][::-1]
    for a, b in zip(first, second, strict=True):
        assert a.timestep == b.timestep and torch.equal(a.image, b.image)
        assert torch.equal(a.noise, b.noise) and torch.equal(a.posterior_noise, b.posterior_noise)
        assert not torch.equal(a.noise, a.posterior_noise)
    assert len({sample.timestep for sample in first}) > 4
    assert len({forwards.views_at(position)[0] for position in range(40)}) > 8
    other = data_of(tmp_path, seed=1, random_flip=True)[0][0]
    assert not torch.equal(other.noise, first[0].noise)


def test_noise_is_standard_normal_and_its_offset_is_per_channel(instance_dir):
    noise = torch.stack([data_of(instance_dir)[position][0].noise for position in range(200)])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    with_offset = torch.stack([data_of(instance_dir, noise=0.5)[position][0].noise for position in range(200)])
    offsets = (with_offset - noise).flatten(2)  # (200, 4, 64)
    assert torch.allclose(offsets, offsets[..., :1].expand_as(offsets), atol=1e-6)
    assert abs(offsets[..., 0].std() - 0.5) < 0.05 and len(offsets[..., 0].unique()) == 800


def test_timesteps_cover_the_schedule(instance_dir):
    timesteps = [data_of(instance_dir)[position][0].timestep for position in range(2000)]
    assert min(timesteps) < 10 and max(timesteps) in range(990, 1000)
    assert abs(np.mean(timesteps) - 499.5) < 25


def test_the_cache_answers_for_the_views_that_were_announced(tmp_path):
    save(tmp_path / "wide.png", size=(100, 40))
    save(tmp_path / "tall.png", size=(40, 70))
    data = data_of(tmp_path, random_flip=True)
    views = {view for position in range(50) for view in data.views_at(position)}
    pixels = data.pixels(sorted(views))
    assert pixels.keys() == views
    fresh = [data[position][0].image for position in range(50)]
    data.cache = {view: torch.full((2, *LATENTS), float(index)) for index, view in enumerate(pixels)}
    for position in range(50):
        assert torch.equal(data[position][0].image, data.cache[data.views_at(position)[0]])
        assert torch.equal(fresh[position], pixels[data.views_at(position)[0]])


def test_loader_workers_change_nothing(instance_dir):
    data = data_of(instance_dir, random_flip=True)
    batches = micro_batches(3, 4, 3)
    alone, helped = (
        list(DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers)) for workers in (0, 2)
    )
    for a, b in zip(alone, helped, strict=True):
        assert a.prompts == b.prompts and torch.equal(a.timesteps, b.timesteps)
        assert torch.equal(a.images, b.images) and torch.equal(a.noise, b.noise)
        assert torch.equal(a.posterior_noise, b.posterior_noise)
