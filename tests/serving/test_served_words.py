"""New words where many adapters share one pipeline: each picture reads its own adapters' words, and no other's."""

import base64
import io

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from support.new_words import save_with_words
from support.server import served

from apt_diffusion import AdapterStore, StableDiffusionXLAPTPipeline
from apt_diffusion.server.settings import ServerSettings
from apt_diffusion.serving.engine import Engine
from apt_diffusion.serving.requests import ImageRequest
from apt_diffusion.words import words_of

PROMPT = "a <sks> glyph <big>"
WORDS = {"a": ["<sks>", "<big>"], "b": ["<sks>"], "c": ["<big>", "<odd>"], "d": ["<odd>"]}


@pytest.fixture
def store(pipe, tmp_path):
    """Adapters whose words overlap, and the pipeline in double precision: pictures are equal to the last bit."""
    for seed, (name, words) in enumerate(WORDS.items()):
        save_with_words(pipe, tmp_path / f"{name}.safetensors", words, seed)
    pipe.to(torch.float64)
    return AdapterStore(tmp_path)


def request(letters: str = "", prompt: str = PROMPT, **settings) -> ImageRequest:
    """A picture with the adapters of these names."""
    settings = {"width": 16, "height": 16, "guidance_scale": 3.0, "seed": 5, "num_inference_steps": 3} | settings
    return ImageRequest(prompt, **{"adapters": dict.fromkeys(letters, 0.8)} | settings)


def alone(pipe, wanted: ImageRequest, folder) -> np.ndarray:
    """What the pipeline draws with these adapters loaded into it, and no others."""
    for name in wanted.adapters:
        pipe.load_apt_weights(folder / f"{name}.safetensors", name)
    names = ("width", "height", "num_inference_steps", "guidance_scale", "negative_prompt")
    settings = {name: getattr(wanted, name) for name in names if getattr(wanted, name) is not None}
    generator = torch.Generator().manual_seed(wanted.seed)
    picture = pipe(wanted.prompt, generator=generator, apt_scale=wanted.adapters or None, **settings).images[0]
    for name in wanted.adapters:
        pipe.delete_apt_adapters(name)
    return np.asarray(picture)


def state_of(text_encoder) -> list[tuple[int, int | None]]:
    """What words change: hooks, and the id of the token that is pooled."""
    return [(len(m._forward_pre_hooks), getattr(m, "eos_token_id", None)) for m in text_encoder.modules()]


def test_pictures_drawn_together_read_their_own_words(pipe, store):
    tokenizer, before = pipe.tokenizer, state_of(pipe.text_encoder)
    wanted = [
        request(),
        request("a"),
        request("b"),
        request("ad", "a <sks> and an <odd>"),
        request("bc", "a <sks> and an <odd>", negative_prompt="<big>"),
        request("a", "without any", seed=6),
        request("b", PROMPT, image=Image.new("RGB", (16, 16), "red"), strength=1.0),
    ]
    expected = [alone(pipe, one, store.folder) for one in wanted[:6]]
    assert len({picture.tobytes() for picture in expected}) == 6  # words and adapters act
    with Engine(pipe, store) as engine:
        tickets = [engine.submit(one) for one in wanted]
        pictures = [np.asarray(ticket.result(60)) for ticket in tickets]
        assert max(engine.statistics()["batch_sizes"]) > 1
        again = np.asarray(engine.submit(wanted[1]).result(60))
        untold = np.asarray(engine.submit(request()).result(60))
    assert [np.array_equal(a, b) for a, b in zip(expected, pictures[:6], strict=True)] == [True] * 6
    assert np.array_equal(again, expected[1]) and np.array_equal(untold, expected[0])
    assert not np.array_equal(pictures[6], expected[2])  # it started from a picture, and read its word
    assert pipe.tokenizer is tokenizer and words_of(pipe.text_encoder) is None
    assert state_of(pipe.text_encoder) == before


def test_a_word_that_two_adapters_of_a_picture_have_is_refused(pipe, store):
    with Engine(pipe, store) as engine:
        with pytest.raises(
            ValueError, match=r"Two adapters of this picture have the word '<sks>': ask for one of them"
        ):
            engine.submit(request("ab")).result(60)
        assert engine.submit(request("ad")).result(60).size == (16, 16)  # nothing is left of the refused one


def test_words_beside_those_that_the_pipeline_has_itself(pipe, store, tmp_path):
    pipe.load_apt_weights(save_with_words(pipe, tmp_path / "own.safetensors", ["<mine>"], 8), "own")
    pipe.set_apt_adapters([])
    wanted = request("b", "a <mine> beside <sks>")
    expected = alone(pipe, wanted, tmp_path)
    with Engine(pipe, store) as engine:
        assert np.array_equal(np.asarray(engine.submit(wanted).result(60)), expected)
    assert list(words_of(pipe.text_encoder).names) == ["own"]


def test_words_that_do_not_fit_are_refused_before_anything_is_attached(pipe, store, tmp_path):
    save_with_words(pipe, tmp_path / "same.safetensors", ["<mine>"], 7)
    pipe.load_apt_weights(save_with_words(pipe, tmp_path / "own.safetensors", ["<mine>"], 8), "own")
    with Engine(pipe, store) as engine:
        with pytest.raises(ValueError, match="Another adapter has the word '<mine>', too"):
            engine.check_adapter(store.get("same"))
        with pytest.raises(ValueError, match="Another adapter has the word '<mine>', too"):
            engine.submit(request(prompt="a", adapters={"same": 1.0})).result(60)
        assert engine.statistics()["resident_adapters"] == 0
        engine.check_adapter(store.get("b"))


def test_both_text_encoders_of_sdxl_know_the_words(tiny_sdxl_path, tmp_path):
    pipe = StableDiffusionXLAPTPipeline.from_pretrained(tiny_sdxl_path)
    pipe.set_progress_bar_config(disable=True)
    for seed, name in enumerate("ab"):
        save_with_words(pipe, tmp_path / f"{name}.safetensors", WORDS[name], seed)
    pipe.to(torch.float64)
    wanted = [request("a"), request("b")]
    expected = [alone(pipe, one, tmp_path) for one in wanted]
    with Engine(pipe, AdapterStore(tmp_path)) as engine:
        pictures = [ticket.result(60) for ticket in [engine.submit(one) for one in wanted]]
    assert [np.array_equal(a, np.asarray(b)) for a, b in zip(expected, pictures, strict=True)] == [True] * 2


def test_a_pipeline_with_a_store_knows_the_words_for_one_call(pipe, store):
    tokenizer = pipe.tokenizer
    wanted = request("b")
    expected = alone(pipe, wanted, store.folder)
    pipe.apt_store = store
    settings = {"width": 16, "height": 16, "num_inference_steps": 3, "guidance_scale": 3.0}
    generator = torch.Generator().manual_seed(5)
    picture = pipe(PROMPT, generator=generator, apt_scale={"b": 0.8}, **settings).images[0]
    assert np.array_equal(np.asarray(picture), expected)
    assert pipe.tokenizer is tokenizer and words_of(pipe.text_encoder) is None
    with pytest.raises(ValueError, match="Another adapter has the word '<sks>', too"):
        pipe([PROMPT, PROMPT], apt_adapter_names=["a", "b"], **settings)
    assert pipe.tokenizer is tokenizer and pipe.get_list_apt_adapters() == {}
    assert store.bytes_in_memory == sum(store.get(name).num_bytes for name in store.names_in_memory)
    assert store.get("b").word_rows["text_encoder"].shape == (1, 32)


def test_the_server_takes_and_draws_an_adapter_with_words(pipe, tmp_path):
    data = save_with_words(pipe, tmp_path / "made.safetensors", ["<sks>"], 1).read_bytes()
    folder = tmp_path / "served"
    folder.mkdir()
    body = {"size": "16x16", "num_inference_steps": 2, "seed": 1, "response_format": "b64_json"}
    with served(pipe, ServerSettings(adapters=str(folder))) as (address, _):

        def ask(prompt: str, model: str = "base") -> httpx.Response:
            settings = body | {"prompt": prompt, "model": model}
            return httpx.post(f"{address}/v1/images/generations", json=settings, timeout=60)

        def drawn(*words: str) -> bytes:
            picture = base64.b64decode(ask(*words).json()["data"][0]["b64_json"])
            return Image.open(io.BytesIO(picture)).tobytes()

        for name in ("mine", "yours"):
            assert httpx.put(f"{address}/v1/adapters/{name}", content=data, timeout=60).status_code == 201
        told = drawn("a <sks>", "mine:0")
        assert told == drawn("a <sks>", "yours:0")
        assert told != drawn("a <sks>") and told != drawn("a sks", "mine:0")
        both = ask("a <sks>", "mine+yours")
        assert both.status_code == 400
        assert both.json()["error"]["message"].startswith("Two adapters of this picture have the word '<sks>'")
