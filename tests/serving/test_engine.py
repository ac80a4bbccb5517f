"""The engine: every picture as if it were drawn alone, whatever is drawn beside it."""

import shutil
import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from conftest import randomize
from PIL import Image
from support.gate import Gate

import apt_diffusion as apt
from apt_diffusion import AdapterStore, StableDiffusion3APTPipeline
from apt_diffusion.pipelines.samplers import make_sampler
from apt_diffusion.serving.engine import Engine
from apt_diffusion.serving.requests import DeadlineExceeded, Draining, ImageRequest, QueueFull

NAMES = ("a", "b", "c")
SIZES = {"a": 6, "b": 9, "c": 6}  # prompts


def fill_store(pipe, folder) -> None:
    for seed, name in enumerate(NAMES):
        apt.add_apt(pipe, apt.APTConfig(num_prompts=SIZES[name], rank=2), name)
        randomize(pipe, seed)
        pipe.save_apt_weights(folder / f"{name}.safetensors", name)
        pipe.unload_apt_weights()


@pytest.fixture
def store(pipe, tmp_path):
    """Three trained adapters on disk, and the pipeline in double precision: pictures must be equal to the last bit."""
    fill_store(pipe, tmp_path)
    pipe.to(torch.float64)
    return AdapterStore(tmp_path)


def alone(pipe, request: ImageRequest, store=None) -> Image.Image:
    """What the pipeline draws for this request."""
    own, pipe.scheduler, pipe.apt_store = pipe.scheduler, make_sampler(pipe.scheduler, request.scheduler or ""), store
    names = ("width", "height", "num_inference_steps", "guidance_scale", "negative_prompt")
    settings = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    weights = {name: weight * request.apt_scale for name, weight in request.adapters.items()}
    generator = torch.Generator().manual_seed(request.seed)
    try:
        return pipe(request.prompt, generator=generator, apt_scale=weights or None, **settings).images[0]
    finally:
        pipe.scheduler, pipe.apt_store = own, None


def same(first: Image.Image, second: Image.Image) -> bool:
    return np.array_equal(np.asarray(first), np.asarray(second))


def small(prompt: str = "a sks glyph", seed: int = 0, steps: int = 3, **settings) -> ImageRequest:
    settings = {"width": 16, "height": 16, "guidance_scale": 3.0} | settings
    return ImageRequest(prompt, seed=seed, num_inference_steps=steps, **settings)


def test_every_picture_is_the_one_that_it_would_be_alone(pipe, store):
    requests = [
        small(steps=8),
        small("a red square", 1, 6, scheduler="Euler", adapters={"a": 1.0}),
        small("a sks glyph", 2, 7, scheduler="DPM++ 2M", adapters={"b": 0.8}, guidance_scale=5.0),
        small("a sks glyph", 3, 5, scheduler="DDIM", adapters={"a": 0.5, "c": -0.7}, negative_prompt="blue"),
        small("two dots", 4, 6, scheduler="Euler a", adapters={"a": 1.0}, apt_scale=0.3),
        small("a sks glyph", 5, 6, adapters={"b": 1.0}, guidance_scale=1.0),
        small("a sks glyph", 6, 4, adapters={"c": 1.0}, width=24, height=32),
        small("a sks glyph", 0, 8, adapters={"a": 1.0}),
    ]
    expected = [alone(pipe, request, store) for request in requests]
    assert not same(expected[0], expected[7])  # the adapters act
    gate = Gate(pipe.unet)
    with Engine(pipe, store, max_pixels=10**6) as engine, gate:
        tickets = [engine.submit(request) for request in requests]
        gate.open()
        pictures = [ticket.result(60) for ticket in tickets]
        statistics = engine.statistics()
    assert [same(a, b) for a, b in zip(expected, pictures, strict=True)] == [True] * len(requests)
    assert statistics["finished"] == len(requests) and max(statistics["batch_sizes"]) > 3
    row_steps = sum(size * passes for size, passes in statistics["batch_sizes"].items())
    assert row_steps == sum(request.num_inference_steps or 0 for request in requests)


def test_flow_models_are_drawn_row_by_row_too(tmp_path):
    pipe = StableDiffusion3APTPipeline.from_pretrained("miniature-sd3").to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    apt.add_apt(pipe, {"transformer": apt.APTConfig(num_prompts=6, rank=2, streams=("query", "text"))}, "a")
    randomize(pipe)
    pipe.save_apt_weights(tmp_path / "a.safetensors", "a")
    pipe.unload_apt_weights()
    store = AdapterStore(tmp_path)
    requests = [
        ImageRequest("a red square", seed=seed, num_inference_steps=steps, guidance_scale=guidance, adapters=adapters)
        for seed, steps, guidance, adapters in ((0, 3, 4.0, {}), (1, 4, 2.0, {"a": 1.0}), (2, 3, 1.0, {"a": 0.5}))
    ]
    expected = [alone(pipe, request, store) for request in requests]
    gate = Gate(pipe.transformer)
    with Engine(pipe, store) as engine, gate:
        tickets = [engine.submit(request) for request in requests]
        gate.open()
        pictures = [ticket.result(60) for ticket in tickets]
        assert max(engine.statistics()["batch_sizes"]) > 1
    assert [same(a, b) for a, b in zip(expected, pictures, strict=True)] == [True] * 3


def test_a_picture_to_start_from(pipe, store):
    from diffusers import StableDiffusionImg2ImgPipeline

    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 24, 3), dtype=np.uint8))
    stock = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    expected = stock(
        "a sks glyph", image=start, strength=0.6, num_inference_steps=5, guidance_scale=3.0, generator=generator
    )
    with Engine(pipe, store) as engine:
        request = ImageRequest(
            "a sks glyph", image=start, strength=0.6, num_inference_steps=5, guidance_scale=3.0, seed=3
        )
        picture = engine.submit(request).result(60)
    assert same(picture, expected.images[0]) and picture.size == (24, 32)


def test_a_short_picture_joins_a_long_one_and_leaves_before_it(pipe, store):
    gate, order = Gate(pipe.unet), []
    with Engine(pipe, store) as engine, gate:
        long = engine.submit(small(steps=60))
        long.add_done_callback(lambda _: order.append("long"))
        gate.wait()  # in its first step
        for seed in range(3):
            short = engine.submit(small(seed=seed, adapters={"a": 1.0}))
            short.add_done_callback(lambda _: order.append("short"))
        gate.open()
        long.result(60)
        engine.drain(60)
        assert max(engine.statistics()["batch_sizes"]) > 1
    assert order == ["short"] * 3 + ["long"]


def test_other_sizes_take_turns(pipe, store):
    """A crowd of one size does not hold up a picture of another: passes of the two alternate."""
    gate, order = Gate(pipe.unet), []
    with Engine(pipe, store, max_pixels=10**6) as engine, gate:
        crowd = [engine.submit(small(seed=seed, steps=40)) for seed in range(6)]
        other = engine.submit(small(width=24, height=24, steps=10))
        for name, tickets in (("crowd", crowd), ("other", [other])):
            for ticket in tickets:
                ticket.add_done_callback(lambda _, name=name: order.append(name))
        gate.open()
        engine.drain(60)
    assert order == ["other"] + ["crowd"] * 6


def test_large_pictures_wait_until_there_is_room(pipe, store):
    with Engine(pipe, store, max_pixels=32 * 32) as engine:
        tickets = [engine.submit(small(seed=seed, width=32, height=16)) for seed in range(4)]
        assert [ticket.result(60).size for ticket in tickets] == [(32, 16)] * 4
        assert max(engine.statistics()["batch_sizes"]) <= 2
        with pytest.raises(ValueError, match="more than the 1024 pixels"):
            engine.submit(small(width=32, height=36))


def test_previews_come_on_the_way(pipe, store):
    previews = []
    with Engine(pipe, store) as engine:
        request = small(steps=10, num_previews=3)
        engine.submit(request, lambda step, steps, picture: previews.append((step, steps, picture.size))).result(60)
        engine.submit(small(steps=10), lambda *preview: previews.append("none was asked for")).result(60)
    assert previews == [(4, 10, (16, 16)), (7, 10, (16, 16))]


def test_a_cancelled_picture_stops_and_its_neighbours_go_on(pipe, store):
    expected = alone(pipe, small(seed=1, steps=30), None)
    seen, gate = threading.Event(), Gate(pipe.unet)
    with Engine(pipe, store, max_batch_size=2) as engine, gate:
        cancelled = engine.submit(small(steps=500, num_previews=8), lambda *_: seen.set())
        other = engine.submit(small(seed=1, steps=30))
        queued = engine.submit(small())
        assert queued.cancel()
        gate.open()  # so that no place was free before
        with pytest.raises(CancelledError):
            queued.result(60)
        assert seen.wait(60) and cancelled.cancel()
        with pytest.raises(CancelledError):
            cancelled.result(60)
        assert same(other.result(60), expected) and not other.cancel()
        statistics = engine.statistics()
    assert (statistics["cancelled"], statistics["finished"], statistics["failed"]) == (2, 1, 0)


def test_after_its_deadline_nothing_is_drawn(pipe, store):
    with Engine(pipe, store, max_batch_size=1) as engine:
        long = engine.submit(small(steps=500))
        late = engine.submit(small(deadline_s=0.05))
        with pytest.raises(DeadlineExceeded, match=r"within 0\.05 s"):
            late.result(60)
        assert not long.done() and long.cancel()


def test_a_full_queue_says_when_to_come_back_and_a_draining_one_finishes(pipe, store):
    gate = Gate(pipe.unet)
    with Engine(pipe, store, max_batch_size=1, max_queue=2) as engine, gate:
        tickets = [engine.submit(small(steps=40))]
        gate.wait()  # until the first one is being drawn
        tickets += [engine.submit(small(seed=seed)) for seed in (1, 2)]
        assert [ticket.position() for ticket in tickets] == [0, 0, 1]
        with pytest.raises(QueueFull, match="2 requests wait") as full:
            engine.submit(small())
        assert full.value.retry_after_s >= 1
        assert not engine.drain(0)
        with pytest.raises(Draining):
            engine.submit(small())
        gate.open()
        assert engine.drain(60) and all(ticket.done() for ticket in tickets)
        assert [ticket.result().size for ticket in tickets] == [(16, 16)] * 3


def test_a_damaged_adapter_fails_only_who_asks_for_it(pipe, store):
    (store.folder / "torn.safetensors").write_bytes((store.folder / "a.safetensors").read_bytes()[:-40])
    expected = alone(pipe, small(adapters={"a": 1.0}), store)
    with Engine(pipe, store) as engine:
        torn, whole = engine.submit(small(adapters={"torn": 1.0})), engine.submit(small(adapters={"a": 1.0}))
        with pytest.raises(ValueError, match="torn"):
            torn.result(60)
        assert same(whole.result(60), expected)


def test_a_row_that_fails_in_a_pass_fails_alone(pipe, store):
    """What one row does to the model is not its neighbours' fault: they are drawn again without it."""
    poison = pipe.encode_prompt("poison", "cpu", 1, False)[0]
    unet = pipe.unet.forward

    def forward(sample, timestep, encoder_hidden_states, **kwargs):
        if any(torch.equal(row, poison[0]) for row in encoder_hidden_states):
            raise RuntimeError("this row is poison")
        return unet(sample, timestep, encoder_hidden_states, **kwargs)

    expected = [alone(pipe, small(seed=seed)) for seed in range(3)]
    pipe.unet.forward = forward
    with Engine(pipe, store) as engine:
        bad = engine.submit(small("poison", guidance_scale=1.0))
        good = [engine.submit(small(seed=seed)) for seed in range(3)]
        with pytest.raises(RuntimeError, match="this row is poison"):
            bad.result(60)
        assert [same(ticket.result(60), picture) for ticket, picture in zip(good, expected, strict=True)] == [True] * 3


def test_adapters_stay_while_there_is_room(pipe, store):
    size = max(sum(t.numel() * t.element_size() for t in store.get(name).tensors.values()) for name in NAMES)
    expected = {name: alone(pipe, small(adapters={name: 1.0}), store) for name in NAMES}
    with Engine(pipe, store, max_device_bytes=2 * size) as engine:
        for name in "aababcca":
            assert same(engine.submit(small(adapters={name: 1.0})).result(60), expected[name])
            assert engine.statistics()["resident_adapters"] <= 2 and engine.statistics()["resident_bytes"] <= 2 * size
        # The store read all three above; a had left when it was asked for at the end.
        assert engine.statistics()["adapters_found"] == {"device": 4, "memory": 4, "disk": 0}
        pictures = [engine.submit(small(adapters={name: 1.0})) for name in "abcabc"]
        assert [same(p.result(60), expected[n]) for p, n in zip(pictures, "abcabc", strict=True)] == [True] * 6
    with Engine(pipe, store, max_device_bytes=10) as engine, pytest.raises(ValueError, match="holds 10 bytes"):
        engine.submit(small(adapters={"a": 1.0})).result(60)


def test_a_changed_file_is_another_adapter_from_the_next_request_on(pipe, store):
    request = small(adapters={"a": 1.0})
    before, after = alone(pipe, request, store), alone(pipe, small(adapters={"c": 1.0}), store)
    with Engine(pipe, store) as engine:
        assert same(engine.submit(request).result(60), before)
        shutil.copy(store.folder / "c.safetensors", store.folder / "new")
        (store.folder / "new").rename(store.folder / "a.safetensors")
        assert same(engine.submit(request).result(60), after)
        (store.folder / "a.safetensors").unlink()
        with pytest.raises(ValueError, match="no adapter 'a'"):
            engine.submit(request)


def test_the_pipeline_is_the_engines_and_comes_back_as_it_was(pipe, store):
    apt.add_apt(pipe, apt.APTConfig(num_prompts=6, rank=2), "own")
    randomize(pipe)
    request = small(adapters={"own": 0.5})
    expected, active = alone(pipe, request), alone(pipe, small())
    with Engine(pipe, store) as engine:
        assert engine.names() == ["a", "b", "c", "own"]
        with pytest.raises(RuntimeError, match="Another call is under way"):
            pipe("a sks glyph")
        assert same(engine.submit(request).result(60), expected)
        engine.submit(small(adapters={"a": 1.0})).result(60)
        assert not same(engine.submit(small()).result(60), active)  # nothing acts that was not asked for
    assert pipe.get_list_apt_adapters() == {"text_encoder": ["own"], "unet": ["own"]}
    assert same(alone(pipe, small()), active) and "forward" not in vars(pipe.unet)


def test_closing_ends_what_is_under_way(pipe, store):
    engine = Engine(pipe, store, max_batch_size=1)
    tickets = [engine.submit(small(steps=500)), engine.submit(small())]
    engine.close()
    for ticket in tickets:
        with pytest.raises(CancelledError):
            ticket.result(1)
    engine.close()  # twice is no error
    with pytest.raises(Draining):
        engine.submit(small())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "x" * 10_001}, "at most 10000 characters"),
        ({"width": 0}, "width must be a whole number from 1"),
        ({"num_inference_steps": 1001}, "from 1 to 1000"),
        ({"num_inference_steps": True}, "whole number"),
        ({"seed": -1}, "seed must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number"),
        ({"guidance_scale": -1}, "from 0 to 100"),
        ({"strength": 0}, "above 0 and at most 1"),
        ({"deadline_s": 0}, "positive"),
        ({"adapters": {"a": "1"}}, "needs a weight"),
        ({"adapters": {str(i): 1.0 for i in range(9)}}, "at most 8"),
        ({"num_previews": 9}, "from 0 to 8"),
    ],
)
def test_a_request_holds_only_what_can_be_meant(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageRequest(**{"prompt": "a sks glyph"} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 15}, "multiples of 4"),
        ({"scheduler": "Karras"}, "no sampler"),
        ({"adapters": {"nobody": 1.0}}, "no adapter 'nobody'"),
        ({"image": Image.new("1", (2**14, 2**13))}, "to start from has more than"),
        ({"steps": 1000}, "draws in at most 999 steps with this sampler, got 1000"),
    ],
)
def test_what_the_model_cannot_draw_is_refused_at_once(pipe, store, settings, message):
    with Engine(pipe, store) as engine:
        with pytest.raises(ValueError, match=message):
            engine.submit(small(**settings))
        assert engine.statistics()["accepted"] == 0


@pytest.mark.parametrize("limit", ["max_batch_size", "max_queue", "max_device_bytes", "max_pixels"])
def test_limits_are_positive(pipe, limit):
    with pytest.raises(ValueError, match=f"{limit} must be at least 1"):
        Engine(pipe, **{limit: 0})
