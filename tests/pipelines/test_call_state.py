"""Settings of one call and of the pipeline: what a call sets ends with it, what a callback changes stays."""

import threading

import numpy as np
import pytest
import torch
from conftest import draw, randomize
from safetensors.torch import load_file

import apt_diffusion as apt
from apt_diffusion.api import cores_of

SMALL = apt.APTConfig(num_prompts=6, rank=2)


@pytest.fixture
def two(pipe):
    """Two trained adapters of different shape, `a` active."""
    apt.add_apt(pipe, SMALL, "a")
    apt.add_apt(pipe, apt.APTConfig(num_prompts=9, rank=2), "b")
    randomize(pipe)
    pipe.set_apt_adapters("a")
    return pipe


def differ(first, second):
    return np.abs(first - second).max() > 1e-3


def once(action):
    """A `callback_on_step_end` that acts after the first step."""

    def callback(pipeline, step, timestep, tensors):
        if step == 0:
            action(pipeline)
        return {}

    return callback


def test_a_dict_of_weights_means_exactly_these(two):
    """As `set_apt_adapters` would, for this call: not mixed with what is active."""
    two.set_apt_adapters("b", 0.8)
    expected = draw(two)
    two.set_apt_adapters(["a", "b"], [0.2, 0.3])
    both = draw(two)
    assert np.array_equal(draw(two, apt_scale={"b": 0.8}), expected) and differ(both, expected)
    assert np.array_equal(draw(two), both) and two.get_active_apt_adapters() == ["a", "b"]
    two.set_apt_adapters("b", {"unet": {"mid": 0.5}, "text_encoder": 0.0})
    by_block = draw(two)
    two.set_apt_adapters("a")
    assert np.array_equal(draw(two, apt_scale={"b": {"unet": {"mid": 0.5}, "text_encoder": 0.0}}), by_block)


@pytest.mark.parametrize("deleted", ["a", "b"])
@pytest.mark.parametrize(
    "settings", [{}, {"apt_scale": 0.5}, {"apt_scale": {"a": 1.0, "b": 1.0}}, {"apt_adapter_names": ["a", "b"]}]
)
def test_an_adapter_deleted_by_a_callback_stays_deleted(two, deleted, settings):
    left = "b" if deleted == "a" else "a"
    two.set_apt_adapters(left)
    expected = draw(two)
    two.set_apt_adapters(["a", "b"])
    draw(two, callback_on_step_end=once(lambda p: p.delete_apt_adapters(deleted)), **settings)
    assert two.get_list_apt_adapters()["unet"] == [left] and two.get_active_apt_adapters() == [left]
    assert np.array_equal(draw(two), expected)
    two.delete_apt_adapters(left)
    assert np.isfinite(draw(two, apt_scale=0.5)).all()


def test_all_adapters_removed_by_a_callback(two):
    base = draw(two, apt_scale=0.0)
    draw(two, apt_scale=0.5, callback_on_step_end=once(lambda p: p.unload_apt_weights()))
    assert two.get_list_apt_adapters() == {} and np.array_equal(draw(two), base)
    assert not any("apt" in key for key in vars(two.unet))


@pytest.mark.parametrize("settings", [{}, {"apt_scale": 0.5}, {"apt_scale": {"a": 1.0}}])
def test_what_a_callback_sets_acts_at_once_and_stays(two, settings):
    two.set_apt_adapters("b", 0.4)
    two.set_apt_scale(0.7)
    expected = draw(two)
    two.set_apt_adapters("a")
    two.set_apt_scale(1.0)
    unchanged = draw(two, **settings)

    def change(pipeline):
        pipeline.set_apt_adapters("b", 0.4)
        pipeline.set_apt_scale(0.7)
        seen.append({tuple(core.weights.items()) for core in cores_of(pipeline.unet)})
        seen.append({core.scale for core in cores_of(pipeline.unet)})

    seen = []
    changed = draw(two, steps=3, callback_on_step_end=once(change), **settings)
    assert seen == [{(("b", 0.4),)}, {0.7}] and changed.shape == unchanged.shape
    assert np.array_equal(draw(two), expected) and two.get_active_apt_adapters() == ["b"]


def test_switched_off_by_a_callback(two):
    base = draw(two, apt_scale=0.0)
    draw(two, callback_on_step_end=once(lambda p: p.disable_apt()))
    assert np.array_equal(draw(two), base)
    two.enable_apt()
    assert differ(draw(two), base)


def test_loaded_by_a_callback(two, tmp_path):
    file = two.save_apt_weights(tmp_path, "b")
    two.set_apt_adapters("b")
    expected = draw(two)
    two.set_apt_adapters("a")
    draw(two, apt_scale=0.3, callback_on_step_end=once(lambda p: p.load_apt_weights(file, "c")))
    assert two.get_active_apt_adapters() == ["c"] and np.array_equal(draw(two), expected)


def test_an_error_in_a_callback_ends_the_call(two):
    expected = draw(two)

    def fail(pipeline):
        raise OSError("from the callback")

    with pytest.raises(OSError, match="from the callback"):
        draw(two, apt_scale={"b": 1.0}, callback_on_step_end=once(fail))
    assert np.array_equal(draw(two), expected)


def test_a_scale_is_kept_for_adapters_that_come_later(pipe, tmp_path):
    base = draw(pipe)
    apt.add_apt(pipe, SMALL)
    randomize(pipe)
    full = draw(pipe)
    half = draw(pipe, apt_scale=0.5)
    pipe.save_apt_weights(tmp_path)
    pipe.unload_apt_weights()
    pipe.set_apt_scale(0.5)
    assert np.array_equal(draw(pipe), base)
    pipe.load_apt_weights(tmp_path)
    assert np.array_equal(draw(pipe), half)
    pipe.set_apt_scale(1.0)
    assert np.array_equal(draw(pipe), full)
    pipe.set_apt_scale(0.5)
    pipe.delete_apt_adapters("default")
    pipe.load_apt_weights(tmp_path)
    assert np.array_equal(draw(pipe), half)
    pipe.unload_apt_weights()  # the base pipeline again, without settings
    pipe.load_apt_weights(tmp_path)
    assert np.array_equal(draw(pipe), full)


@pytest.mark.parametrize("before", [lambda p: p.set_apt_scale(0.0), lambda p: p.disable_apt()])
def test_settings_reach_adapters_at_other_places(pipe, before):
    """New places have new cores, which must know of the scale and of being off."""
    base = draw(pipe)
    apt.add_apt(pipe, SMALL, "a")
    before(pipe)
    everywhere = apt.APTConfig(num_prompts=6, rank=2, target_modules=["attn1", "attn2"])
    apt.add_apt(pipe, {"unet": everywhere}, "b")
    randomize(pipe)
    pipe.set_apt_adapters(["a", "b"])
    assert np.array_equal(draw(pipe), base)
    pipe.set_apt_scale(1.0)
    pipe.enable_apt()
    assert differ(draw(pipe), base)


def test_a_second_call_at_the_same_time_is_refused(two):
    """Two threads: the first one's scale must neither reach the second nor stay."""
    expected, half = draw(two), draw(two, apt_scale=0.5)
    inside, go_on, errors = threading.Event(), threading.Event(), []

    def wait(pipeline):
        inside.set()
        assert go_on.wait(60)

    def second():
        try:
            draw(two)
        except RuntimeError as error:
            errors.append(str(error))

    pictures = []
    first = threading.Thread(target=lambda: pictures.append(draw(two, apt_scale=0.5, callback_on_step_end=once(wait))))
    first.start()
    assert inside.wait(60)
    thread = threading.Thread(target=second)
    thread.start()
    thread.join(60)
    go_on.set()
    first.join(60)
    assert len(errors) == 1 and "Another call is under way on this UNet2DConditionModel" in errors[0]
    assert np.array_equal(pictures[0], half) and np.array_equal(draw(two), expected)


def test_pipelines_that_share_a_model_share_its_state(two):
    other = apt.StableDiffusionAPTPipeline.from_pipe(two)
    other.set_progress_bar_config(disable=True)
    with pytest.raises(RuntimeError, match="Another call is under way"):
        draw(two, callback_on_step_end=once(lambda p: draw(other)))
    assert np.array_equal(draw(other), draw(two))


def test_a_refused_call_brings_nothing_from_the_store(two, tmp_path):
    from apt_diffusion.serving.store import AdapterStore

    two.save_apt_weights(tmp_path / "c", "b")
    two.apt_store = AdapterStore(tmp_path)
    seen = []

    def second(pipeline):
        with pytest.raises(RuntimeError, match="Another call is under way"):
            draw(pipeline, apt_scale={"c": 1.0})
        seen.append(pipeline.get_list_apt_adapters()["unet"])

    expected = draw(two)
    assert np.array_equal(draw(two, callback_on_step_end=once(second)), expected) and seen == [["a", "b"]]


def test_an_adapter_of_the_store_may_be_deleted_meanwhile(two, tmp_path):
    from apt_diffusion.serving.store import AdapterStore

    two.save_apt_weights(tmp_path / "c", "b")
    two.apt_store = AdapterStore(tmp_path)
    expected = draw(two)
    draw(two, apt_scale={"c": 1.0}, callback_on_step_end=once(lambda p: p.delete_apt_adapters("c")))
    assert two.get_list_apt_adapters()["unet"] == ["a", "b"] and np.array_equal(draw(two), expected)


def test_numpy_numbers_are_saved(two, tmp_path):
    two.set_apt_adapters(["a", "b"], [np.float32(0.5), {"unet": {"mid": np.float64(0.25), "up": [np.float16(0.5)]}}])
    two.set_apt_scale(np.float32(1.0))
    expected = draw(two)
    two.save_pretrained(tmp_path)
    again = apt.StableDiffusionAPTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(again), expected)


def test_numpy_numbers_in_settings(pipe, tmp_path):
    config = apt.APTConfig(num_prompts=np.int64(5), rank=np.int32(2), dropout=np.float32(0.25))
    assert config == apt.APTConfig(num_prompts=5, rank=2, dropout=0.25) == apt.APTConfig.from_json(config.to_json())
    apt.enable_apt_hotswap(pipe, np.int64(8), np.int64(2))
    apt.add_apt(pipe, config)
    pipe.save_apt_weights(tmp_path)
    assert load_file(tmp_path / "pytorch_apt_weights.safetensors")
    with pytest.raises(ValueError, match=r"holds strings only, got \{'steps': 5\}"):
        pipe.save_apt_weights(tmp_path / "more", metadata={"steps": 5})
    assert not (tmp_path / "more" / "pytorch_apt_weights.safetensors").exists()


@pytest.mark.parametrize("scale", [0.0, 0.4, np.float32(0.4)])
def test_the_scale_of_lora_scales_apt(two, scale):
    """diffusers' convention for LoRA, whose users pass it by habit."""
    expected = draw(two, apt_scale=scale)
    assert np.array_equal(draw(two, cross_attention_kwargs={"scale": scale}), expected)
    assert differ(draw(two), expected)
    with pytest.raises(ValueError, match="Both apt_scale and cross_attention_kwargs"):
        draw(two, cross_attention_kwargs={"scale": 0.5}, apt_scale=0.5)


def test_with_a_lora_the_scale_is_the_loras(two, caplog):
    from peft import LoraConfig

    torch.manual_seed(0)
    two.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    without_lora = draw(two, cross_attention_kwargs={"scale": 0.0})
    assert "scales the LoRA here; the APT adapters have apt_scale" in caplog.text
    two.unet.delete_adapters("default")
    assert np.allclose(draw(two), without_lora, atol=1e-5)


def test_arguments_by_position(two):
    expected = draw(two, apt_scale=0.5)
    generator = torch.Generator().manual_seed(0)
    pictures = two("a sks glyph", 16, 16, 2, generator=generator, output_type="np", apt_scale=0.5).images
    assert np.array_equal(pictures, expected)


def test_weights_for_what_has_no_adapter_are_named(two, caplog):
    two.delete_apt_adapters("b")
    apt.add_apt({"unet": two.unet}, SMALL, "only unet")
    two.set_apt_adapters("only unet", {"unet": 0.5, "text_encoder": 0.5})
    assert "Ignoring adapter weights" in caplog.text and "text_encoder" in caplog.text


@pytest.mark.parametrize(
    "name", ["dog-v1.5", "items", "forward", "training", "a/b", "..", "%2E", "", "日本 ✓", "x" * 300]
)
def test_any_string_names_an_adapter(pipe, tmp_path, name):
    from apt_diffusion.serving.store import AdapterStore

    if not name:
        with pytest.raises(ValueError, match="non-empty string"):
            apt.add_apt(pipe, SMALL, name)
        return
    apt.add_apt(pipe, SMALL, name)
    apt.add_apt(pipe, SMALL, "other")
    randomize(pipe)
    pipe.set_apt_adapters(name, 0.5)
    expected = draw(pipe)
    assert pipe.get_list_apt_adapters()["unet"] == [name, "other"]
    assert np.array_equal(draw(pipe, apt_scale={name: 0.5}), expected)
    assert np.allclose(draw(pipe, apt_adapter_names=[name]), expected, atol=1e-5)
    pipe.save_pretrained(tmp_path / "pipe")
    assert not [path for path in tmp_path.iterdir() if path.name != "pipe"]
    again = apt.StableDiffusionAPTPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert again.get_active_apt_adapters() == [name] and np.array_equal(draw(again), expected)
    if "/" not in name and name != ".." and len(name) < 200:
        pipe.save_apt_weights(tmp_path / "store" / name, name)
        pipe.unload_apt_weights()
        pipe.apt_store = AdapterStore(tmp_path / "store")
        assert np.array_equal(draw(pipe, apt_scale={name: 0.5}), expected)
    pipe.apt_store = None
    again.delete_apt_adapters([name, "other"])
    assert again.get_list_apt_adapters() == {}
