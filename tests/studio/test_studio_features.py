"""What people know from other tools, as they meet it: each with a real browser."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image
from support.studio_browser import (
    as_file,
    choose,
    draw,
    offered,
    opened,
    pictures_of,
    served,
    tab,
    upload,
    wait_for,
    wait_for_pictures,
)
from support.studio_helpers import make_adapter, picture


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_sd_path):
    folder = tmp_path_factory.mktemp("studio") / "adapters"
    make_adapter(tiny_sd_path, folder / "shared")
    make_adapter(tiny_sd_path, folder / "other", seed=2)
    return folder


@pytest.fixture(scope="module")
def address(adapters, tiny_sd_path):
    with served(adapters, "--model", str(tiny_sd_path)) as address:
        yield address


def open_part(page, title):
    """Opens one of the folded parts."""
    page.locator("button.label-wrap:visible", has_text=title).click()
    page.wait_for_timeout(300)


def number(page, where, value):
    page.fill(f"{where} input[type=number]", str(value))
    page.keyboard.press("Tab")


def box(page, where):
    return page.locator(where).bounding_box()


def done(page, seed):
    wait_for(page, "#status", rf"Done\. Seed {seed}\.")
    wait_for_pictures(page)


# Layout


def test_the_first_screen_says_what_this_is_and_the_button_is_on_it(visit):
    page = visit()
    page.set_viewport_size({"width": 1366, "height": 768})
    page.wait_for_selector("#welcome img")
    assert "Teach an image model a new subject" in page.inner_text(".apt-header")
    for where in ("#draw", "#welcome img >> nth=0", "#status"):
        place = box(page, where)
        assert place["y"] + place["height"] <= 768, where
    tab(page, "Train")
    page.wait_for_selector("#train:visible")
    train, status = box(page, "#train"), box(page, "#train-status")
    assert train["y"] + train["height"] <= 768
    assert abs(train["y"] - (status["y"] + status["height"])) < 60 and abs(status["x"] - train["x"]) < 60


def test_on_a_phone_the_pictures_follow_the_button(visit):
    page = visit()
    page.set_viewport_size({"width": 390, "height": 800})
    draw(page, "a sks glyph", 1, steps=2)
    done(page, 1)
    button, picture_box, more = box(page, "#draw"), box(page, "#base img"), box(page, "#seed")
    assert 0 < picture_box["y"] - button["y"] < 500 < more["y"]
    figure = page.locator("#base figure").first
    caption = figure.locator("figcaption").bounding_box()
    assert caption["y"] >= picture_box["y"] + picture_box["height"] - 1  # below it, not over it


def test_control_and_enter_generate(visit):
    page = visit()
    draw(page, "a", 1, steps=2)
    done(page, 1)
    page.fill("#seed input", "2")
    page.focus("#prompt textarea")
    page.keyboard.press("Control+Enter")
    done(page, 2)


def test_captions_come_from_files_of_the_same_name_and_frames_can_be_moved(visit, adapters, tmp_path):
    page = visit()
    tab(page, "Train")
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, :32], pixels[:, 64:] = (255, 0, 0), (0, 0, 255)  # red, black, blue
    Image.fromarray(pixels).save(tmp_path / "long.png")
    caption = {"name": "long.txt", "mimeType": "text/plain", "buffer": b"a sks glyph, three colours"}
    upload(page, as_file("long.png", tmp_path / "long.png"), as_file("b.png", picture(tmp_path / "b.png")), caption)
    wait_for(page, "#train-status", "2 pictures, cut to")
    page.wait_for_function("document.querySelector('#captions textarea').value.startsWith('a sks glyph, three')")
    frame = page.locator("#seen .apt-frame").first
    before = frame.bounding_box()["x"]
    page.locator("#seen input[type=range]").first.fill("1")
    assert frame.bounding_box()["x"] > before
    page.fill("#class-prompt input, #class-prompt textarea", "")
    number(page, "#train-steps", 400)
    page.click("#train")
    wait_for(page, "#train-status", r"Loading the model|Step \d+ of 400")
    (kept,) = adapters.glob(".visitors/*/trainings/my-subject/pictures/picture-01.png")
    image = np.asarray(Image.open(kept))
    assert image.shape == (32, 32, 3) and (image == (0, 0, 255)).all()
    assert kept.with_suffix(".txt").read_text().strip() == "a sks glyph, three colours"
    page.click("#cancel:enabled")
    wait_for(page, "#train-status", "Stopped")
    page.click("#words-help summary")
    wait_for(page, "#words-help", "made-up word")


# Memory


def test_prompt_settings_and_pictures_survive_a_reload(visit):
    page = visit()
    page.wait_for_function("document.body.dataset.filled")
    choose(page, "#adapters", "other")
    wait_for(page, "#adapters", "other")
    page.wait_for_selector("#weight-1 input[type=number]:visible")
    number(page, "#weight-1", 0.4)
    draw(page, "a sks glyph that stays", 8, steps=3)
    done(page, 8)
    shown = pictures_of(page, "#adapted")
    page.reload()
    page.wait_for_selector("#adapted img")
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'a sks glyph that stays'")
    wait_for(page, "#adapters", "other")
    page.wait_for_function("document.querySelector('#weight-1 input[type=number]')?.value == 0.4")
    assert page.input_value("#seed input") == "8" and not page.is_checked("#new-seed input")
    assert np.array_equal(pictures_of(page, "#adapted"), shown)


def test_the_history_keeps_restores_deletes_and_packs_pictures(visit):
    page = visit()
    draw(page, "a first glyph", 3, steps=2)
    done(page, 3)
    draw(page, "a second glyph", 4, steps=2, count=2)
    done(page, 4)
    tab(page, "Pictures")
    page.wait_for_function("document.querySelectorAll('#history img').length == 3")
    with page.expect_download() as download:
        page.get_by_text("Download all").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.namelist()[0].endswith("a-first-glyph-seed-3.png") and len(archive.namelist()) == 3
    page.locator("#history figure", has_text="first glyph").get_by_role("button", name="Use its settings").click()
    page.wait_for_selector("#draw:visible")
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'a first glyph'")
    assert page.input_value("#seed input") == "3"
    tab(page, "Pictures")
    page.locator("#history figure", has_text="first glyph").get_by_role("button", name="Delete").click()
    page.wait_for_function("document.querySelectorAll('#history img').length == 2")
    page.click("#clear-pictures")
    wait_for(page, "#pictures-status", "2 pictures are deleted")
    wait_for(page, "#history", "Nothing is drawn yet")


def test_a_downloaded_picture_carries_its_settings_and_gives_them_back(visit):
    page = visit()
    choose(page, "#adapters", "shared")
    wait_for(page, "#adapters", "shared")
    draw(page, "a glyph to keep", 6, steps=3)
    done(page, 6)
    with page.expect_download() as download:
        page.locator("#adapted").get_by_role("link", name="Download").first.click()
    assert download.value.suggested_filename == "a-glyph-to-keep-seed-6.png"
    content = download.value.path().read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        assert json.loads(image.text["apt_diffusion"])["adapters"] == ["public/shared"]
        assert "Seed: 6" in image.text["parameters"]
        assert "trainedAlgorithmicMedia" in image.text["XML:com.adobe.xmp"]
    other = visit()
    other.wait_for_function("document.body.dataset.filled")
    dropped = other.evaluate_handle(
        """bytes => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "a.png", {type: "image/png"}));
            return data;
        }""",
        list(content),
    )
    other.dispatch_event("#status", "drop", {"dataTransfer": dropped})
    other.wait_for_function("document.querySelector('#prompt textarea').value == 'a glyph to keep'")
    wait_for(other, "#adapters", "shared")
    assert other.input_value("#seed input") == "6"
    other.click("#draw")
    done(other, 6)
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(pictures_of(other, "#adapted")[0], np.asarray(image.convert("RGB")))


def test_a_link_holds_the_settings(visit, address):
    page = visit()
    choose(page, "#adapters", "shared")
    wait_for(page, "#adapters", "shared")
    draw(page, "a glyph & more", 12, steps=3)
    done(page, 12)
    link = page.get_attribute("#link a", "href")
    other = visit()
    other.goto(address + link)
    wait_for(other, "#adapters", "shared")
    other.wait_for_function("document.querySelector('#prompt textarea').value == 'a glyph & more'")
    other.click("#draw")
    done(other, 12)
    assert np.array_equal(pictures_of(other, "#adapted"), pictures_of(page, "#adapted"))
    other.goto(f"{address}/?prompt=x&steps=many")
    assert "steps must be a number" in wait_for(other, "#status", "steps")


# Draw more


def test_a_picture_to_start_from_and_a_brush_change_what_is_drawn(visit, tmp_path):
    page = visit()
    draw(page, "a glyph", 5, steps=4)
    done(page, 5)
    from_noise = pictures_of(page, "#base")
    open_part(page, "Start from a picture")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "start.png")
    upload(page, as_file("start.png", tmp_path / "start.png"), into="#start-picture")
    page.wait_for_selector("#brush canvas")
    page.click("#draw")
    page.wait_for_timeout(500)
    done(page, 5)
    whole = pictures_of(page, "#base")
    assert not np.array_equal(whole, from_noise)
    page.locator("#brush canvas").scroll_into_view_if_needed()
    canvas = box(page, "#brush canvas")
    page.locator("#brush input[type=range]").fill("4")
    page.mouse.move(canvas["x"] + 3, canvas["y"] + 3)
    page.mouse.down()
    page.mouse.move(canvas["x"] + canvas["width"] - 3, canvas["y"] + 3)
    page.mouse.up()
    page.wait_for_function("document.querySelector('#mask textarea, #mask input').value.startsWith('data:image/png')")
    page.click("#draw")
    page.wait_for_timeout(500)
    done(page, 5)
    assert not np.array_equal(pictures_of(page, "#base"), whole)
    page.locator("#base").get_by_role("button", name="Start from it").first.click()
    wait_for(page, "#status", "starts from this one")


def test_a_grid_compares_two_settings(visit):
    page = visit()
    choose(page, "#adapters", "shared")
    wait_for(page, "#adapters", "shared")
    draw(page, "a red glyph", 7, steps=2)
    done(page, 7)
    open_part(page, "Compare settings in a grid")
    choose(page, "#compare-top", "Steps")
    page.fill("#compare-top-values input, #compare-top-values textarea", "2, 3")
    choose(page, "#compare-side", "Words")
    page.fill("#compare-side-values input, #compare-side-values textarea", "red, blue")
    page.click("#compare")
    page.wait_for_function("document.querySelectorAll('#grid img').length == 4")
    done(page, 7)
    cells = pictures_of(page, "#grid")
    assert np.array_equal(cells[0], pictures_of(page, "#adapted")[0])
    assert len({cell.tobytes() for cell in cells}) == 4
    assert page.locator("#grid th").all_inner_texts() == ["2", "3", "red", "blue"]
    page.fill("#compare-top-values input, #compare-top-values textarea", ",".join(map(str, range(1, 40))))
    page.click("#compare")
    wait_for(page, "#status", "may have 36 pictures")


def test_lines_are_prompts_of_their_own_and_prompts_name_adapters(visit):
    page = visit()
    draw(page, "a first glyph\na second glyph <apt:shared:0.5>", 9, steps=2)
    done(page, 9)
    page.check("#each-line input")
    page.click("#draw")
    page.wait_for_function("document.querySelectorAll('#base img').length == 2")
    done(page, 9)
    said = page.eval_on_selector_all("#base img", "images => images.map(image => image.alt)")
    assert said[0].startswith("a first glyph") and said[1].startswith("a second glyph, seed")
    assert page.locator("#adapted img").count() == 1  # the second names an adapter
    page.fill("#prompt textarea", "a glyph <apt:nobody:1>")
    page.click("#draw")
    wait_for(page, "#status", "no adapter “nobody”")


def test_samplers_and_blocks_change_the_picture_and_presets_keep_them(visit):
    page = visit()
    choose(page, "#adapters", "shared")
    wait_for(page, "#adapters", "shared")
    drawn = []
    draw(page, "a glyph", 4, steps=3)
    done(page, 4)
    drawn.append(pictures_of(page, "#adapted"))
    choose(page, "#sampler", "Euler a")
    page.click("#draw")
    page.wait_for_timeout(500)
    done(page, 4)
    drawn.append(pictures_of(page, "#adapted"))
    open_part(page, "Strength by block")
    number(page, "#block-up", 0)
    page.click("#draw")
    page.wait_for_timeout(500)
    done(page, 4)
    drawn.append(pictures_of(page, "#adapted"))
    assert len({pixels.tobytes() for pixels in drawn}) == 3
    open_part(page, "Presets")
    page.fill("#preset-name input, #preset-name textarea", "mine")
    page.click("#preset-save")
    wait_for(page, "#status", "Kept as “mine”")
    number(page, "#block-up", 1)
    choose(page, "#sampler", "DDIM")
    choose(page, "#preset", "mine")
    page.wait_for_function("document.querySelector('#block-up input[type=number]').value == 0")
    assert page.input_value("#sampler input") == "Euler a"
    page.click("#preset-delete")
    wait_for(page, "#status", "preset is deleted")


# Adapters


def test_an_adapter_is_uploaded_used_renamed_published_taken_back_and_deleted(visit, adapters, tmp_path):
    page, neighbour = visit(), visit()
    tab(page, "Adapters")
    broken = {"name": "broken.safetensors", "mimeType": "application/octet-stream", "buffer": b"x" * 100}
    upload(page, broken, into="#adapter-file")
    assert "cannot be read as safetensors" in wait_for(page, "#adapters-status", "broken")
    page.reload()
    page.wait_for_selector("#draw")
    tab(page, "Adapters")
    good = (adapters / "shared" / "pytorch_apt_weights.safetensors").read_bytes()
    upload(
        page, {"name": "My dog.safetensors", "mimeType": "application/octet-stream", "buffer": good},
        into="#adapter-file",
    )  # fmt: skip
    wait_for(page, "#adapters-status", "Added as my-dog")
    page.get_by_role("button", name="Use it: my-dog").click()
    page.wait_for_selector("#draw:visible")
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'a sks glyph'")
    wait_for(page, "#adapters", "my-dog")
    tab(page, "Adapters")
    page.fill("#new-name input, #new-name textarea", "Our <dog>")
    page.get_by_role("button", name="Rename: my-dog").click()
    wait_for(page, "#adapters-status", "our-dog")
    page.get_by_role("button", name="Publish: our-dog").click()
    wait_for(page, "#adapters-status", "Published: our-dog")
    neighbour.reload()
    neighbour.wait_for_selector("#draw")
    assert "our-dog" in offered(neighbour)
    tab(neighbour, "Adapters")
    neighbour.wait_for_selector("#adapter-cards article")
    assert not neighbour.get_by_role("button", name="Take back: our-dog").count()
    page.get_by_role("button", name="Take back: our-dog").click()
    wait_for(page, "#adapters-status", "others do not see it")
    page.get_by_role("button", name="Delete: our-dog").click()
    wait_for(page, "#adapters-status", "Deleted")
    assert not list(adapters.glob(".visitors/*/adapters/our-dog")) and not (adapters / "our-dog").exists()


# Wait


def test_who_waits_reads_the_position(visit):
    first, second = visit(), visit()
    choose(first, "#adapters", "shared")
    wait_for(first, "#adapters", "shared")
    draw(first, "a glyph", 1, steps=100, count=8, side=64)  # takes long enough for the other to come
    wait_for(first, "#status", r"Step \d+ of 200")
    second.click("#draw")
    wait_for(second, "#status", "one request is before yours|you are next")
    first.click("#stop-drawing")
    wait_for(second, "#status", "Done")


# Understand


def test_maps_have_a_legend_and_a_slider_goes_through_the_steps(visit):
    page = visit()
    tab(page, "Understand")
    tab(page, "Watch it draw")
    choose(page, "#watched", "shared")
    page.fill("#watch-prompt textarea", "a sks glyph")
    page.click("#watch")
    wait_for(page, "#watch-status", "Done: 25 steps")
    assert page.locator("#watch-maps .apt-legend").inner_text().split() == ["least", "most"]
    wait_for(page, "#watch-maps", "mean of all steps")
    mean = opened(page, page.locator("#watch-maps figure img:not([hidden])").nth(1).get_attribute("src"))
    page.locator("#watch-maps input[type=range]").fill("3")
    wait_for(page, "#watch-maps", "step 3")
    third = opened(page, page.locator("#watch-maps figure img:not([hidden])").nth(1).get_attribute("src"))
    assert mean.size == third.size and mean.tobytes() != third.tobytes()


# Programs


@pytest.mark.slow
def test_gradios_client_generates_and_lists_and_sees_nothing_else(address, tmp_path):
    from gradio_client import Client

    client = Client(address, verbose=False, download_files=str(tmp_path))
    api = client.view_api(return_format="dict", print_info=False)
    assert set(api["named_endpoints"]) == {"/generate", "/list_adapters"} and not api["unnamed_endpoints"]
    listed = client.predict(api_name="/list_adapters")
    assert {entry["key"] for entry in listed} == {"public/shared", "public/other"}
    drawn = client.predict("a glyph", "public/shared:0.5", "", 3, 2, 3, 2, api_name="/generate")
    assert [entry["caption"] for entry in drawn] == ["seed 3", "seed 4"]
    pictures = [np.asarray(Image.open(entry["image"]).convert("RGB")) for entry in drawn]
    assert pictures[0].shape == (32, 32, 3) and not np.array_equal(*pictures)
    with pytest.raises(Exception, match="seed must be from 0"):
        client.predict("a glyph", "", "", -1, 2, 3, 1, api_name="/generate")
