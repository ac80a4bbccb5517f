"""Masks: which file is one, what is refused, how much each cell counts, and that nothing else is learnt from."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support.training_helpers import assert_same_adapter, losses

from apt_diffusion.data.dreambooth import DreamBoothData, Framing, collate
from apt_diffusion.data.folders import FolderOptions, find_pictures, scan_pictures
from apt_diffusion.data.masks import cut_mask
from apt_diffusion.data.pictures import View, choose_view
from apt_diffusion.training.text_to_image.losses import masked, mean_errors, pseudo_huber, squared

MASKED = FolderOptions(masked=True)


def save(path, color="red", size=(40, 30), mode="RGB", **options):
    Image.new(mode, size, color).save(path, **options)
    return path


def half_white(path, size=(40, 30)):
    """White on the left."""
    pixels = np.zeros(size[::-1], dtype=np.uint8)
    pixels[:, : size[0] // 2] = 255
    Image.fromarray(pixels).save(path)
    return path


# Finding


def test_each_folder_has_its_own_masks_of_the_same_pictures(tmp_path):
    for name in ("p", "left", "right"):
        (tmp_path / name).mkdir()
    save(tmp_path / "p" / "a.png", size=(32, 32))
    half_white(tmp_path / "left" / "a.png", (32, 32))
    ImageOps.mirror(Image.open(tmp_path / "left" / "a.png")).save(tmp_path / "right" / "a.png")
    pictures = [
        picture
        for side in ("left", "right")
        for picture in scan_pictures(
            tmp_path / "p", side, FolderOptions(masked=True, mask_folder=tmp_path / side)
        ).checked()
    ]
    data = DreamBoothData(pictures, [], Framing(32, True, False, "bilinear", 4), (4, 8, 8), 0)
    data.cache = {
        view: (torch.zeros(4, 8, 8), torch.zeros(4, 8, 8)) for index in (0, 1) for view in data.views_at(index)
    }
    half = torch.cat([torch.ones(4), torch.zeros(4)])
    found = {sample.prompt: sample.mask[0, 0] for index in (0, 1) for sample in data[index]}
    assert torch.equal(found["left"], half) and torch.equal(found["right"], half.flip(0))


def test_masks_are_found_by_name_then_by_transparency(tmp_path, caplog):
    for name in ("a.jpg", "b.png", "lonely-mask.png"):
        save(tmp_path / name)
    save(tmp_path / "see-through.png", (255, 0, 0, 128), mode="RGBA")
    half_white(tmp_path / "a-mask.png")
    scan = scan_pictures(tmp_path, "x", MASKED)
    found = {p.path.name: p.mask and p.mask.name for p in scan.checked()}
    assert found == {
        "a.jpg": "a-mask.png", "b.png": None, "lonely-mask.png": None, "see-through.png": "see-through.png",
    }  # fmt: skip
    assert not scan.left_out
    without = scan_pictures(tmp_path, "x")
    assert {p.path.name for p in without.checked()} == set(found) and all(p.mask is None for p in without.pictures)
    assert without.left_out == {"a-mask.png": "the mask of a.jpg, for --masked_loss"} and "a-mask.png" in caplog.text


def test_masks_may_be_in_a_folder_of_their_own(go, tmp_path, no_models, capsys):
    for name in ("pictures/a.jpg", "pictures/in/b.png", "masks/in/b.webp", "masks/a.png", "masks/other.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / name)
    options = FolderOptions(recursive=True, masked=True, mask_folder=tmp_path / "masks")
    scan = scan_pictures(tmp_path / "pictures", "x", options)
    assert {p.path.name: p.mask.name for p in scan.pictures} == {"a.jpg": "a.png", "b.png": "b.webp"}
    assert scan.left_out == {str(tmp_path / "masks" / "other.png"): "a mask without a picture"} and not scan.problems
    flags = {"instance_data_dir": tmp_path / "pictures", "masked_loss": True, "recursive": True}
    go(mask_data_dir=tmp_path / "masks", check_data=True, **flags)
    assert "Masks: 2 files, 0 by transparency; 0 pictures count as a whole." in capsys.readouterr().out
    save(tmp_path / "pictures" / "a-mask.png")
    with pytest.raises(ValueError, match=r"a\.jpg has 2 masks, a-mask\.png and a\.png"):
        go(mask_data_dir=tmp_path / "masks", **flags)
    with pytest.raises(ValueError, match=r"There is no folder .*nowhere with masks"):
        go(mask_data_dir=tmp_path / "nowhere", **flags)


@pytest.mark.parametrize(
    ("size", "color", "message"),
    [
        ((20, 15), "white", r"a-mask\.png has 20 x 15 pixels, its picture a\.jpg has 40 x 30"),
        ((30, 40), "white", "has 30 x 40 pixels"),
        ((40, 30), "black", r"a-mask\.png is black everywhere"),
    ],
)
def test_masks_that_do_not_fit_are_refused_before_models_are_loaded(go, tmp_path, no_models, size, color, message):
    folder = tmp_path / "pictures"
    folder.mkdir()
    save(folder / "a.jpg")
    save(folder / "a-mask.png", color, size)
    with pytest.raises(ValueError, match=message):
        go(instance_data_dir=folder, masked_loss=True)


def test_several_masks_none_at_all_and_invisible_pictures_are_refused(go, tmp_path, no_models):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"no picture in .* has a mask"):
        go(instance_data_dir=tmp_path, masked_loss=True)
    save(tmp_path / "a-mask.png")
    save(tmp_path / "a-mask.webp")
    with pytest.raises(ValueError, match=r"has 2 masks, a-mask\.png and a-mask\.webp"):
        scan_pictures(tmp_path, "x", MASKED).checked()
    for name in ("a-mask.png", "a-mask.webp"):
        (tmp_path / name).unlink()
    save(tmp_path / "a.png", (0, 0, 0, 0), mode="RGBA")
    with pytest.raises(ValueError, match=r"a\.png is transparent everywhere"):
        scan_pictures(tmp_path, "x", MASKED).checked()


# Weights


def test_a_cell_counts_as_much_as_the_mean_of_its_pixels(tmp_path):
    size, stride = 32, 8
    values = np.random.default_rng(0).integers(0, 256, (size, 2 * size), dtype=np.uint8)
    save(tmp_path / "a.png", size=(2 * size, size))
    Image.fromarray(values).save(tmp_path / "a-mask.png")
    (picture,) = scan_pictures(tmp_path, "x", MASKED).checked()
    for left, flipped in ((0, False), (24, False), (32, True)):
        view = View(picture.path, size, left, 0, flipped)
        part = values[:, left : left + size][:, :: -1 if flipped else 1]
        expected = part.reshape(4, stride, 4, stride).mean((1, 3), dtype=np.float64) / 255
        assert np.allclose(cut_mask(picture, view, stride)[0], expected, atol=1e-6)


def test_black_stays_exactly_zero_beside_white_at_any_scale(tmp_path):
    for size in ((97, 61), (500, 333), (20, 20)):
        save(tmp_path / "a.png", size=size)
        half_white(tmp_path / "a-mask.png", size)
        (picture,) = scan_pictures(tmp_path, "x", MASKED).checked()
        found = cut_mask(picture, choose_view(picture, 64, 8, True, False, (0, 0)), 8)[0]
        assert (found[:, :3] == 1).all() and (found[:, 5:] == 0).all()


def test_transparency_and_a_mask_that_is_transparent_itself(tmp_path):
    save(tmp_path / "a.png", (255, 0, 0, 51), mode="RGBA", size=(32, 32))
    save(tmp_path / "b.png", size=(32, 32))
    save(tmp_path / "b-mask.png", (255, 255, 255, 51), mode="RGBA", size=(32, 32))
    for picture in scan_pictures(tmp_path, "x", MASKED).checked():
        assert torch.allclose(cut_mask(picture, View(picture.path, 32), 8), torch.full((1, 4, 4), 0.2), atol=1e-6)


def test_a_mask_is_turned_as_exif_says(tmp_path):
    save(tmp_path / "a.png", size=(30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right
    pixels = np.zeros((30, 40), dtype=np.uint8)
    pixels[15:] = 255  # below, so on the left once it is turned
    Image.fromarray(pixels).save(tmp_path / "a-mask.png", exif=exif)
    (picture,) = scan_pictures(tmp_path, "x", MASKED).checked()
    found = cut_mask(picture, View(picture.path, 24), 8)[0]
    assert found[0].tolist() == [1.0, pytest.approx(0.5, abs=0.2), 0.0]


def test_pictures_without_a_mask_count_as_a_whole_in_a_batch(tmp_path):
    save(tmp_path / "a.png")
    half_white(tmp_path / "a-mask.png")
    save(tmp_path / "b.png")
    framing = Framing(32, stride=4)
    data = DreamBoothData(scan_pictures(tmp_path, "x", MASKED).checked(), [], framing, (4, 8, 8), 0)
    batch = collate([data[0], data[1]])
    whole = [bool((mask == 1).all()) for mask in batch.masks]
    assert batch.masks.shape == (2, 1, 8, 8) and sorted(whole) == [False, True]
    plain = DreamBoothData(find_pictures(tmp_path, "x"), [], framing, (4, 8, 8), 0)
    assert collate([plain[0], plain[1]]).masks is None


# Loss


@pytest.mark.parametrize("distance", [squared, torch.abs, lambda error: pseudo_huber(error, 0.1)])
def test_the_gradient_is_exactly_zero_outside(distance):
    prediction = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.zeros(2, 1, 8, 8)
    weights[:, :, 2:5, 1:7] = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    errors = mean_errors(prediction, torch.ones_like(prediction), masked(distance, weights))
    errors.sum().backward()
    outside = (weights == 0).expand_as(prediction)
    assert (prediction.grad[outside] == 0).all() and (prediction.grad[~outside] != 0).all()
    if distance is squared:
        expected = 2 * (prediction.detach() - 1) * weights / (4 * 8 * 8)
        assert torch.allclose(prediction.grad, expected, atol=1e-7)


def masked_copy(instance_dir, folder, color):
    folder.mkdir()
    for path in instance_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
        if color == "half":
            half_white(folder / f"{path.stem}-mask.png", (40, 40))
        else:
            save(folder / f"{path.stem}-mask.png", color, (40, 40))
    return folder


def test_a_run_learns_nothing_outside_and_white_masks_change_nothing(go, instance_dir, tmp_path, monkeypatch):
    from apt_diffusion.training.text_to_image.stable_diffusion import StableDiffusionBase

    white = masked_copy(instance_dir, tmp_path / "white", "white")
    assert_same_adapter(go(instance_data_dir=white, masked_loss=True), go())
    gradients = []
    original = StableDiffusionBase.denoiser

    def watch(module, args, output):
        if output[0].requires_grad:
            output[0].register_hook(gradients.append)

    def watched(self, dtype):
        unet = original(self, dtype)
        unet.register_forward_hook(watch)
        return unet

    monkeypatch.setattr(StableDiffusionBase, "denoiser", watched)
    half = masked_copy(instance_dir, tmp_path / "half", "half")
    go("half", instance_data_dir=half, masked_loss=True, center_crop=True, loss_type="huber")
    assert len(gradients) == 2
    for gradient in gradients:
        assert (gradient[..., 4:] == 0).all() and (gradient[..., :4] != 0).all()


def test_resume_held_out_pictures_and_the_class_with_masks(go, instance_dir, tmp_path):
    half = masked_copy(instance_dir, tmp_path / "half", "half")
    flags = {
        "instance_data_dir": half, "masked_loss": True, "validation_split": 0.2, "random_flip": True,
        "with_prior_preservation": True, "class_data_dir": instance_dir, "class_prompt": "a glyph",
        "num_class_images": 5, "no-cache_latents": True,
    }  # fmt: skip
    straight = go("straight", max_train_steps=4, **flags)
    go("parts", max_train_steps=2, **flags)
    parts = go("parts", max_train_steps=4, resume_from_checkpoint="latest", **flags)
    assert_same_adapter(straight, parts)
    assert losses(straight) == losses(parts)
    cached = go("cached", max_train_steps=4, **(flags | {"no-cache_latents": False}))
    assert np.allclose(losses(cached), losses(straight), atol=1e-4)
    plain = go("plain", max_train_steps=4, **(flags | {"masked_loss": False}))
    assert not np.allclose(losses(plain), losses(straight), atol=1e-2)


def test_the_report_counts_masks(go, instance_dir, tmp_path, no_models, capsys):
    half = masked_copy(instance_dir, tmp_path / "half", "half")
    next(half.glob("*-mask.png")).unlink()
    go(instance_data_dir=half, masked_loss=True, check_data=True)
    assert "Masks: 4 files, 0 by transparency; 1 pictures count as a whole." in capsys.readouterr().out
