"""The processors of vision-language models against arithmetic on PIL pictures."""

import json

import numpy as np
import pytest
import torch
from conftest import make_meter, make_tokenizer
from PIL import Image
from support.families import make_vilt

from apt_diffusion.data.processors import load_processor
from apt_diffusion.models.meter import MeterProcessor

CLIP_MEAN, CLIP_STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def vilt_folder(tmp_path_factory):
    """As `dandelin/vilt-b32-mlm` on the hub has it: the settings of an old version, a BERT vocabulary."""
    folder = tmp_path_factory.mktemp("vilt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "two"]
    (folder / "vocab.txt").write_text("\n".join(words))
    half = [0.5, 0.5, 0.5]
    settings = {"size": 384, "size_divisor": 32, "image_mean": half, "image_std": half, "resample": 3}
    kind = {"feature_extractor_type": "ViltFeatureExtractor", "do_normalize": True, "do_resize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | kind))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


@pytest.fixture(scope="module")
def meter_folder(tmp_path_factory):
    from transformers import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("meter")
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, do_convert_rgb=False
    )
    MeterProcessor(image_processor, make_tokenizer(folder / "tokenizer")).save_pretrained(folder)
    make_meter().save_pretrained(folder)
    return folder


def vilt_size(width: int, height: int) -> tuple[int, int]:
    """The official rule, written as ratios: shorter side 384 unless the longer one would pass 639."""
    scale = min(384 / min(width, height), 639 / max(width, height))
    return tuple(int(scale * side + 0.5) // 32 * 32 for side in (width, height))


def test_vilt_pictures_and_masks(vilt_folder):
    processor = load_processor("vilt", vilt_folder)
    pictures = [picture(500, 300), picture(200, 210, 1), picture(90, 400, 2)]
    batch = processor(pictures, ["a cat"] * 3, padding=True, return_tensors="pt")
    sizes = [vilt_size(*p.size) for p in pictures]
    assert sizes == [(608, 352), (384, 384), (128, 608)]
    width, height = (max(size[axis] for size in sizes) for axis in (0, 1))
    assert batch["pixel_values"].shape == (3, 3, height, width) and batch["pixel_mask"].shape == (3, height, width)
    for index, (original, (w, h)) in enumerate(zip(pictures, sizes, strict=True)):
        pixels = np.asarray(original.resize((w, h), Image.Resampling.BICUBIC), np.float64) / 255
        expected = np.zeros((height, width, 3))
        expected[:h, :w] = (pixels - 0.5) / 0.5
        assert np.allclose(batch["pixel_values"][index].permute(1, 2, 0), expected, atol=1e-6)
        mask = np.zeros((height, width))
        mask[:h, :w] = 1
        assert np.array_equal(batch["pixel_mask"][index], mask)


def test_vilt_converts_gray_pictures_and_takes_another_size(vilt_folder):
    gray = picture(64, 64).convert("L")
    values = load_processor("vilt", vilt_folder, image_size=64)(gray, "a cat", return_tensors="pt")["pixel_values"]
    expected = (np.asarray(gray, np.float64) / 255 - 0.5) / 0.5
    assert values.shape == (1, 3, 64, 64)
    assert all(np.allclose(values[0, channel], expected, atol=1e-6) for channel in range(3))


def test_a_black_and_gray_picture_is_no_padding_to_vilt(vilt_folder):
    """The official code takes pixels whose channels sum to zero for padding; here the mask says what is."""
    processor = load_processor("vilt", vilt_folder, image_size=64)
    batch = processor([picture(64, 64), picture(64, 110)], ["a cat"] * 2, return_tensors="pt")
    torch.manual_seed(0)
    model = make_vilt().eval()
    batch["pixel_values"][0, :, :64] = 0.0  # neutral gray, to the last bit
    padding = batch["pixel_values"].clone()
    padding[0, :, 64:] = 7.0  # what stands in the padding is nothing to the model
    gray = batch["pixel_values"].clone()
    gray[0, :, :8, :8] = 0.5  # but the gray pixels are
    with torch.no_grad():
        first, same, other = (
            model(**(batch | {"pixel_values": pixels})).pooler_output[0]
            for pixels in (batch["pixel_values"], padding, gray)
        )
    assert torch.allclose(first, same, atol=1e-6) and (first - other).abs().max() > 1e-4


@pytest.mark.parametrize("width, height", [(40, 30), (30, 47), (24, 24), (100, 31)])
def test_meter_pictures(meter_folder, width, height):
    processor = load_processor("meter", meter_folder)
    original = picture(width, height)
    values = processor(images=original, text="a cat", return_tensors="pt")["pixel_values"][0]
    short = min(width, height)
    resized = original.resize((int(24 * width / short), int(24 * height / short)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 24) // 2, (resized.height - 24) // 2
    pixels = np.asarray(resized.crop((left, top, left + 24, top + 24)), np.float64) / 255
    assert np.allclose(values.permute(1, 2, 0), (pixels - CLIP_MEAN) / CLIP_STD, atol=1e-5)


def test_meter_folders_load_quietly_and_convert_pictures(meter_folder, caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    processor = load_processor("meter", meter_folder, image_size=48)
    logging.disable_propagation()
    assert not [record for record in caplog.records if "of type `meter`" in record.message]
    gray = picture(48, 48).convert("L")
    values = processor(images=gray, text="a cat", return_tensors="pt")["pixel_values"][0]
    expected = (np.asarray(gray, np.float64)[..., None] / 255 - CLIP_MEAN) / CLIP_STD
    assert np.allclose(values.permute(1, 2, 0), expected, atol=1e-5)


def test_clip_processor_is_meters_with_clips_words(meter_folder):
    from transformers import CLIPImageProcessorPil, CLIPProcessor

    processor = load_processor("clip", meter_folder)
    assert type(processor) is CLIPProcessor and type(processor.image_processor) is CLIPImageProcessorPil
    batch = processor(images=picture(30, 40), text=["a cat"], return_tensors="pt")
    meter = load_processor("meter", meter_folder)(images=picture(30, 40), text=["a cat"], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], meter["pixel_values"])
    assert batch["input_ids"].tolist() == meter["input_ids"].tolist()


def test_errors_name_cause_and_remedy(vilt_folder, meter_folder, tmp_path):
    with pytest.raises(ValueError, match=r"No processor is known for 'blip', only for \['clip', 'meter', 'vilt'\]"):
        load_processor("blip", vilt_folder)
    with pytest.raises(ValueError, match="holds a CLIPImageProcessor: a vilt model needs ViltImageProcessor"):
        load_processor("vilt", meter_folder)
    with pytest.raises(ValueError, match="holds a ViltFeatureExtractor: a meter model needs CLIPImageProcessor"):
        load_processor("meter", vilt_folder)
    with pytest.raises(OSError, match="preprocessor_config"):
        load_processor("clip", tmp_path)
