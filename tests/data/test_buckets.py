"""Aspect-ratio buckets: which picture has which size, batches of one size, their order, and runs that resume."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from support.training_helpers import assert_same_adapter, command, losses

from apt_diffusion.data.buckets import BucketOrder, generate_buckets, nearest_bucket, parse_buckets
from apt_diffusion.data.dreambooth import DreamBoothData, Framing, collate
from apt_diffusion.data.folders import find_pictures
from apt_diffusion.data.held_out import HeldOutData
from apt_diffusion.data.pictures import Picture, choose_view, crop_box, cut, scaled_size, time_ids

BUCKETS = "32,48;48,32;32,32"
SIZES = [(40, 80), (80, 40), (33, 32), (60, 40), (30, 62)]  # height, width


@pytest.fixture
def shapes(tmp_path):
    """Five pictures of several shapes."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    for index, size in enumerate(SIZES):
        pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def data_of(folder, group=2, seed=0, of_class=(), **framing):
    framing = Framing(32, stride=4, buckets=parse_buckets(BUCKETS), **framing)
    return DreamBoothData(find_pictures(folder, "x"), list(of_class), framing, (4, 8, 8), seed, group=group)


# Sizes


def test_the_string_is_diffusers():
    assert parse_buckets(" 512,768; 768,512;512,768") == ((512, 768), (768, 512))
    for wrong in ("512", "512x768", "512,768;", "0,512", ""):
        with pytest.raises(ValueError, match=r'--aspect_ratio_buckets: .* Give "auto", or sizes as "512,768;768,512"'):
            parse_buckets(wrong)


def test_buckets_that_are_made_have_about_the_same_area_and_whole_cells():
    made = generate_buckets(1024, 8)
    assert (1024, 1024) in made and len(made) == 9
    assert all(height % 64 == 0 and width % 64 == 0 for height, width in made)
    assert all(abs(height * width / 1024**2 - 1) < 0.07 for height, width in made)
    assert {height > width for height, width in made} == {True, False}
    assert all(side % 2 == 0 for size in generate_buckets(64, 2) for side in size)


def test_a_picture_belongs_to_the_nearest_shape():
    buckets = parse_buckets(BUCKETS)
    assert [nearest_bucket(*size, buckets) for size in SIZES] == [(32, 48), (48, 32), (32, 32), (48, 32), (32, 48)]


@pytest.mark.parametrize("size", [(40, 80), (80, 40), (48, 32), (1000, 37), (31, 33)])
@pytest.mark.parametrize("bucket", [(32, 48), (48, 32), (32, 32)])
def test_no_more_is_cut_off_than_must_be(tmp_path, size, bucket):
    height, width = size
    scaled = scaled_size(width, height, bucket[1], bucket[0])
    assert scaled[0] >= bucket[1] and scaled[1] >= bucket[0] and (scaled[0] == bucket[1] or scaled[1] == bucket[0])
    factor = max(bucket[0] / height, bucket[1] / width)  # the smallest that covers it
    assert abs(scaled[0] - width * factor) < 1 and abs(scaled[1] - height * factor) < 1
    picture = Picture(tmp_path, "", width, height)
    for draw in (0.0, 0.4, 0.999):
        view = choose_view(picture, bucket, 4, False, False, (draw, 0.9))
        assert 0 <= view.left <= scaled[0] - bucket[1] and 0 <= view.top <= scaled[1] - bucket[0]


def test_pixels_and_time_ids_of_a_rectangle(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    image, picture = Image.fromarray(pixels), Picture(tmp_path, "", 90, 50)
    view = choose_view(picture, (32, 48), 4, False, True, (0.6, 0.1))
    assert view.flipped and (view.height, view.width, view.top) == (32, 48, 0) and view.left > 0
    whole = np.asarray(image.resize((57, 32), Image.Resampling.LANCZOS))[:, ::-1]
    height, width, top, left, *target = time_ids(picture, view)
    assert (height, width, target) == (50, 90, [32, 48])
    found = (cut(image, view).permute(1, 2, 0) + 1) * 127.5
    assert found.shape == (32, 48, 3)
    assert np.allclose(found, whole[top : top + 32, left : left + 48], atol=1.01)  # one level: rounding
    assert crop_box(image, view)[3] == 50


# Order


@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("counts", [(5,), (3, 2), (1, 1, 1), (20, 1, 6)])
def test_groups_have_one_bucket_and_no_entry_is_shown_more_often(group, counts):
    bucket_of = [(32, 32 + number) for number, count in enumerate(counts) for _ in range(count)]
    np.random.default_rng(0).shuffle(bucket_of)
    bucket_of = [tuple(size) for size in bucket_of]
    order = BucketOrder(bucket_of, group, seed=3)
    whole = len(bucket_of) * group  # epochs after which all groups are full
    shown = [order.entry_at(position) for position in range(whole)]
    for start in range(0, whole, group):
        assert len({bucket_of[entry] for entry in shown[start : start + group]}) == 1
    assert set(Counter(shown).values()) == {group}
    for bucket in set(bucket_of):  # rounds: each entry once before the next comes
        of_bucket = [entry for entry in shown if bucket_of[entry] == bucket]
        size = bucket_of.count(bucket)
        rounds = [of_bucket[start : start + size] for start in range(0, len(of_bucket), size)]
        assert all(len(set(one)) == size for one in rounds)
    again = BucketOrder(bucket_of, group, seed=3)
    assert [again.entry_at(position) for position in reversed(range(whole))] == shown[::-1]
    if len(bucket_of) > 3:
        assert [BucketOrder(bucket_of, group, seed=4).entry_at(position) for position in range(whole)] != shown


def test_batches_have_one_size_with_pictures_of_the_class_too(shapes):
    data = data_of(shapes, of_class=find_pictures(shapes, "class")[:2])
    seen = Counter()
    for start in range(0, 40, 2):
        batch = collate([data[start], data[start + 1]])
        height, width = batch.images.shape[2:]
        assert batch.images.shape == (4, 3, height, width) and batch.noise.shape == (4, 4, height // 4, width // 4)
        assert batch.time_ids[:, 4:].tolist() == [[height, width]] * 4
        seen[height, width] += 1
    assert set(seen) == set(parse_buckets(BUCKETS))
    assert data.epoch_length == 5


def test_two_processes_see_what_one_does(shapes):
    data = data_of(shapes, group=4)
    whole = collate([data[position] for position in range(8, 12)])
    parts = [collate([data[position] for position in half]) for half in (range(8, 10), range(10, 12))]
    assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
    assert torch.equal(whole.noise, torch.cat([part.noise for part in parts]))


def test_held_out_pictures_are_measured_in_batches_of_one_size(shapes):
    framing = Framing(32, stride=4, buckets=parse_buckets(BUCKETS))
    data = HeldOutData(find_pictures(shapes, "x"), framing, (4, 8, 8), 1000)
    batches = data.batches(3)
    assert [index for batch in batches for index in batch] == list(range(40))
    assert all(len({data.views_at(i)[0].width for i in batch}) == 1 and len(batch) <= 3 for batch in batches)
    square = HeldOutData(find_pictures(shapes, "x"), Framing(32, stride=4), (4, 8, 8), 1000)
    assert square.batches(3) == [list(range(start, min(start + 3, 40))) for start in range(0, 40, 3)]


# In the trainer

EVERYTHING = {
    "aspect_ratio_buckets": BUCKETS, "random_flip": True, "gradient_accumulation_steps": 2, "validation_split": 0.2,
}  # fmt: skip


def test_a_run_with_buckets_resumes_exactly(go, shapes):
    flags = EVERYTHING | {"instance_data_dir": shapes}
    straight = go("straight", max_train_steps=5, **flags)
    go("parts", max_train_steps=2, **flags)
    parts = go("parts", max_train_steps=5, resume_from_checkpoint="latest", **flags)
    assert_same_adapter(straight, parts)
    assert losses(straight) == losses(parts) and len(set(losses(parts))) == 5
    with pytest.raises(ValueError, match=r"has seen 20 samples, which are no whole batches of 3: with --aspect"):
        go("parts", max_train_steps=6, resume_from_checkpoint="latest", **(flags | {"train_batch_size": 3}))


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(go, shapes, tiny_sd_path, tmp_path):
    from support.launching import in_two_processes
    from support.training_helpers import SCRIPT

    flags = EVERYTHING | {"max_train_steps": 4}
    words = command(tiny_sd_path, shapes, tmp_path / "two", train_batch_size=1, **flags)
    in_two_processes(SCRIPT, *words)
    one = go("one", instance_data_dir=shapes, train_batch_size=2, **flags)
    assert_same_adapter(one, tmp_path / "two", tolerance=1e-5)
    assert np.allclose(losses(one), losses(tmp_path / "two"), atol=1e-5)


def test_sdxl_is_told_the_size_of_the_bucket(tiny_sdxl_path, shapes, tmp_path, monkeypatch):
    from diffusers import UNet2DConditionModel
    from support.training_helpers import train

    told = []
    forward = UNet2DConditionModel.forward

    def record(self, sample, *args, added_cond_kwargs, **kwargs):
        told.append((sample.shape[2:], added_cond_kwargs["time_ids"]))
        return forward(self, sample, *args, added_cond_kwargs=added_cond_kwargs, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", record)
    train(tiny_sdxl_path, shapes, tmp_path / "out", aspect_ratio_buckets=BUCKETS, max_train_steps=6)
    assert len({tuple(shape) for shape, _ in told}) == 3
    for shape, sizes in told:
        assert sizes[:, 4:].tolist() == [[shape[0] * 4, shape[1] * 4]] * 2
        assert all([int(height), int(width)] in [list(size) for size in SIZES] for height, width in sizes[:, :2])


def test_the_report_names_buckets_and_wrong_ones_are_refused(go, shapes, no_models, capsys):
    go(instance_data_dir=shapes, aspect_ratio_buckets=BUCKETS, check_data=True)
    printed = capsys.readouterr().out
    assert "Pictures by bucket: 32 x 32: 1, 48 x 32: 2, 32 x 48: 2." in printed
    assert "2.png    32 x 33  32 x 32" in printed
    go(instance_data_dir=shapes, aspect_ratio_buckets="auto", check_data=True)
    assert "Pictures by bucket: " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"_buckets, 32,42: --resolution must be a multiple of 4, got 42"):
        go(instance_data_dir=shapes, aspect_ratio_buckets="32,42")
