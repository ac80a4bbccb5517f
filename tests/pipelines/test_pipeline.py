"""The pipelines: what diffusers' own LoRA tests demand of an adapter, with our method names."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw, randomize

import apt_diffusion as apt

ROOT = Path(__file__).parents[2]
SMALL = apt.APTConfig(num_prompts=6, rank=2)


@pytest.fixture
def two(pipe):
    """A pipeline with two trained adapters, both active."""
    apt.add_apt(pipe, SMALL, "a")
    apt.add_apt(pipe, apt.APTConfig(num_prompts=9, rank=2), "b")
    randomize(pipe)
    pipe.set_apt_adapters(["a", "b"])
    return pipe


def differ(first, second):
    return np.abs(first - second).max() > 1e-3


def test_untrained_adapter_changes_no_pixel(pipe):
    before = draw(pipe)
    apt.add_apt(pipe, SMALL)
    assert np.array_equal(draw(pipe), before)


def test_each_component_acts_and_scale_is_for_one_call(pipe):
    base = draw(pipe)
    for part in ("unet", "text_encoder"):
        apt.add_apt({part: getattr(pipe, part)}, SMALL)
        randomize(pipe)
        assert differ(draw(pipe), base)
        assert pipe.get_list_apt_adapters() == {part: ["default"]}
        pipe.unload_apt_weights()
    apt.add_apt(pipe, SMALL)
    randomize(pipe)
    full = draw(pipe)
    half = draw(pipe, apt_scale=0.5)
    assert differ(half, full) and differ(half, base)
    assert np.array_equal(draw(pipe, apt_scale=0.0), base)
    assert np.array_equal(draw(pipe), full)
    pipe.set_apt_adapters("default", 0.5)
    assert np.allclose(draw(pipe), half, atol=1e-5)
    assert np.allclose(draw(pipe, apt_scale={"default": 1.0}), full, atol=1e-5)
    with pipe.disable_apt():
        assert np.array_equal(draw(pipe), base)
    pipe.unload_apt_weights()
    assert np.array_equal(draw(pipe), base) and pipe.get_list_apt_adapters() == {}
    with pytest.raises(ValueError, match=r"\['zzz'\] not in the list"):
        draw(pipe, apt_scale={"zzz": 1.0})


def test_numbers_of_numpy_are_numbers(two):
    expected = draw(two, apt_scale=0.5)
    for half in (np.float64(0.5), np.float32(0.5), np.float16(0.5)):
        assert np.array_equal(draw(two, apt_scale=half), expected)
        assert np.array_equal(draw(two, apt_scale={"a": half, "b": half}), expected)
    assert np.array_equal(draw(two, apt_scale=np.int64(1)), draw(two))


def test_several_adapters(two):
    both = draw(two)
    assert two.get_active_apt_adapters() == ["a", "b"]
    two.set_apt_adapters("a")
    only_a = draw(two)
    two.set_apt_adapters("b")
    only_b = draw(two)
    two.set_apt_adapters(["a", "b"], [0.5, 0.6])
    weighted = draw(two)
    assert all(differ(x, y) for x, y in [(both, only_a), (only_a, only_b), (weighted, both)])
    two.delete_apt_adapters("a")
    two.set_apt_adapters("b")
    assert np.array_equal(draw(two), only_b)
    with pytest.raises(ValueError, match="not in the list"):
        two.delete_apt_adapters(["b", "a"])
    assert two.get_list_apt_adapters() == {"unet": ["b"], "text_encoder": ["b"]}


def test_weights_by_block(two):
    two.set_apt_adapters("a")
    full = draw(two)
    pictures = []
    for weights in (
        {"unet": 0.0},
        {"unet": {"down": 0.0}},
        {"unet": {"mid": 0.0}, "text_encoder": 0.5},
        {"unet": {"up": {"block_0": [0.0, 0.5]}}},
        {"unet": {"down": {"block_1": 0.3}, "up": 0.2}},
    ):
        two.set_apt_adapters("a", weights)
        pictures.append(draw(two))
    assert all(differ(picture, full) for picture in pictures)
    assert all(differ(x, y) for i, x in enumerate(pictures) for y in pictures[:i])
    before = draw(two)
    for bad, message in (
        ({"unet": {"up": {"block_0": [1.0] * 3}}}, "has 2 transformers, but 3"),
        ({"unet": {"up": {"block_7": 1.0}}}, "block_7"),
        ({"unet": {"side": 1.0}}, "side"),
        ({"unet": "x"}, "finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            two.set_apt_adapters("a", bad)
    assert np.array_equal(draw(two), before)


def test_every_image_its_own_adapter(two):
    def noise(count):
        return torch.randn(count, 4, 2, 2, generator=torch.Generator().manual_seed(0))

    def alone(name, index):
        two.set_apt_adapters(name or "a", 1.0 if name else 0.0)
        return draw(two, latents=noise(3)[index : index + 1])[0]

    names = ["a", None, "b"]
    expected = [alone(name, index) for index, name in enumerate(names)]
    two.set_apt_adapters(["a", "b"])
    mixed = draw(two, apt_adapter_names=names, latents=noise(3))
    for picture, target in zip(mixed, expected, strict=True):
        assert np.allclose(picture, target, atol=1e-4)
    assert differ(mixed[0], mixed[1])
    pairs = draw(two, ["a sks glyph"] * 2, apt_adapter_names=["a", "b"], num_images_per_prompt=2)
    assert len(pairs) == 4
    with pytest.raises(ValueError, match="3 names for 2 prompts"):
        draw(two, ["one", "two"], apt_adapter_names=names)
    with pytest.raises(ValueError, match="zzz"):
        draw(two, apt_adapter_names=["zzz"])
    for no_list in ([], "a"):
        with pytest.raises(ValueError, match="apt_adapter_names must be a list with one name per prompt"):
            draw(two, apt_adapter_names=no_list)


def test_save_and_load(two, tmp_path, tiny_sd_path):
    two.set_apt_adapters("a")
    expected = draw(two)
    file = two.save_apt_weights(tmp_path, "a")
    for source in (tmp_path, str(file)):
        two.unload_apt_weights()
        assert two.load_apt_weights(source) is two
        assert np.array_equal(draw(two), expected)


def test_save_pretrained_brings_the_adapters_back(two, tmp_path, tiny_sd_path):
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    two.set_apt_adapters(["a", "b"], [0.7, {"unet": {"mid": 0.5}}])
    expected = draw(two)
    two.save_pretrained(tmp_path)
    again = apt.StableDiffusionAPTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(again), expected)
    assert again.get_active_apt_adapters() == ["a", "b"]
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is StableDiffusionPipeline
    stock.set_progress_bar_config(disable=True)
    with two.disable_apt():
        assert np.array_equal(draw(stock), draw(two))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"a": null}', b'{"a": {}}'])
def test_a_damaged_index_of_adapters_is_named(two, tmp_path, content):
    two.save_pretrained(tmp_path)
    (tmp_path / "apt_adapters.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"apt_adapters.json is damaged .*without it"):
        apt.StableDiffusionAPTPipeline.from_pretrained(tmp_path)


def test_a_base_saved_over_an_adapted_pipeline_is_the_base(two, tmp_path):
    two.save_pretrained(tmp_path)
    two.unload_apt_weights()
    two.save_pretrained(tmp_path)
    assert apt.StableDiffusionAPTPipeline.from_pretrained(tmp_path).get_list_apt_adapters() == {}


def test_custom_pipeline(tiny_sd_path, pipe):
    from diffusers import DiffusionPipeline

    custom = DiffusionPipeline.from_pretrained(
        str(tiny_sd_path), custom_pipeline=str(ROOT / "pipelines" / "stable_diffusion_apt.py"), trust_remote_code=True
    )
    assert type(custom).__name__ == "StableDiffusionAPTPipeline"
    custom.set_progress_bar_config(disable=True)
    apt.add_apt(custom, SMALL)
    assert np.array_equal(draw(custom, apt_scale=0.5), draw(pipe))


def test_custom_pipeline_by_a_path_from_the_checkout(two, tmp_path, monkeypatch):
    """The line of the README; adapters saved beside the pipeline are one more line away, as on any stock pipeline."""
    from diffusers import DiffusionPipeline

    apt.add_apt(two, SMALL)
    randomize(two, seed=3)
    expected = draw(two)
    two.save_pretrained(tmp_path)
    monkeypatch.chdir(ROOT)
    custom = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline="pipelines/stable_diffusion_apt.py", trust_remote_code=True
    )
    custom.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(custom.load_apt_weights(tmp_path)), expected)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    apt.load_apt_weights(stock, tmp_path)
    assert np.array_equal(draw(stock), expected)


def test_bad_input_where_lora_says_nothing(pipe, two, tmp_path, caplog):
    """A misspelt argument, a weight for a part that has no adapters, steering without adapters: features 3b."""
    with pytest.raises(TypeError, match="adapter_nmae"):
        pipe.load_apt_weights(tmp_path, adapter_nmae="x")
    with pytest.raises(TypeError, match="apt_scalee"):
        draw(pipe, apt_scalee=0.5)
    two.set_apt_adapters("a", {"unet": 0.5, "vae": 2.0})
    assert "Ignoring adapter weights of components that carry no adapters: ['vae']" in caplog.text


def test_a_pipeline_without_adapters_can_be_steered(pipe):
    base = draw(pipe)
    pipe.unload_apt_weights()
    pipe.unload_apt_weights()
    pipe.disable_apt()
    pipe.enable_apt()
    pipe.set_apt_scale(0.5)
    assert pipe.get_active_apt_adapters() == [] and pipe.get_list_apt_adapters() == {}
    assert np.array_equal(draw(pipe, apt_scale=0.3), base)
    with pytest.raises(ValueError, match="not in the list of present adapters"):
        pipe.delete_apt_adapters("a")


def test_an_adapter_of_one_part_loads_without_noise(pipe, tmp_path, caplog, recwarn):
    """A LoRA of the UNet alone warns of the text encoder that it has nothing for, on every load."""
    apt.add_apt({"unet": pipe.unet}, SMALL)
    pipe.save_apt_weights(tmp_path)
    pipe.unload_apt_weights()
    pipe.load_apt_weights(tmp_path)
    assert not caplog.records and not [w for w in recwarn if "apt" in str(w.filename)]


def test_signature_names_the_stock_arguments_and_ours():
    parameters = inspect.signature(apt.StableDiffusionAPTPipeline.__call__).parameters
    assert {"prompt", "negative_prompt", "callback_on_step_end", "apt_scale", "apt_adapter_names"} <= set(parameters)


def test_from_pipe_keeps_adapters(two, tmp_path):
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for cls, extra in (
        (apt.StableDiffusionAPTImg2ImgPipeline, {}),
        (apt.StableDiffusionAPTInpaintPipeline, {"mask_image": torch.ones(1, 1, 16, 16)}),
    ):
        other = cls.from_pipe(two)
        other.set_progress_bar_config(disable=True)
        assert other.get_active_apt_adapters() == ["a", "b"]

        def run(other=other, extra=extra, **kwargs):
            generator = torch.Generator().manual_seed(0)
            return other(
                "a sks glyph", image=picture, strength=1.0, num_inference_steps=2, generator=generator,
                output_type="np", **extra, **kwargs,
            ).images  # fmt: skip

        assert differ(run(), run(apt_scale=0.0))


@pytest.mark.parametrize("order", ["lora_first", "apt_first"])
def test_lora_and_apt_do_not_disturb_each_other(pipe, order, tmp_path):
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    donor = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    donor.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(donor.unet))
    donor.unload_lora_weights()
    base = draw(pipe)

    def load_lora():
        pipe.load_lora_weights(tmp_path)

    def load_apt():
        apt.add_apt(pipe, SMALL)
        randomize(pipe)

    for step in (load_lora, load_apt) if order == "lora_first" else (load_apt, load_lora):
        step()
    both = draw(pipe)
    with pipe.disable_apt():
        lora = draw(pipe)
    assert differ(both, lora) and differ(lora, base)
    assert all(p.requires_grad for n, p in pipe.unet.named_parameters() if ".apt." in n)
    pipe.unload_lora_weights()
    only_apt = draw(pipe)
    pipe.unload_apt_weights()
    assert differ(only_apt, both) and np.allclose(draw(pipe), base, atol=1e-5)


def test_a_lora_that_fails_to_load_freezes_nothing(two):
    def trainable():
        return [p.requires_grad for part in (two.unet, two.text_encoder) for n, p in part.named_parameters()
                if ".apt." in n]  # fmt: skip

    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q.lora_{}.weight"
    broken = {layer.format("A"): torch.zeros(2, 7), layer.format("B"): torch.zeros(64, 2)}  # its input has 64 channels
    assert all(trainable())
    with pytest.raises(RuntimeError, match="size mismatch"):
        two.load_lora_weights(broken)
    assert all(trainable())


def test_apt_survives_what_replaces_processors(two):
    expected = draw(two)
    two.enable_attention_slicing(1)
    assert np.allclose(draw(two), expected, atol=1e-4)
    two.disable_attention_slicing()
    two.unet.set_default_attn_processor()
    assert np.allclose(draw(two), expected, atol=1e-4)
    two.unet.fuse_qkv_projections()
    assert np.allclose(draw(two), expected, atol=1e-4)
    two.unet.unfuse_qkv_projections()
    assert np.allclose(draw(two), expected, atol=1e-4)


def test_processor_gives_the_numbers_of_the_hook(two):
    expected = draw(two)
    processors = {}
    for name, inner in two.unet.attn_processors.items():
        module = two.unet.get_submodule(name.removesuffix(".processor"))
        core = module._modules.pop("apt", None)
        if core is None:
            processors[name] = inner
            continue
        module._forward_hooks.clear()
        processors[name] = apt.APTAttnProcessor(core, inner)
    two.unet.set_attn_processor(processors)
    assert np.allclose(draw(two), expected, atol=1e-6)
    two.set_apt_adapters("a")
    assert differ(draw(two), expected)


def test_half_precision(two):
    expected = draw(two)
    two.to(torch.bfloat16)
    picture = draw(two)
    assert np.isfinite(picture).all() and np.abs(picture - expected).mean() < 0.1


def test_miniature_is_a_name():
    from apt_diffusion.miniature import resolve_model

    assert Path(resolve_model("miniature")).name == "stable_diffusion"
    assert resolve_model("someone/model") == "someone/model"
