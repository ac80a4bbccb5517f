"""New words where many adapters share one pipeline: each picture reads its own adapters' words, and no other's."""

import base64
import io
import json
import re

import httpx
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.gate import Gate
from support.new_words import save_with_words
from support.server import served

from apt_diffusion import AdapterStore, StableDiffusion3APTPipeline, StableDiffusionXLAPTPipeline
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


def same(first, second) -> bool:
    return np.array_equal(np.asarray(first), np.asarray(second))


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
    ]
    expected = [alone(pipe, one, store.folder) for one in wanted]
    assert len({picture.tobytes() for picture in expected}) == 6  # words and adapters act
    gate = Gate(pipe.unet)
    with Engine(pipe, store) as engine, gate:
        tickets = [engine.submit(one) for one in wanted]
        gate.open()
        pictures = [ticket.result(60) for ticket in tickets]
        assert max(engine.statistics()["batch_sizes"]) > 1
        again = engine.submit(wanted[1]).result(60)
        untold = engine.submit(request()).result(60)
    assert [same(*both) for both in zip(expected, pictures, strict=True)] == [True] * 6
    assert same(again, expected[1]) and same(untold, expected[0])
    assert pipe.tokenizer is tokenizer and words_of(pipe.text_encoder) is None
    assert state_of(pipe.text_encoder) == before


def test_a_word_that_two_adapters_of_a_picture_have_is_refused(pipe, store):
    with Engine(pipe, store) as engine:
        with pytest.raises(ValueError, match=r"Two of the adapters have the word '<sks>': ask for one of them"):
            engine.submit(request("ab")).result(60)
        assert engine.submit(request("ad")).result(60).size == (16, 16)  # nothing is left of the refused one


def test_a_picture_that_starts_from_another_reads_its_words(pipe, store):
    start = Image.new("RGB", (16, 16), "red")
    pipe.load_apt_weights(store.get("b"), "b")
    pipe.set_apt_adapters("b", 0.8)
    sibling = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    expected = sibling(
        PROMPT, image=start, strength=1.0, num_inference_steps=3, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    pipe.unload_apt_weights()
    with Engine(pipe, store) as engine:
        assert same(expected, engine.submit(request("b", image=start, strength=1.0)).result(60))
        assert not same(expected, engine.submit(request("b", "a glyph", image=start, strength=1.0)).result(60))


def test_words_of_the_pipelines_own_adapters_are_theirs_alone(pipe, store, tmp_path):
    save_with_words(pipe, tmp_path / "same.safetensors", ["<mine>"], 7)
    save_with_words(pipe, tmp_path / "own.safetensors", ["<mine>"], 8)
    wanted = [
        request(prompt="a <mine> beside <sks>", adapters={"own": 0.8, "b": 0.8}),
        request(prompt="a <mine>", adapters={"same": 0.8}),
        request(prompt="a <mine>"),
    ]
    expected = [alone(pipe, one, tmp_path) for one in wanted]
    pipe.load_apt_weights(tmp_path / "own.safetensors", "own")
    tokenizer, before = pipe.tokenizer, state_of(pipe.text_encoder)
    with Engine(pipe, store) as engine:
        pictures = [ticket.result(60) for ticket in [engine.submit(one) for one in wanted]]
        with pytest.raises(ValueError, match="Two of the adapters have the word '<mine>'"):
            engine.submit(request(adapters={"own": 1.0, "same": 1.0})).result(60)
    assert [same(*both) for both in zip(expected, pictures, strict=True)] == [True] * 3
    assert list(words_of(pipe.text_encoder).names) == ["own"]
    assert pipe.tokenizer is tokenizer and state_of(pipe.text_encoder) == before


def test_words_that_do_not_fit_are_refused_before_anything_is_attached(pipe, store, tmp_path):
    tensors = load_file(tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", framework="pt") as content:
        metadata = content.metadata()
    cases = {
        "wide": ({"text_encoder.apt_words": torch.zeros(1, 33)}, {}, "The new words do not fit"),
        "part": ({}, {"apt_words": '["<sks>_1"]'}, "To diffusers '<sks>_1' is a part of another word"),
        "many": ({}, {"apt_words": json.dumps([f"<{index}>" for index in range(1001)])}, "has more than 1000 words"),
        "long": ({}, {"apt_words": json.dumps(["x" * 10**6])}, "or one of more than 100 characters"),
    }
    with Engine(pipe, store) as engine:
        for name, (other_tensors, other_metadata, message) in cases.items():
            save_file(tensors | other_tensors, tmp_path / f"{name}.safetensors", metadata | other_metadata)
            with pytest.raises(ValueError, match=re.escape(message)) as error:
                engine.submit(request(adapters={name: 1.0})).result(60)
            assert len(str(error.value)) < 500
        assert engine.statistics()["resident_adapters"] == 0
        engine.check_adapter(store.get("b"))


def test_prompts_are_read_rightly_while_the_words_of_another_adapter_are_checked(pipe, store, tmp_path):
    save_with_words(pipe, tmp_path / "many.safetensors", [f"<w{index}>" for index in range(300)], 9)
    wanted = [request("b", PROMPT, seed=seed, num_inference_steps=1) for seed in range(24)]
    expected = [alone(pipe, one, tmp_path) for one in wanted]
    with Engine(pipe, store) as engine:
        tickets = []
        for one in wanted:
            tickets.append(engine.submit(one))
            engine.check_adapter(store.get("many"))
        pictures = [ticket.result(60) for ticket in tickets]
    assert [same(*both) for both in zip(expected, pictures, strict=True)] == [True] * len(wanted)


def test_tokenizers_that_are_not_kept_are_taught_again(pipe, store, monkeypatch):
    monkeypatch.setattr("apt_diffusion.serving.vocabulary.MAX_TAUGHT", 1)
    wanted = [request("a"), request("b"), request("a"), request("c", "an <odd>")]
    expected = [alone(pipe, one, store.folder) for one in wanted]
    with Engine(pipe, store) as engine:
        pictures = [engine.submit(one).result(60) for one in wanted]
    assert [same(*both) for both in zip(expected, pictures, strict=True)] == [True] * 4


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_all_text_encoders_of_clip_know_the_words(tiny_sdxl_path, tmp_path, kind):
    if kind == "sdxl":
        pipe = StableDiffusionXLAPTPipeline.from_pretrained(tiny_sdxl_path)
        text = getattr(pipe.text_encoder_2, "text_model", pipe.text_encoder_2)
        text.eos_token_id = 2  # as in SDXL's files: the token of the highest id is pooled
    else:
        pipe = StableDiffusion3APTPipeline.from_pretrained("miniature-sd3")
    pipe.set_progress_bar_config(disable=True)
    for seed, name in enumerate("ab"):
        save_with_words(pipe, tmp_path / f"{name}.safetensors", WORDS[name], seed)
    pipe.to(torch.float64)
    before = state_of(pipe.text_encoder_2)
    wanted = [request("a"), request("b"), request()]
    expected = [alone(pipe, one, tmp_path) for one in wanted]
    with Engine(pipe, AdapterStore(tmp_path)) as engine:
        pictures = [ticket.result(60) for ticket in [engine.submit(one) for one in wanted]]
    assert [same(*both) for both in zip(expected, pictures, strict=True)] == [True] * 3
    assert state_of(pipe.text_encoder_2) == before


def test_a_pipeline_with_a_store_knows_the_words_for_one_call(pipe, store):
    tokenizer = pipe.tokenizer
    wanted = request("b")
    expected = alone(pipe, wanted, store.folder)
    pipe.apt_store = store
    settings = {"width": 16, "height": 16, "num_inference_steps": 3, "guidance_scale": 3.0}
    generator = torch.Generator().manual_seed(5)
    picture = pipe(PROMPT, generator=generator, apt_scale={"b": 0.8}, **settings).images[0]
    assert same(picture, expected)
    assert pipe.tokenizer is tokenizer and words_of(pipe.text_encoder) is None
    with pytest.raises(ValueError, match="Two of the adapters have the word '<sks>': ask for one"):
        pipe([PROMPT, PROMPT], apt_adapter_names=["a", "b"], **settings)
    assert pipe.tokenizer is tokenizer and pipe.get_list_apt_adapters() == {}
    files = [store.folder / f"{name}.safetensors" for name in store.names_in_memory]
    assert store.bytes_in_memory == sum(tensor.nbytes for file in files for tensor in load_file(file).values())


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
        assert both.json()["error"]["message"].startswith("Two of the adapters have the word '<sks>'")
