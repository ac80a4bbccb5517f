"""The one reader of pictures: which files it takes, what they look like, and what they may cost."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from apt_diffusion.data.folders import find_pictures
from apt_diffusion.data.reading import MAX_ASPECT, MAX_PIXELS, picture_size, read_picture


def save(path, color="red", size=(40, 40), mode="RGB"):
    Image.new(mode, size, color).save(path)
    return path


def test_transparent_pixels_become_white(tmp_path):
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    half.save(tmp_path / "rgba.png")
    half.quantize().save(tmp_path / "palette.png")
    half.save(tmp_path / "lossless.webp", lossless=True)
    Image.new("LA", (2, 1), (0, 0)).save(tmp_path / "grey.png")
    for name in ("rgba.png", "palette.png", "lossless.webp"):
        image = read_picture(tmp_path / name)
        assert image.mode == "RGB" and np.asarray(image).tolist() == [[[255, 0, 0], [255, 255, 255]]], name
    assert np.asarray(read_picture(tmp_path / "grey.png")).tolist() == [[[255] * 3] * 2]


def test_a_palette_and_sixteen_bits_keep_their_colours(tmp_path):
    save(tmp_path / "palette.png", "blue", mode="RGB")
    Image.open(tmp_path / "palette.png").convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    assert Image.open(tmp_path / "palette.png").mode == "P"
    assert read_picture(tmp_path / "palette.png").getpixel((5, 5)) == (0, 0, 255)
    Image.fromarray(np.full((4, 4), 257 * 128, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_grey_as_numbers_with_a_point_keeps_its_brightness(tmp_path, white):
    """PIL clips these: pictures from 0 to 1 become black, those of 16 bits white."""
    grey = np.linspace(0, white, 256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "float.tiff")
    found = np.asarray(read_picture(tmp_path / "float.tiff")).astype(int)
    assert np.abs(found - np.arange(256).reshape(16, 16, 1)).max() <= 1


@pytest.mark.parametrize("values", [[-1.0, 1.0], [0.0, 1e6], [0.0, np.nan]])
def test_numbers_without_a_known_white_are_refused_by_name(tmp_path, values):
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "depth.tiff")
    with pytest.raises(ValueError, match=r"depth\.tiff cannot be read: its values go from"):
        read_picture(tmp_path / "depth.tiff")


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "avif", "jp2", "tga", "ppm", "apng"])
def test_every_kind_that_pil_reads_is_a_picture(tmp_path, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this PIL was built without AVIF")
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / f"a.{suffix}")
    (picture,) = find_pictures(tmp_path, "x")
    assert (picture.width, picture.height) == (64, 48)
    assert np.abs(np.subtract(read_picture(picture.path).getpixel((30, 20)), (200, 30, 30))).max() < 8


def test_heic_is_no_foreign_file_and_the_remedy_is_named(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(ValueError, match=r"b\.HEIC is HEIC: `pip install pillow-heif`"):
        find_pictures(tmp_path, "x")


def test_postscript_under_another_name_is_never_run(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"a\.png cannot be read: cannot identify"):
        read_picture(tmp_path / "a.png")


def write_png_header(file, width: int, height: int) -> None:
    """A PNG that claims a size and holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"\0\0\0\r" + header, header), (b"\0\0\0\0IEND", b"IEND")]
    content = b"".join(chunk + struct.pack(">I", zlib.crc32(checked)) for chunk, checked in chunks)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((16, 3_000_000), "16 x 3000000 pixels, a long side of more than 50 times"),
        ((16 * MAX_ASPECT + 1, 16), "more than 50 times the short one"),
        ((12_000, MAX_PIXELS // 12_000 + 1), "more than 128 million"),
        ((60_000, 60_000), "pixels"),
    ],
)
def test_what_a_picture_may_cost_is_seen_in_its_header(tmp_path, size, message):
    write_png_header(tmp_path / "large.png", *size)
    with pytest.raises(ValueError, match=r"large\.png cannot be read: ") as error:
        read_picture(tmp_path / "large.png")
    assert message in str(error.value)


def test_a_cut_off_file_is_named(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be read: .*truncated.*Repair it"):
        read_picture(tmp_path / "cut.jpg")


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))  # blue left, red right
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it clockwise by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    picture = find_pictures(tmp_path, "x")[0]
    assert (picture.width, picture.height) == (20, 40)
    upright = read_picture(picture.path)
    assert upright.size == (20, 40)
    top, bottom = upright.getpixel((10, 5)), upright.getpixel((10, 35))
    assert top[2] > 200 and top[0] < 50 and bottom[0] > 200 and bottom[2] < 50


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpegs_size_is_that_of_the_whole_picture_and_what_is_missing_is_found(tmp_path, mode, progressive):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / "a.jpg", exif=exif, progressive=progressive)
        assert picture_size(tmp_path / "a.jpg") == read_picture(tmp_path / "a.jpg").size
    content = (tmp_path / "a.jpg").read_bytes()
    for share in (0.2, 0.5, 0.9, 0.97):
        (tmp_path / "a.jpg").write_bytes(content[: int(share * len(content))])
        for read in (picture_size, read_picture):
            with pytest.raises(ValueError, match=r"a\.jpg cannot be read: .*truncated"):
                read(tmp_path / "a.jpg")
