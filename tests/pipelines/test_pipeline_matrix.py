"""Every kind of pipeline with every way to save memory: values are those of the plain pipeline."""

from dataclasses import dataclass
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from conftest import randomize
from safetensors.torch import load_file
from support.pipeline_helpers import KINDS, SMALL, differ, draw, make_pipe

import apt_diffusion as apt
from apt_diffusion.api import cores_of

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@dataclass
class Plain:
    """What a kind of pipeline draws without any of it: bare, and with each of two adapters of different sizes."""

    base: np.ndarray
    files: list[Path]
    pictures: list[np.ndarray]


@pytest.fixture(scope="module")
def plain_of(tiny_sd_path, tiny_sdxl_path, tmp_path_factory):
    known = {}

    def plain(kind):
        if kind not in known:
            pipeline = make_pipe(kind, tiny_sd_path, tiny_sdxl_path)
            known[kind] = plain = Plain(draw(pipeline), [], [])
            for seed in (1, 2):
                apt.add_apt(pipeline, SMALL)
                randomize(pipeline, seed)
                plain.files.append(apt.save_apt_weights(pipeline, tmp_path_factory.mktemp("adapter")))
                plain.pictures.append(draw(pipeline))
                apt.remove_apt(pipeline)
            assert differ(plain.pictures[0], plain.base) and differ(*plain.pictures)
        return known[kind]

    return plain


@pytest.fixture
def make(tiny_sd_path, tiny_sdxl_path):
    return lambda kind: make_pipe(kind, tiny_sd_path, tiny_sdxl_path)


def each_to_disk(pipeline, folder, level):
    """Without the pipeline's own method, adapters and all. A folder for each: equal names would be one file."""
    from diffusers.hooks import apply_group_offloading

    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            disk = str(folder / name)
            apply_group_offloading(part, CPU, CPU, level, offload_to_disk_path=disk, **blocks)


OFFLOADING = {
    "model": lambda pipe, folder: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe, folder: pipe.enable_sequential_cpu_offload(device="cpu"),
    "blocks": lambda pipe, folder: pipe.enable_group_offload(CPU, num_blocks_per_group=1),
    "leaves": lambda pipe, folder: pipe.enable_group_offload(CPU, offload_type="leaf_level"),
    "blocks to disk": lambda pipe, folder: pipe.enable_group_offload(
        CPU, num_blocks_per_group=1, offload_to_disk_path=str(folder)
    ),
    "leaves to disk": lambda pipe, folder: pipe.enable_group_offload(
        CPU, offload_type="leaf_level", offload_to_disk_path=str(folder)
    ),
    "blocks of each part to disk": lambda pipe, folder: each_to_disk(pipe, folder, "block_level"),
    "leaves of each part to disk": lambda pipe, folder: each_to_disk(pipe, folder, "leaf_level"),
}
# diffusers gives parts of different models one file where their names are equal: two text encoders, a ControlNet.
WITH_EQUAL_NAMES = ("blocks to disk", "leaves to disk")
SOME = ("model", "sequential", "leaves")  # for pipelines that have the same parts as another one


def ways_of(kind):
    if kind == "StableDiffusionAPTPipeline":
        return list(OFFLOADING)
    if kind in ("StableDiffusionAPTImg2ImgPipeline", "StableDiffusionAPTInpaintPipeline", "ControlNet"):
        return SOME
    return [way for way in OFFLOADING if way not in WITH_EQUAL_NAMES]


@pytest.mark.parametrize(("kind", "way"), [(kind, way) for kind in KINDS for way in ways_of(kind)])
def test_offloading(make, plain_of, tmp_path, monkeypatch, kind, way):
    """To the CPU itself: weights are on the meta device, or empty, while they are away to CPU or disk."""
    # diffusers asks for "cpu:0" here, which accelerate takes for another device than the "cpu" of buffers.
    offload = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, _, **kwargs: offload(model, CPU, **kwargs))
    plain, pipeline = plain_of(kind), make(kind)
    first, second = plain.files
    apt.load_apt_weights(pipeline, first)
    OFFLOADING[way](pipeline, tmp_path / "offloaded")
    for _ in range(2):
        assert np.allclose(draw(pipeline), plain.pictures[0], atol=1e-5)
    assert_same_file(apt.save_apt_weights(pipeline, tmp_path / "again"), first)
    if kind.startswith("stock") and way == "sequential":
        with pytest.raises(ValueError, match="accelerate has taken the adapter's weights away"):
            apt.load_apt_weights(pipeline, second, hotswap=True)
    else:
        apt.load_apt_weights(pipeline, second, hotswap=True)
        assert np.allclose(draw(pipeline), plain.pictures[1], atol=1e-5)
        assert_same_file(apt.save_apt_weights(pipeline, tmp_path / "swapped"), second)
    apt.remove_apt(pipeline)
    assert np.allclose(draw(pipeline), plain.base, atol=1e-5)
    apt.load_apt_weights(pipeline, first)  # into what is offloaded already
    assert np.allclose(draw(pipeline), plain.pictures[0], atol=1e-5)


def assert_same_file(file, expected):
    tensors, others = load_file(file), load_file(expected)
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[key], value) for key, value in others.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["StableDiffusionAPTPipeline", "StableDiffusionXLAPTPipeline", "ControlNet", "XL ControlNet"]
)
def test_layerwise_casting(make, plain_of, kind, dtype):
    """As with weights that were rounded to eight bits before; the adapter's are not."""
    pipeline, rounded = make(kind), make(kind)
    for each in (pipeline, rounded):
        apt.load_apt_weights(each, plain_of(kind).files[0])
        each.to(dtype)
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    weights = dict(pipeline.unet.named_parameters())
    assert any(p.dtype == torch.float8_e4m3fn for p in weights.values())
    assert {p.dtype for core in cores_of(pipeline) for p in core.parameters()} == {dtype}
    with torch.no_grad():
        for name, parameter in rounded.unet.named_parameters():
            parameter.copy_(weights[name].to(dtype))
    expected = draw(rounded)
    assert np.isfinite(expected).all() and np.allclose(draw(pipeline), expected, atol=1e-5)
    apt.remove_apt(pipeline)
    apt.remove_apt(rounded)
    base = draw(rounded)
    assert differ(base, expected) and np.allclose(draw(pipeline), base, atol=1e-5)
    if dtype == torch.float32:
        apt.load_apt_weights(pipeline, plain_of(kind).files[0])  # into what is stored in eight bits already
        assert {p.dtype for core in cores_of(pipeline.unet) for p in core.parameters()} == {dtype}
        assert np.allclose(draw(pipeline), expected, atol=1e-5)


def test_layerwise_casting_and_group_offloading(make, plain_of):
    """Both on one model, as on a small graphics card."""
    pipeline, plain = make("StableDiffusionXLAPTPipeline"), plain_of("StableDiffusionXLAPTPipeline")
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    expected = draw(pipeline.load_apt_weights(plain.files[0]))
    pipeline.enable_group_offload(CPU, num_blocks_per_group=1)
    assert np.allclose(draw(pipeline), expected, atol=1e-5)
    pipeline.load_apt_weights(plain.files[1], hotswap=True)
    assert differ(draw(pipeline), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("stock")])
def test_every_image_its_own_adapter_whatever_else_is_said(make, plain_of, kind):
    """With texts that are given once for all images, several images per prompt, and no guidance."""
    pipeline = make(kind)
    for name, file in zip("ab", plain_of(kind).files, strict=True):
        pipeline.load_apt_weights(file, name)
    names = ["a", None, "b"]
    texts = {"negative_prompt": "blurred"}
    if "XL" in kind:
        texts |= {"prompt_2": "another text", "negative_prompt_2": "dark"}
    for settings in (texts, texts | {"num_images_per_prompt": 2}, {"guidance_scale": 1.0}):
        alone = []
        for name in names:
            pipeline.set_apt_adapters(name or "a", 1.0 if name else 0.0)
            alone.append(draw(pipeline, **settings))
        assert differ(alone[0], alone[1]) and differ(alone[0], alone[2])
        pipeline.set_apt_adapters(["a", "b"])
        mixed = draw(pipeline, apt_adapter_names=names, **settings)
        assert np.allclose(mixed, np.concatenate(alone), atol=1e-4)


def test_arguments_by_position_are_named_ones(make, plain_of):
    pipeline = make("StableDiffusionXLAPTPipeline").load_apt_weights(plain_of("StableDiffusionXLAPTPipeline").files[0])

    def run(*args, **kwargs):
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        settings = {"num_inference_steps": 2, "generator": generators, "output_type": "np"}
        return pipeline(*args, apt_adapter_names=["default", None], **settings, **kwargs).images

    expected = run(prompt="one", prompt_2="two", height=16, width=16)
    assert np.array_equal(run("one", "two", 16, 16), expected)
    with pytest.raises(TypeError, match="multiple values"):
        run("one", prompt="two", height=16, width=16)


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_a_swap_reaches_what_is_on_disk(make, plain_of, tmp_path, level):
    """Written over nothing in memory, it would be lost when the old weights come back from the file."""
    pipeline, plain = make("StableDiffusionAPTPipeline"), plain_of("StableDiffusionAPTPipeline")
    pipeline.load_apt_weights(plain.files[0])
    each_to_disk(pipeline, tmp_path, level)
    pipeline.load_apt_weights(plain.files[1], hotswap=True)
    assert np.allclose(draw(pipeline), plain.pictures[1], atol=1e-5)


def test_offloaded_blocks_list_an_adapter_that_comes_late(make, plain_of, monkeypatch):
    """With streams, which need an accelerator, diffusers moves what was listed when a group was made, and no more."""
    from diffusers.hooks.group_offloading import ModuleGroup

    listed, make_lists = {}, ModuleGroup._init_cpu_param_dict

    def note(group):
        listed[group] = {p for m in group.modules for p in m.parameters()} | set(group.parameters)
        return make_lists(group)

    monkeypatch.setattr(ModuleGroup, "_init_cpu_param_dict", note)
    unet = make("StableDiffusionAPTPipeline").unet
    unet.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1)
    apt.load_apt_weights({"unet": unet}, plain_of("StableDiffusionAPTPipeline").files[0], components=["unet"])
    registries = [m._diffusers_hook for m in unet.modules() if hasattr(m, "_diffusers_hook")]
    hooks = [hook for r in registries if (hook := r.get_hook("group_offloading"))]
    now = set().union(*(listed[hook.group] for hook in hooks))
    adapters = [p for core in cores_of(unet) for p in core.parameters()]
    assert adapters and all(parameter in now for parameter in adapters)
