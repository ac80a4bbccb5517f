"""The pipelines of diffusers that a denoiser with adapters can stand in, each as `apt_pipeline` makes it."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import randomize
from PIL import Image
from support import transformer_pipelines
from support.pipeline_helpers import MASK, PICTURE, differ, make_controlnet

import apt_diffusion as apt
from apt_diffusion.miniature import resolve_model

SIZE = {"height": 16, "width": 16}
START = {"image": PICTURE, "strength": 1.0}
HOLE = {**START, "mask_image": MASK}
REFERENCE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8))
CONTROL = {"control_image": PICTURE}


def controlnet(pipeline: Any) -> dict[str, Any]:
    """A ControlNet of this pipeline's UNet."""
    return {"controlnet": make_controlnet(pipeline.unet)}


def t2i_adapter(pipeline: Any) -> dict[str, Any]:
    """A T2I-Adapter with the widths of this pipeline's UNet."""
    torch.manual_seed(5)
    widths = list(pipeline.unet.config.block_out_channels)
    widths += widths[-1:] * (4 - len(widths))
    # SDXL's kind is for UNets that halve the picture before the first attention, as the tiny ones do.
    adapter = diffusers.T2IAdapter(3, widths, num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter_xl")
    return {"adapter": adapter.eval()}


def motion(pipeline: Any) -> dict[str, Any]:
    """AnimateDiff's motion modules for this pipeline's UNet."""
    torch.manual_seed(6)
    widths = pipeline.unet.config.block_out_channels
    adapter = diffusers.MotionAdapter(
        block_out_channels=widths, motion_layers_per_block=pipeline.unet.config.layers_per_block,
        motion_norm_num_groups=pipeline.unet.config.norm_num_groups, motion_num_attention_heads=2,
    )  # fmt: skip
    return {"motion_adapter": adapter.eval()}


def part_of(name: str) -> Callable[[Any], dict[str, Any]]:
    """A function of `support/transformer_pipelines.py` by its name."""
    return getattr(transformer_pipelines, name)


@dataclass(frozen=True)
class Row:
    """One pipeline class, what it needs beside the base's parts, and what a call needs beside the prompt."""

    stock: str
    base: str  # "sd", "sdxl", "sd3", or a family of `support/transformer_pipelines.py`
    inputs: dict[str, Any] = field(default_factory=dict)
    parts: Callable[[Any], dict[str, Any]] = lambda pipeline: {}
    films: bool = False  # the denoiser's batch holds frames
    noise_of_batch: bool = False  # part of the noise is drawn for the whole batch, without the generators


ROWS = (
    Row("StableDiffusionPipeline", "sd", SIZE),
    Row("StableDiffusionImg2ImgPipeline", "sd", START),
    Row("StableDiffusionInpaintPipeline", "sd", {**HOLE, **SIZE}),
    Row("StableDiffusionControlNetPipeline", "sd", {"image": PICTURE}, controlnet),
    Row("StableDiffusionControlNetImg2ImgPipeline", "sd", {**START, "control_image": PICTURE}, controlnet),
    Row("StableDiffusionControlNetInpaintPipeline", "sd", {**HOLE, "control_image": PICTURE}, controlnet),
    Row("StableDiffusionAdapterPipeline", "sd", {"image": PICTURE, **SIZE}, t2i_adapter),
    Row("StableDiffusionPAGPipeline", "sd", {**SIZE, "pag_scale": 2.0}),
    Row("StableDiffusionPAGImg2ImgPipeline", "sd", {**START, "pag_scale": 2.0}),
    Row("StableDiffusionControlNetPAGPipeline", "sd", {"image": PICTURE, "pag_scale": 2.0}, controlnet),
    Row("AnimateDiffPipeline", "sd", {**SIZE, "num_frames": 2}, motion, films=True),
    Row("StableDiffusionXLPipeline", "sdxl", SIZE),
    Row("StableDiffusionXLImg2ImgPipeline", "sdxl", START),
    Row("StableDiffusionXLInpaintPipeline", "sdxl", {**HOLE, **SIZE}),
    Row("StableDiffusionXLControlNetPipeline", "sdxl", {"image": PICTURE}, controlnet),
    Row("StableDiffusionXLControlNetImg2ImgPipeline", "sdxl", {**START, "control_image": PICTURE}, controlnet),
    Row("StableDiffusionXLAdapterPipeline", "sdxl", {"image": PICTURE, **SIZE}, t2i_adapter),
    Row("StableDiffusionXLPAGPipeline", "sdxl", {**SIZE, "pag_scale": 2.0}),
    Row("StableDiffusion3Pipeline", "sd3"),
    Row("StableDiffusion3Img2ImgPipeline", "sd3-tiny", START),
    Row("StableDiffusion3ControlNetPipeline", "sd3-tiny", CONTROL, part_of("sd3_controlnet")),
    Row("StableDiffusion3PAGPipeline", "sd3-tiny", {"pag_scale": 2.0}),
    Row("StableDiffusion3PAGImg2ImgPipeline", "sd3-tiny", {**START, "pag_scale": 2.0}),
    Row("StableDiffusion3InpaintPipeline", "sd3-tiny", HOLE),
    Row(
        "StableDiffusion3ControlNetInpaintingPipeline", "sd3-tiny", CONTROL | {"control_mask": MASK},
        part_of("sd3_inpaint_controlnet"), noise_of_batch=True,
    ),
    Row("FluxPipeline", "flux"),
    Row("FluxImg2ImgPipeline", "flux", START),
    Row("FluxInpaintPipeline", "flux", HOLE),
    Row("FluxControlNetPipeline", "flux", CONTROL, part_of("flux_controlnet")),
    Row("FluxControlNetImg2ImgPipeline", "flux", CONTROL | START, part_of("flux_controlnet")),
    Row("FluxControlNetInpaintPipeline", "flux", CONTROL | HOLE, part_of("flux_controlnet")),
    Row("FluxControlPipeline", "flux", CONTROL, part_of("flux_control")),
    Row("FluxControlImg2ImgPipeline", "flux", CONTROL | START, part_of("flux_control")),
    Row("FluxControlInpaintPipeline", "flux", CONTROL | HOLE, part_of("flux_control")),
    Row("FluxFillPipeline", "flux", HOLE, part_of("flux_fill")),
    Row("FluxKontextPipeline", "flux", {"image": PICTURE, "max_area": 256, "_auto_resize": False}),
    Row("FluxKontextInpaintPipeline", "flux", HOLE | {"max_area": 256, "_auto_resize": False}),
    Row("Flux2Pipeline", "flux2"),
    Row("Flux2Pipeline", "flux2", {"image": REFERENCE}),
    Row("Flux2KleinPipeline", "flux2-klein"),
    Row("Flux2KleinPipeline", "flux2-klein", {"image": REFERENCE}),
    Row("Flux2KleinInpaintPipeline", "flux2-klein", HOLE),
    Row("Flux2KleinKVPipeline", "flux2-klein"),
    Row("QwenImagePipeline", "qwen-image"),
    Row("QwenImageImg2ImgPipeline", "qwen-image", START),
    Row("QwenImageInpaintPipeline", "qwen-image", HOLE),
    Row("QwenImageControlNetPipeline", "qwen-image", CONTROL, part_of("qwen_controlnet")),
    Row(
        "QwenImageControlNetInpaintPipeline", "qwen-image", CONTROL | {"control_mask": MASK},
        part_of("qwen_inpaint_controlnet"), noise_of_batch=True,
    ),
    Row("ZImagePipeline", "z-image"),
    Row("ZImageImg2ImgPipeline", "z-image", START),
    Row("ZImageInpaintPipeline", "z-image", HOLE),
    Row("ZImageControlNetPipeline", "z-image", CONTROL, part_of("z_controlnet")),
    Row(
        "ZImageControlNetInpaintPipeline", "z-image", CONTROL | {"image": PICTURE, "mask_image": MASK},
        part_of("z_inpaint_controlnet"),
    ),
    Row("PixArtSigmaPipeline", "pixart-sigma"),
    Row("PixArtSigmaPAGPipeline", "pixart-sigma", {"pag_scale": 2.0}),
    Row("SanaPipeline", "sana"),
    Row("SanaPAGPipeline", "sana", {"pag_scale": 2.0}),
    Row("SanaControlNetPipeline", "sana", CONTROL, part_of("sana_controlnet")),
    Row("SanaSprintPipeline", "sana", {}, part_of("sana_sprint")),
    Row("SanaSprintImg2ImgPipeline", "sana", START, part_of("sana_sprint")),
    Row("ChromaPipeline", "chroma"),
    Row("ChromaImg2ImgPipeline", "chroma", START),
    Row("AuraFlowPipeline", "aura-flow"),
    Row("Lumina2Pipeline", "lumina2"),
    Row("CogView4Pipeline", "cogview4"),
    Row("CogView4ControlPipeline", "cogview4", CONTROL, part_of("cogview4_control"), noise_of_batch=True),
    Row("PixArtAlphaPipeline", "pixart-alpha"),
    Row("WanPipeline", "wan"),
    Row("WanPipeline", "wan-2"),
    Row("LTXPipeline", "ltx"),
)  # fmt: skip


@pytest.fixture
def bases(tiny_sd_path, tiny_sdxl_path, tiny_transformer_path):
    """The folder of a base model, by its name in `ROWS`."""
    folders = {"sd": tiny_sd_path, "sdxl": tiny_sdxl_path, "sd3": resolve_model("miniature-sd3")}
    return lambda base: folders.get(base) or tiny_transformer_path(base)


def draw(pipeline: Any, prompt: Any, row: Row, **kwargs: Any) -> np.ndarray:
    """Pictures, or the pictures of films, with the same noise for each prompt."""
    count = 1 if isinstance(prompt, str) else len(prompt)
    generators = [torch.Generator().manual_seed(0) for _ in range(count)]
    inputs = {
        name: value.expand(count, -1, -1, -1) if isinstance(value, torch.Tensor) else value
        for name, value in row.inputs.items()
    }
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    accepted = inspect.signature(pipeline.__call__).parameters
    settings |= transformer_pipelines.INPUTS.get(row.base, {})
    settings = {name: value for name, value in settings.items() if name in accepted}
    torch.manual_seed(0)  # a ControlNet for inpainting samples latents of the picture without the generator
    result = pipeline(prompt=prompt, generator=generators, **settings, **inputs, **kwargs)
    return np.asarray(result.frames if hasattr(result, "frames") else result.images)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.stock)
def test_a_pipeline_of_diffusers_takes_adapters_and_settings_of_a_call(row, bases):
    """Against the stock class: its picture untrained and at scale 0, and each prompt's own adapter in one batch."""
    stock_class = getattr(diffusers, row.stock)
    base = diffusers.DiffusionPipeline.from_pretrained(bases(row.base), dtype=torch.float32)
    parts = row.parts(base)
    stock = stock_class.from_pipe(base, **parts)
    pipeline = apt.apt_pipeline(stock_class).from_pipe(stock, **parts)
    for each in (stock, pipeline):
        each.set_progress_bar_config(disable=True)
    expected = draw(stock, "a sks glyph", row)
    apt.add_apt(pipeline, apt.APTConfig(num_prompts=6, rank=2), "a")
    assert np.array_equal(draw(pipeline, "a sks glyph", row), expected)
    randomize(pipeline, 1)
    adapted = draw(pipeline, "a sks glyph", row)
    assert np.isfinite(adapted).all() and differ(adapted, expected)
    assert np.array_equal(draw(pipeline, "a sks glyph", row, apt_scale=0.0), expected)
    names = {"apt_adapter_names": ["a", None]}
    if row.films:
        with pytest.raises(ValueError, match="its batch has not one entry per sample"):
            draw(pipeline, ["a sks glyph"] * 2, row, **names)
    else:
        mixed = draw(pipeline, ["a sks glyph"] * 2, row, **names)
        alone = [adapted, expected]
        if row.noise_of_batch:
            alone = [draw(pipeline, ["a sks glyph"] * 2, row, apt_scale=scale) for scale in (1.0, 0.0)]
            alone = [alone[0][:1], alone[1][1:]]
        assert np.allclose(mixed, np.concatenate(alone), atol=1e-4)
    apt.remove_apt(pipeline)
    assert np.array_equal(draw(pipeline, "a sks glyph", row), expected)


@pytest.mark.slow
def test_all_three_texts_are_repeated_and_so_are_the_adapters_of_each_image(bases):
    """Stable Diffusion 3 reads a prompt for each text encoder; each prompt's images stand together in the batch."""
    pipeline = apt.StableDiffusion3APTPipeline.from_pretrained(bases("sd3"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    apt.add_apt(pipeline.transformer, apt.APTConfig(num_prompts=6, rank=2), "a")
    randomize(pipeline.transformer, 1)

    def pictures(count: int, **kwargs: Any) -> np.ndarray:
        generators = [torch.Generator().manual_seed(index % 2) for index in range(count)]
        return pipeline(
            "a red circle", prompt_2="a green star", prompt_3="a blue ring", max_sequence_length=16,
            num_images_per_prompt=2, num_inference_steps=2, generator=generators, output_type="np", **kwargs,
        ).images  # fmt: skip

    apart = [pictures(2, apt_adapter_names=[name]) for name in ("a", None)]
    assert differ(*apart)
    assert np.allclose(pictures(4, apt_adapter_names=["a", None]), np.concatenate(apart), atol=1e-4)


def test_the_page_lists_what_is_tried_here():
    """`docs/pipelines.md` names exactly these classes."""
    page = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
    table = page.split("## What was tried")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+Pipeline)`", table)) == {row.stock for row in ROWS}
