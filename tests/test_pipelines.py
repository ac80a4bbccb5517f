"""Every pipeline that people use: image to image, inpainting, SDXL, ControlNet, conversions and offloading."""

import accelerate
import numpy as np
import pytest
import torch
from conftest import make_unet, randomize
from safetensors.torch import load_file

import apt_diffusion as apt
from apt_diffusion.attach import cores_of, hidden_apt
from apt_diffusion.files import WEIGHTS_NAME
from apt_diffusion.loaders import APTLoaderMixin

SMALL = apt.APTConfig(num_prompts=6, rank=2, query_source="attn_output", streams=["query", "context"])
CPU = torch.device("cpu")
PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
MASK = torch.ones(1, 1, 16, 16)
MASK[..., :8] = 0

INPUTS = {
    "StableDiffusionAPTPipeline": {"height": 16, "width": 16},
    "StableDiffusionAPTImg2ImgPipeline": {"image": PICTURE, "strength": 1.0},
    "StableDiffusionAPTInpaintPipeline": {
        "image": PICTURE,
        "mask_image": MASK,
        "strength": 1.0,
        "latents": NOISE,
        "height": 16,
        "width": 16,
    },
    "StableDiffusionXLAPTPipeline": {"height": 16, "width": 16},
}


def make_controlnet():
    """Its published form starts at zero; this one acts."""
    from diffusers import ControlNetModel

    torch.manual_seed(4)
    controlnet = ControlNetModel.from_unet(make_unet(), conditioning_embedding_out_channels=(8, 16, 32))
    for module in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(module.weight, std=0.1)
    return controlnet


@pytest.fixture(params=INPUTS)
def any_pipe(request, tiny_sd_path, tiny_sdxl_path):
    cls = getattr(apt, request.param)
    pipeline = cls.from_pretrained(tiny_sdxl_path if "XL" in request.param else tiny_sd_path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompt="a sks glyph", inputs=None, **kwargs):
    """Pictures, with noise that is the same for every image of a batch."""
    inputs = INPUTS[type(pipeline).__name__] if inputs is None else inputs
    count = len(kwargs.get("apt_adapter_names", [0])) * kwargs.get("num_images_per_prompt", 1)
    if "latents" in inputs:
        inputs = inputs | {"latents": inputs["latents"].repeat(count, 1, 1, 1).to(pipeline.vae.dtype)}
    generators = [torch.Generator().manual_seed(0) for _ in range(count)]
    return pipeline(
        prompt,
        num_inference_steps=2,
        generator=generators if count > 1 else generators[0],
        output_type="np",
        **inputs,
        **kwargs,
    ).images


def differ(first, second):
    return np.abs(first - second).max() > 1e-3


def convert(cls, pipeline, **components):
    other = cls.from_pipe(pipeline, **components)
    other.set_progress_bar_config(disable=True)
    return other


def test_adapters_act_scale_save_load_and_leave(any_pipe, tmp_path):
    base = draw(any_pipe)
    apt.add_apt(any_pipe, SMALL)
    assert np.array_equal(draw(any_pipe), base)
    randomize(any_pipe)
    full = draw(any_pipe)
    half = draw(any_pipe, apt_scale=0.5)
    assert differ(full, base) and differ(half, base) and differ(half, full)
    assert np.array_equal(draw(any_pipe, apt_scale=0.0), base)
    parts = {name for name in ("unet", "text_encoder", "text_encoder_2") if name in any_pipe.components}
    assert set(any_pipe.get_list_apt_adapters()) == parts
    for part in parts:
        any_pipe.set_apt_adapters("default", {part: 0.0})
        assert differ(draw(any_pipe), full)
    any_pipe.save_apt_weights(tmp_path)
    any_pipe.unload_apt_weights()
    assert np.array_equal(draw(any_pipe), base) and any_pipe.get_list_apt_adapters() == {}
    any_pipe.load_apt_weights(tmp_path)
    assert np.array_equal(draw(any_pipe), full)


def test_every_image_its_own_adapter(any_pipe):
    names = ["a", None, "b"]
    for name in ("a", "b"):
        apt.add_apt(any_pipe, SMALL, name)
    randomize(any_pipe)
    expected = []
    for name in names:
        any_pipe.set_apt_adapters(name or "a", 1.0 if name else 0.0)
        expected.append(draw(any_pipe)[0])
    any_pipe.set_apt_adapters(["a", "b"])
    mixed = draw(any_pipe, apt_adapter_names=names)
    assert np.allclose(mixed, expected, atol=1e-4) and differ(mixed[0], mixed[2])
    pairs = draw(any_pipe, apt_adapter_names=names, num_images_per_prompt=2)
    assert np.allclose(pairs, np.repeat(expected, 2, axis=0), atol=1e-4)


def test_save_pretrained_brings_adapters_back(any_pipe, tmp_path):
    apt.add_apt(any_pipe, SMALL, "style")
    randomize(any_pipe)
    expected = draw(any_pipe)
    any_pipe.save_pretrained(tmp_path)
    again = type(any_pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.get_active_apt_adapters() == ["style"] and np.array_equal(draw(again), expected)


def test_an_adapter_of_one_pipeline_loads_in_the_others(pipe, tiny_sd_path, tmp_path):
    apt.add_apt(pipe, SMALL)
    randomize(pipe)
    pipe.save_apt_weights(tmp_path)
    for name in ("StableDiffusionAPTImg2ImgPipeline", "StableDiffusionAPTInpaintPipeline"):
        converted = convert(getattr(apt, name), pipe)
        loaded = getattr(apt, name).from_pretrained(tiny_sd_path).load_apt_weights(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert converted.get_active_apt_adapters() == ["default"]
        assert np.array_equal(draw(loaded), draw(converted))
        assert differ(draw(loaded), draw(loaded, apt_scale=0.0))
        back = convert(apt.StableDiffusionAPTPipeline, loaded)
        assert np.array_equal(draw(back), draw(pipe))


def test_an_adapter_of_another_base_is_refused(any_pipe, pipe, tiny_sdxl_path, tmp_path):
    """SD's adapter on SDXL and the other way round: one error, nothing changed."""
    xl = apt.StableDiffusionXLAPTPipeline.from_pretrained(tiny_sdxl_path)
    donor = pipe if "XL" in type(any_pipe).__name__ else xl
    apt.add_apt(donor, SMALL)
    donor.save_apt_weights(tmp_path)
    base = draw(any_pipe)
    with pytest.raises(ValueError, match="made for the base model"):
        any_pipe.load_apt_weights(tmp_path)
    assert any_pipe.get_list_apt_adapters() == {} and np.array_equal(draw(any_pipe), base)


def test_controlnet_keeps_adapters_and_gives_them_back(pipe):
    from diffusers import StableDiffusionControlNetPipeline

    apt.add_apt(pipe, SMALL)
    randomize(pipe)
    text_to_image = draw(pipe)
    controlled = convert(StableDiffusionControlNetPipeline, pipe, controlnet=make_controlnet())
    inputs = {"image": PICTURE}
    with_both = draw(controlled, inputs=inputs)
    with apt.disable_apt(controlled):
        with_control = draw(controlled, inputs=inputs)
    assert differ(with_both, with_control) and differ(with_both, text_to_image)
    assert differ(with_both, draw(controlled, inputs=inputs, controlnet_conditioning_scale=0.0))
    back = convert(apt.StableDiffusionAPTPipeline, controlled)
    assert np.array_equal(draw(back), text_to_image)


def test_any_pipeline_of_diffusers_becomes_one_with_the_mixin(pipe):
    from diffusers import StableDiffusionControlNetPipeline

    class Controlled(APTLoaderMixin, StableDiffusionControlNetPipeline):
        pass

    apt.add_apt(pipe, SMALL, "a")
    randomize(pipe)
    controlled = convert(Controlled, pipe, controlnet=make_controlnet())
    inputs = {"image": PICTURE}
    full, base = draw(controlled, inputs=inputs), draw(controlled, inputs=inputs, apt_scale=0.0)
    assert differ(full, base)
    mixed = draw(controlled, inputs=inputs, apt_adapter_names=["a", None])
    assert np.allclose(mixed, [full[0], base[0]], atol=1e-4)


def test_a_controlnet_is_made_of_an_adapted_unet(pipe):
    from diffusers import ControlNetModel

    apt.add_apt(pipe, SMALL)
    with hidden_apt(pipe.unet):
        controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16, 32))
    assert not list(cores_of(controlnet)) and len(list(cores_of(pipe.unet))) == 8


OFFLOADING = {
    "model": lambda pipe, folder: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe, folder: pipe.enable_sequential_cpu_offload(device="cpu"),
    "blocks": lambda pipe, folder: pipe.enable_group_offload(CPU, num_blocks_per_group=1),
    "blocks to disk": lambda pipe, folder: pipe.enable_group_offload(
        CPU, num_blocks_per_group=1, offload_to_disk_path=str(folder)
    ),
    "leaves": lambda pipe, folder: pipe.enable_group_offload(CPU, offload_type="leaf_level"),
    "leaves to disk": lambda pipe, folder: pipe.enable_group_offload(
        CPU, offload_type="leaf_level", offload_to_disk_path=str(folder)
    ),
}


@pytest.mark.parametrize("kind", OFFLOADING)
@pytest.mark.parametrize("order", ["attached first", "offloaded first"])
def test_offloading(pipe, tmp_path, monkeypatch, kind, order):
    """To the CPU itself: weights are on the meta device, or empty, while they are away to CPU or disk."""
    # diffusers asks for "cpu:0" here, which accelerate takes for another device than the "cpu" of buffers.
    offload = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, _, **kwargs: offload(model, CPU, **kwargs))
    base = draw(pipe)
    apt.add_apt(pipe, SMALL)
    randomize(pipe)
    expected = draw(pipe)
    pipe.save_apt_weights(tmp_path / "adapter")
    if order == "offloaded first":
        pipe.unload_apt_weights()
    OFFLOADING[kind](pipe, tmp_path / "offloaded")
    if order == "offloaded first":
        assert np.array_equal(draw(pipe), base)
        pipe.load_apt_weights(tmp_path / "adapter")
    assert np.array_equal(draw(pipe), expected) and np.array_equal(draw(pipe), expected)
    pipe.save_apt_weights(tmp_path / "again")
    first, second = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("adapter", "again"))
    assert first.keys() == second.keys() and all(torch.equal(second[key], value) for key, value in first.items())
    pipe.unload_apt_weights()
    assert np.array_equal(draw(pipe), base)


def test_what_an_adapter_folds_to_goes_where_the_activations_are():
    unet = make_unet()
    apt.add_apt(unet, SMALL)
    core = next(cores_of(unet))
    states = torch.empty(2, 3, core.hidden_size, device="meta")
    assert core._fold("default", 1.0, states).keys.device == states.device
    assert core._stack(["default"] * 2, states).values.device == states.device


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(any_pipe, tmp_path, dtype):
    apt.add_apt(any_pipe, SMALL)
    randomize(any_pipe)
    expected = draw(any_pipe, apt_scale=0.2)  # the tiny SDXL's states exceed float16 at full strength
    any_pipe.save_apt_weights(tmp_path)
    any_pipe.unload_apt_weights()
    any_pipe.to(dtype)
    base = draw(any_pipe)
    any_pipe.load_apt_weights(tmp_path)
    assert {p.dtype for core in cores_of(any_pipe) for p in core.parameters()} == {dtype}
    picture = draw(any_pipe, apt_scale=0.2)
    assert np.isfinite(picture).all() and np.abs(picture - expected).mean() < 0.1
    assert differ(picture, base) and np.array_equal(draw(any_pipe, apt_scale=0.0), base)


def test_an_adapter_loads_into_a_unet_stored_in_eight_bits(pipe, tmp_path):
    apt.add_apt(pipe, SMALL)
    randomize(pipe)
    pipe.save_apt_weights(tmp_path)
    pipe.unload_apt_weights()
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    base = draw(pipe)
    pipe.load_apt_weights(tmp_path)
    assert {p.dtype for core in cores_of(pipe.unet) for p in core.parameters()} == {torch.float32}
    assert differ(draw(pipe), base)
    pipe.unload_apt_weights()
    assert np.array_equal(draw(pipe), base)
