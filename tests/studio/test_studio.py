"""What stands behind the studio's pages, without a browser."""

import ast
import errno
import json
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.studio_helpers import ANNA, BERT, bomb, copy_adapter, cut_off, disguised, make_adapter, picture

from apt_diffusion.costs import published_tables
from apt_diffusion.data.dreambooth import DreamBoothData, Framing
from apt_diffusion.data.folders import find_pictures
from apt_diffusion.io.atomic import replacing
from apt_diffusion.studio import charts, costs, uploads
from apt_diffusion.studio.axes import STRENGTHS, cells_of, values_of
from apt_diffusion.studio.background import in_background
from apt_diffusion.studio.framing import as_trained
from apt_diffusion.studio.generation import Painter, Progress
from apt_diffusion.studio.library import EXAMPLES, Library, slug
from apt_diffusion.studio.order import Order
from apt_diffusion.studio.pages.events import in_words
from apt_diffusion.studio.python_code import python_code


@pytest.fixture(scope="module")
def painter(tiny_sd_path):
    return Painter(str(tiny_sd_path))


@pytest.fixture(scope="module")
def adapter_folder(tiny_sd_path, tmp_path_factory):
    return make_adapter(tiny_sd_path, tmp_path_factory.mktemp("adapter") / "glyph")


@pytest.fixture
def library(tmp_path, adapter_folder):
    """One published adapter, and one of Anna's."""
    library = Library(tmp_path / "adapters")
    copy_adapter(adapter_folder, library.folder / "shared")
    copy_adapter(adapter_folder, library.own_folder(ANNA) / "mine")
    return library


def order(library, keys=("public/shared",), weight=1.0, **changes):
    settings = {"prompt": "a sks glyph", "steps": 3, "guidance": 3.0, "width": 16, "height": 16, "seed": 5}
    adapters = tuple((library.get(ANNA, key), weight) for key in keys)
    return Order(adapters=adapters, **(settings | changes))


def pixels(pictures) -> np.ndarray:
    return np.stack([np.asarray(image) for image in pictures])


# Generate


def finals(steps) -> dict[str, np.ndarray]:
    return {step.part: pixels(step.pictures) for step in steps if isinstance(step, Progress) and step.done}


def test_adapted_and_base_pictures_start_from_the_same_noise(painter, library, pipe):
    drawn = finals(painter.draw(order(library, count=2)))
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "width": 16, "height": 16}
    expected = pipe("a sks glyph", num_images_per_prompt=2, generator=generators, **settings).images
    assert np.array_equal(drawn["base"], pixels(expected))
    assert not np.array_equal(drawn["adapted"], drawn["base"])
    assert painter.pipe.get_list_apt_adapters() == {}  # the next visitor finds the base model


def test_progress_counts_every_denoising_step_and_previews_become_the_picture(painter, library):
    steps = list(painter.draw(order(library, steps=4)))
    assert [step.step for step in steps if not step.done] == list(range(1, 9))
    assert {step.steps for step in steps} == {8}
    adapted = [pixels(step.pictures).astype(float) for step in steps if step.part == "adapted" and step.pictures]
    errors = [np.abs(preview - adapted[-1]).mean() for preview in adapted]
    assert len(adapted) == 5 and errors[-2] < 1  # after the last step the preview is the picture, up to rounding
    assert errors[0] > errors[-2]


def test_weights_mix_adapters(painter, library):
    both = finals(painter.draw(order(library, ("public/shared", "own/mine"), 0.5)))
    one = finals(painter.draw(order(library, ("public/shared",), 1.0)))  # the same file twice, half each
    assert np.abs(both["adapted"].astype(int) - one["adapted"].astype(int)).max() <= 1


def test_the_sweep_goes_from_the_base_model_to_more_than_the_adapter(painter, library):
    name = "Strength of all adapters"
    cells = cells_of(order(library, count=3), name, values_of(name, STRENGTHS))
    drawn = finals(painter.draw(order(library)))
    row = [finals(painter.draw(cell, with_base=False))["adapted"] for cell in cells]
    assert [cell.strength for cell in cells] == [0, 0.2, 0.4, 0.6, 0.8, 1, 1.2]
    assert np.array_equal(row[0], drawn["base"])
    assert np.array_equal(row[5], drawn["adapted"])
    assert not np.array_equal(row[6], drawn["adapted"])


@pytest.mark.parametrize(
    "changes", [{}, {"strength": 0.5, "sampler": "Euler"}, {"blocks": (("down", 0.3), ("text_encoder", 0.0))}],
    ids=["plain", "strength and sampler", "blocks"],
)  # fmt: skip
def test_the_code_on_the_page_draws_the_same_pixels(painter, library, tmp_path, monkeypatch, changes):
    wanted = order(
        library,
        ("own/mine",),
        0.7,
        count=2,
        prompt="quotes \" and ' and \\ and\nlines",
        negative_prompt="a cat",
        steps=2,
        **changes,
    )
    code = python_code(painter, wanted)
    shown = next(iter(re.findall(r"load_apt_weights\('([^']+)'", code)))
    (tmp_path / shown).write_bytes(library.get(ANNA, "own/mine").file.read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "page", "exec"), {})
    (expected,) = [step.pictures for step in painter.draw(wanted, with_base=False) if step.done]
    for name, image in zip(["seed-5.png", "seed-6.png"], expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(name)), np.asarray(image))


def test_the_code_is_python_whatever_the_names_are(painter, library, adapter_folder):
    copy_adapter(adapter_folder, library.folder / "v1.5 'best'")
    ast.parse(python_code(painter, order(library, ("public/v1.5 'best'",))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "Write a prompt"),
        ({"prompt": "x" * 2000}, "1000 characters"),
        ({"steps": 1000}, "number of steps"),
        ({"count": 9}, "number of pictures"),
        ({"seed": -1}, "seed"),
        ({"guidance": float("nan")}, "guidance"),
        ({"weight": 99.0}, "weight of shared"),
        ({"keys": ["public/shared"] * 5}, "At most 4"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused_in_words(library, changes, message):
    with pytest.raises(ValueError, match=message):
        order(library, **changes)


def test_a_size_that_the_model_cannot_draw_is_refused(painter, library):
    for changes in ({"width": 12}, {"height": 4096}):
        with pytest.raises(ValueError, match="multiple of 8"):
            painter.draw(order(library, **changes))


def test_a_damaged_adapter_leaves_the_model_usable(painter, library):
    wanted = order(library)
    good = wanted.adapters[0][0].file.read_bytes()
    wanted.adapters[0][0].file.write_bytes(good[:-100])
    with pytest.raises(ValueError, match="cut off"):
        list(painter.draw(wanted))
    wanted.adapters[0][0].file.write_bytes(good)
    assert set(finals(painter.draw(wanted))) == {"adapted", "base"}


def test_errors_of_adapters_name_them_and_not_where_they_lie(painter, library):
    mine = library.get(ANNA, "own/mine")
    whole = mine.file.read_bytes()
    copy_adapter(EXAMPLES / "mushroom", library.folder / "foreign")
    mine.file.write_bytes(whole[:-100])
    foreign = library.get(ANNA, "public/foreign")
    for adapter, message in ((mine, "mine cannot be read"), (foreign, "made for the base model 'miniature'")):
        with pytest.raises(ValueError, match=message) as error:
            list(painter.draw(Order("a", adapters=((adapter, 1.0),), width=16, height=16)))
        assert str(library.folder) not in str(error.value)
    mine.file.unlink()
    with pytest.raises(ValueError, match="not there any more"):
        mine.load()
    assert set(finals(painter.draw(order(library)))) == {"adapted", "base"}


def test_work_that_nobody_waits_for_stops_and_gives_the_model_back(painter, library):
    steps = painter.draw(order(library, steps=50))
    next(steps)
    steps.close()
    assert set(finals(painter.draw(order(library)))) == {"adapted", "base"}
    assert painter.pipe.get_list_apt_adapters() == {}


def test_an_error_in_the_background_is_raised_in_front():
    def work(watcher):
        watcher.emit(1)
        raise RuntimeError("broken")

    values = in_background(work)
    assert next(values) == 1
    with pytest.raises(RuntimeError, match="broken"):
        next(values)


# Adapters


def test_everybody_sees_what_is_published_and_nobody_the_others_own(library):
    assert [adapter.key for adapter in library.visible(ANNA)] == ["own/mine", "public/shared"]
    assert [adapter.key for adapter in library.visible(BERT)] == ["public/shared"]
    for key in ("own/mine", "public/.visitors", "public/../adapters/shared", f"public/.visitors/{ANNA}/adapters/mine"):
        with pytest.raises(ValueError, match="not there any more"):
            library.get(BERT, key)


@pytest.mark.parametrize("name", sorted(folder.name for folder in EXAMPLES.iterdir() if folder.is_dir()))
def test_examples_of_the_package_are_shown_where_they_fit(tmp_path, painter, name):
    library = Library(tmp_path, "miniature" if name == "mushroom" else "miniature-emoji")
    seen = {a.key: a for kind in ("stable_diffusion", "vilt", "meter", "clip") for a in library.visible(ANNA, kind)}
    example = seen[f"example/{name}"]
    assert example.label == f"{name} (example)" and example.load().tensors and example.card.startswith("# ")
    assert example.metadata["base_model"].startswith("miniature")
    for text in (example.card, *example.metadata.values()):
        assert not re.search(r"(^|[\s\"'=])/\w+/", text), "a path of the computer that trained it"
    is_drawer = example.kind == "stable_diffusion"
    elsewhere = Library(tmp_path, painter.model).visible(ANNA, example.kind)
    assert is_drawer != any(adapter.key == example.key for adapter in elsewhere)
    if is_drawer:
        assert example.prompt
        with pytest.raises(ValueError, match="published already"):
            library.publish(ANNA, example.key)
    if example.kind in ("vilt", "meter"):
        assert len(json.loads(example.metadata["answers"])) > 1


def test_a_visitor_is_no_path(library):
    for name in ("..", "../" + ANNA, "A" * 32, ""):
        with pytest.raises(ValueError, match="no visitor"):
            library.visible(name)


def test_links_that_lead_out_of_the_folder_are_not_followed(library, adapter_folder, tmp_path):
    (library.folder / "escape").symlink_to(adapter_folder, target_is_directory=True)
    (library.folder / "file.safetensors").symlink_to(adapter_folder / "pytorch_apt_weights.safetensors")
    (library.folder / "junk.safetensors").write_bytes(b"no adapter")
    assert [adapter.key for adapter in library.visible(BERT)] == ["public/shared"]


def test_publishing_shows_a_copy_to_everybody_and_takes_no_ones_name(library, painter):
    published = library.publish(ANNA, "own/mine")
    assert published.key == "public/mine" and library.get(BERT, "public/mine").card.startswith("# A card")
    assert library.publish(ANNA, "own/mine").key == "public/mine-2"
    with pytest.raises(ValueError, match="published already"):
        library.publish(ANNA, "public/shared")
    with pytest.raises(ValueError, match="not there any more"):
        library.publish(BERT, "own/mine")
    assert not [path for path in library.folder.iterdir() if path.name.startswith(".mine")]


def test_a_sample_that_is_being_written_is_not_shown_and_not_published(library):
    samples = library.own_folder(ANNA) / "mine" / "samples"
    samples.mkdir()
    picture(samples / "step-000002.png")
    with replacing(samples / "step-000004.png") as unfinished:
        picture(unfinished)
        assert [file.name for file in library.get(ANNA, "own/mine").samples] == ["step-000002.png"]
        published = library.publish(ANNA, "own/mine")
    assert [file.name for file in published.file.parent.glob("samples/*")] == ["step-000002.png"]
    assert [file.name for file in library.get(ANNA, "own/mine").samples] == ["step-000004.png", "step-000002.png"]


def test_cards_show_no_paths_of_this_computer(tiny_sd_path, tmp_path):
    secret = str(tmp_path / "adapters" / ".visitors" / ANNA / "adapters" / "mine")
    library = Library(tmp_path / "adapters")
    folder = make_adapter(
        tiny_sd_path, library.own_folder(ANNA) / "mine", training=json.dumps({"output_dir": secret, "step": 3})
    )
    (folder / "README.md").write_text(f"# Card\n\n![x](y.png)\n\nload_apt_weights('{secret}')\n")
    card = library.get(ANNA, "own/mine").card
    assert str(tmp_path) not in card and "mine.safetensors" in card


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("My Dog!", "my-dog"),
        ("../../etc/passwd", "etc-passwd"),
        ("<b>ü</b>", "b-b"),
        ("", "adapter"),
        ("x" * 99, "x" * 40),
    ],
)
def test_names_become_harmless(wanted, name):
    assert slug(wanted) == name


# Uploads


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bomb, "million"),
        (cut_off, "damaged"),
        (disguised, "no picture"),
        (lambda path: picture(path, 8, 8), "at least 16"),
        (lambda path: path.write_bytes(bytes(uploads.MAX_BYTES + 1)) and path, "MB"),
    ],
    ids=["bomb", "cut off", "no picture", "tiny", "large"],
)
def test_bad_uploads_are_refused_by_name_and_nothing_is_kept(tmp_path, make, message):
    bad, good = make(tmp_path / "holiday.png"), picture(tmp_path / "good.png")
    with pytest.raises(ValueError, match=message) as error:
        uploads.keep_pictures([good, bad], [], tmp_path / "kept")
    assert "holiday.png" in str(error.value) and str(tmp_path) not in str(error.value)
    assert not (tmp_path / "kept").exists()


def test_pictures_are_decoded_one_at_a_time_and_a_full_disk_keeps_none(tmp_path, monkeypatch):
    paths = [picture(tmp_path / f"{i}.png") for i in range(4)]
    seen, most, opened = [], [], uploads.open_picture

    def counted(path):
        most.append(sum(image() is not None for image in seen))
        image = opened(path)
        seen.append(weakref.ref(image))
        return image

    monkeypatch.setattr(uploads, "open_picture", counted)
    uploads.keep_pictures(paths, [], tmp_path / "kept")
    assert len(most) == 4 and max(most) <= 1

    def full(image, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError) as error:
        uploads.keep_pictures(paths, [], tmp_path / "other")
    assert not (tmp_path / "other").exists()
    said = in_words(error.value)
    assert "No space left on device" in said and str(tmp_path) not in said


def test_words_of_python_itself_do_not_reach_the_page(tmp_path, caplog):
    for fail in (lambda: (tmp_path / "secret").read_text(), lambda: json.loads("{"), lambda: b"\xff".decode()):
        with pytest.raises((OSError, ValueError)) as error:
            fail()
        assert str(tmp_path) not in in_words(error.value) and "try again" in in_words(error.value).lower()
    assert in_words(ValueError("Write a prompt.")) == "Write a prompt."


def test_uploads_are_re_encoded_under_our_own_names(tmp_path):
    hostile = picture(tmp_path / "..%2f..%2fetc$(rm -rf ~).jpg", exif=Image.Exif())
    stretched = Image.new("RGB", (20, 60), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    stretched.save(tmp_path / "turned.jpg", exif=exif)
    kept = uploads.keep_pictures([hostile, tmp_path / "turned.jpg"], ["", " a sks glyph "], tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "picture-01.png", "picture-02.png", "picture-02.txt"
    ]  # fmt: skip
    assert Image.open(kept[1]).size == (60, 20)
    assert [found.prompt for found in find_pictures(tmp_path / "kept", "default")] == ["default", "a sks glyph"]


def test_counts_of_pictures_and_captions_are_checked(tmp_path):
    one = picture(tmp_path / "one.png")
    with pytest.raises(ValueError, match="from 1 to 30"):
        uploads.keep_pictures([one] * 31, [], tmp_path / "kept")
    with pytest.raises(ValueError, match="2 captions for 1 pictures"):
        uploads.keep_pictures([one], ["a", "b"], tmp_path / "kept")


def test_the_crop_preview_is_what_the_trainer_sees(tmp_path):
    paths = [picture(tmp_path / f"p{i}.png", 40 + 30 * i, 40, seed=i) for i in range(3)]
    shown = as_trained(paths, size=32, stride=4, class_count=5, seed=3)
    uploads.keep_pictures(paths, [], tmp_path / "kept")
    instance = find_pictures(tmp_path / "kept", "a sks glyph")
    data = DreamBoothData(instance, instance[:1] * 5, Framing(32, stride=4), (4, 8, 8), seed=3)
    seen = {}
    for position in range(5):
        sample, view = data[position][0], data.views_at(position)[0]
        seen.setdefault(view.path, sample.image)
    for found, one in zip(instance, shown, strict=True):
        expected = ((seen[found.path].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
        assert np.array_equal(np.asarray(one.square), expected)


# Cost


def test_costs_are_those_of_the_published_tables():
    published = {(cell.table, cell.method): cell for cell in published_tables()}
    for model, tokens in (("ViLT", 241), ("METER", 577)):
        table = costs.compare("ViLT-B/32" if model == "ViLT" else model, 200, 4, tokens)
        for label, method in costs.compared_methods().items():
            if (model, method) != ("METER", "deep_prompt"):  # published at another size
                cell = published[model, method]
                assert (table[label].parameters, table[label].macs) == (cell.parameters, cell.macs), (model, label)
    assert "82.4 % less" in costs.saving(costs.compare("ViLT-B/32", 200, 4, 241))


def test_costs_of_stable_diffusion_are_those_of_the_modules_that_add_apt_adapts():
    from diffusers import UNet2DConditionModel

    from apt_diffusion import APTConfig, add_apt
    from apt_diffusion.api import adapter_parameters

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    add_apt(unet, APTConfig(num_prompts=7, rank=3))
    count = sum(parameter.numel() for parameter in adapter_parameters(unet))
    gates = 16  # of `identity`: one number per module, which the closed form does not count
    assert costs.compare("Stable Diffusion 1.5", 7, 3, 4096)["APT"].parameters == count - gates


def test_costs_out_of_range_are_refused():
    for arguments in (("no model", 1, 1, 1), ("METER", 0, 1, 1), ("METER", 1, 10**6, 1), ("METER", 1, 1, -5)):
        with pytest.raises(ValueError):
            costs.compare(*arguments)


def test_charts_are_to_scale_and_escape_what_they_show():
    html = charts.bars("<b>", [("<script>", 1.0, "1"), ("half", 0.5, "&")])
    assert "<script>" not in html and "<b>" not in html and "width:50.00%" in html and "width:100.00%" in html
    curve = charts.curve("Loss", [(1, 2.0), (2, 1.0), (3, 1.0), (4, 1.0)], 4)
    heights = [float(point.split(",")[1]) for point in re.search(r'apt-faint" points="([^"]+)"', curve)[1].split()]
    assert heights[0] < heights[1] == heights[2]  # y goes down
    assert "<i>" not in charts.problem("<i>") and "0.500" in charts.progress("half", 0.5)
