"""Modular pipelines of diffusers with adapters: per call, in parts, saved and loaded."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import randomize
from support.pipeline_helpers import MASK, PICTURE, differ, make_controlnet
from support.transformer_pipelines import INPUTS

import apt_diffusion as apt

SMALL = apt.APTConfig(num_prompts=6, rank=2)
SIZE = {"height": 16, "width": 16}
BASES = {
    "StableDiffusionXLModularPipeline": "sdxl",
    "StableDiffusion3ModularPipeline": "sd3-tiny",
    "FluxModularPipeline": "flux",
    "Flux2ModularPipeline": "flux2",
    "QwenImageModularPipeline": "qwen-image",
    "ZImageModularPipeline": "z-image",
}


@pytest.fixture
def folder_of(tiny_sdxl_path, tiny_transformer_path):
    """The folder of a whole pipeline, by the name of its modular class."""

    def folder(name):
        return str(tiny_sdxl_path if BASES[name] == "sdxl" else tiny_transformer_path(BASES[name]))

    return folder


def opened(cls, folder, blocks=None):
    """A modular pipeline with its models, without progress bars."""
    pipeline = cls(blocks, str(folder))
    pipeline.load_components(names=[name for name in pipeline.pretrained_component_names if has(folder, name)])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def has(folder, name):
    """Whether the folder holds this component: the default blocks of SDXL name some that few folders have."""
    return (Path(folder) / name).is_dir()


def draw(pipeline, prompt: Any = "a sks glyph", copies=1, base="sdxl", **kwargs):
    """Pictures, each prompt's with the same noise; without a prompt of what `kwargs` hold."""
    count = len(prompt) * copies if isinstance(prompt, list) else copies
    generators = [torch.Generator().manual_seed(index % copies) for index in range(count)]
    settings: dict[str, Any] = SIZE if base == "sdxl" else INPUTS[base]
    accepted = {each.name for each in pipeline.blocks.inputs}
    settings = {name: value for name, value in settings.items() if name in accepted} | kwargs
    if prompt is not None:
        settings["prompt"] = prompt
    if "negative_prompt" in settings and isinstance(prompt, list):  # modular Qwen-Image repeats none
        settings["negative_prompt"] = [settings["negative_prompt"]] * count
    return np.asarray(
        pipeline(generator=generators, num_inference_steps=2, output_type="np", output="images", **settings)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_a_modular_pipeline_takes_adapters_and_settings_of_a_call(name, folder_of, tmp_path):
    """Against the stock class on the same folder."""
    base, folder = BASES[name], folder_of(name)
    stock_class = getattr(diffusers, name)
    cls = apt.apt_pipeline(stock_class)
    assert cls.__name__ == name.replace("Modular", "APTModular") and issubclass(cls, stock_class)
    stock = opened(stock_class, folder)
    expected = draw(stock, base=base)
    pipeline = opened(cls, folder)
    apt.add_apt(pipeline, SMALL, "a")
    assert np.array_equal(draw(pipeline, base=base), expected)
    randomize(pipeline)
    adapted = draw(pipeline, base=base)
    assert np.isfinite(adapted).all() and differ(adapted, expected)
    assert np.array_equal(draw(pipeline, base=base, apt_scale=0.0), expected)
    mixed = draw(pipeline, ["a sks glyph"] * 2, base=base, apt_adapter_names=["a", None])
    assert np.allclose(mixed, np.concatenate([adapted, expected]), atol=1e-4)

    pipeline.save_apt_weights(tmp_path, "a")
    pipeline.unload_apt_weights()
    assert np.array_equal(draw(pipeline, base=base), expected)
    pipeline.load_apt_weights(tmp_path)
    assert np.array_equal(draw(pipeline, base=base), adapted)


@pytest.fixture
def modular(tiny_sdxl_path):
    """A modular SDXL with a trained adapter `a` for the UNet alone."""
    pipeline = opened(apt.apt_pipeline(diffusers.StableDiffusionXLModularPipeline), tiny_sdxl_path)
    apt.add_apt(pipeline.unet, SMALL, "a")
    randomize(pipeline.unet)
    return pipeline


def test_a_single_prompt_is_repeated_for_every_adapter(modular):
    apart = [draw(modular, copies=2, num_images_per_prompt=2, apt_adapter_names=[name]) for name in ("a", None)]
    assert differ(*apart)
    mixed = draw(modular, ["a sks glyph"] * 2, 2, num_images_per_prompt=2, apt_adapter_names=["a", None])
    assert np.allclose(mixed, np.concatenate(apart), atol=1e-4)
    generators = [torch.Generator().manual_seed(index % 2) for index in range(4)]
    repeated = modular(
        prompt="a sks glyph", generator=generators, num_inference_steps=2, output_type="np", output="images",
        num_images_per_prompt=2, apt_adapter_names=["a", None], **SIZE,
    )  # fmt: skip
    assert np.array_equal(repeated, mixed)


def test_blocks_of_ones_own_share_the_models_and_so_the_adapters(modular, tiny_sdxl_path):
    """Text is encoded by one pipeline, the picture drawn by another that has no text encoder."""
    expected = {scale: draw(modular, apt_scale=scale) for scale in (1.0, 0.0)}
    blocks = diffusers.StableDiffusionXLAutoBlocks().get_workflow("text2image")
    reader = diffusers.SequentialPipelineBlocks.from_blocks_dict(
        {"text_encoder": blocks.sub_blocks.pop("text_encoder")}
    ).init_pipeline(str(tiny_sdxl_path))
    reader.update_components(**{name: modular.components[name] for name in reader.pretrained_component_names})
    drawer = type(modular)(blocks, str(tiny_sdxl_path))
    for attach in (lambda: apt.add_apt(drawer, SMALL), lambda: drawer.load_apt_weights(tiny_sdxl_path)):
        with pytest.raises(ValueError, match=r"holds no models yet: load them first, with load_components\(\)"):
            attach()
    for offload in (drawer.enable_group_offload, drawer.enable_sequential_cpu_offload):
        with pytest.raises(NotImplementedError, match="is offloaded by its ComponentsManager"):
            offload()
    drawer.update_components(**{name: modular.components[name] for name in ("unet", "vae", "scheduler")})
    drawer.set_progress_bar_config(disable=True)
    assert drawer.get_active_apt_adapters() == ["a"]
    state = reader(prompt="a sks glyph")
    fields = state.get_by_kwargs("denoiser_input_fields")
    for scale, picture in expected.items():
        assert np.array_equal(draw(drawer, None, apt_scale=scale, **fields), picture)
        assert np.array_equal(draw(drawer, None, apt_scale=scale, state=state), picture)
    with pytest.raises(ValueError, match="apt_adapter_names has 2 names for 1 prompts"):
        draw(drawer, None, 2, apt_adapter_names=["a", None], state=state)


def test_a_stock_modular_pipeline_draws_within_a_context(modular, tiny_sdxl_path):
    """Pipelines whose class is not ours, as `init_pipeline` of blocks makes them."""
    expected = {scale: draw(modular, apt_scale=scale) for scale in (0.5, 0.0)}
    stock = diffusers.StableDiffusionXLAutoBlocks().init_pipeline(str(tiny_sdxl_path))
    stock.update_components(**{name: modular.components[name] for name in stock.pretrained_component_names})
    stock.set_progress_bar_config(disable=True)
    assert apt.get_active_apt_adapters(stock) == ["a"]
    for scale, picture in expected.items():
        with apt.apt_call(stock, scale):
            assert np.array_equal(draw(stock), picture)


def test_adapters_are_saved_and_come_back_with_their_models(modular, tmp_path):
    """The models are loaded in two parts; adapters of what is not there yet wait for it."""
    apt.add_apt(modular.text_encoder, SMALL, "words")
    randomize(modular.text_encoder, 2)
    apt.set_apt_adapters(modular, ["a", "words"], [0.7, 1.0])
    expected, stock = draw(modular), draw(modular, apt_scale=0.0)
    modular.save_pretrained(str(tmp_path), overwrite_modular_index=True)

    plain = opened(diffusers.StableDiffusionXLModularPipeline, tmp_path)
    assert np.array_equal(draw(plain), stock)
    again = type(modular).from_pretrained(tmp_path)
    again.load_components(names=["unet"])
    assert again.get_list_apt_adapters() == {"unet": ["a"]}
    again.load_components(names=[name for name in again.pretrained_component_names if has(tmp_path, name)])
    assert again.get_list_apt_adapters() == {"unet": ["a"], "text_encoder": ["words"]}
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(again), expected)


def test_models_are_loaded_in_float32_whatever_the_files_hold():
    """The stock class takes the files' precision, in which `miniature-sd3` does not draw on a CPU."""
    pipeline = apt.apt_pipeline(diffusers.StableDiffusion3ModularPipeline).from_pretrained("miniature-sd3")
    pipeline.load_components(names=["transformer"])
    assert pipeline.transformer.dtype is torch.float32
    pipeline.load_components(names=["vae"], dtype=torch.bfloat16)
    assert pipeline.vae.dtype is torch.bfloat16


def test_the_folder_of_a_whole_pipeline_gets_the_default_blocks(tiny_sdxl_path, modular):
    again = type(modular).from_pretrained(tiny_sdxl_path)
    assert type(again) is type(modular) and again.unet is None
    assert type(again.blocks) is diffusers.StableDiffusionXLAutoBlocks


@pytest.mark.parametrize("workflow", ["image2image", "inpainting", "controlnet_text2image"])
def test_workflows_beside_text_to_image(workflow, modular, tiny_sdxl_path):
    """The blocks of one workflow of SDXL alone; the adapter of the mixed batch's second picture is off."""
    pipeline = type(modular)(diffusers.StableDiffusionXLAutoBlocks().get_workflow(workflow), str(tiny_sdxl_path))
    present = {name: modular.components.get(name) for name in pipeline.pretrained_component_names}
    if workflow.startswith("controlnet"):
        present["controlnet"] = make_controlnet(modular.unet)
    pipeline.update_components(**{name: part for name, part in present.items() if part is not None})
    pipeline.set_progress_bar_config(disable=True)
    pictures = {"image": PICTURE, "mask_image": MASK, "control_image": PICTURE, "strength": 1.0}
    accepted = {each.name for each in pipeline.blocks.inputs}
    inputs = {name: value for name, value in pictures.items() if name in accepted}
    adapted, base = draw(pipeline, **inputs), draw(pipeline, apt_scale=0.0, **inputs)
    assert np.isfinite(adapted).all() and differ(adapted, base)
    with apt.disable_apt(pipeline):
        assert np.array_equal(draw(pipeline, **inputs), base)
    twice = {name: torch.cat([value] * 2) if torch.is_tensor(value) else value for name, value in inputs.items()}
    mixed = draw(pipeline, ["a sks glyph"] * 2, apt_adapter_names=["a", None], **twice)
    assert np.allclose(mixed, np.concatenate([adapted, base]), atol=1e-4)


def test_tags_and_a_store_name_adapters_of_modular_pipelines(modular, tmp_path):
    full, half, stock = (draw(modular, apt_scale=scale) for scale in (1.0, 0.5, 0.0))
    modular.save_apt_weights(tmp_path / "b", "a")
    modular.apt_prompt_tags = True
    assert np.array_equal(draw(modular, "a sks glyph <apt:a:0.5>"), half)
    modular.unload_apt_weights()
    modular.apt_store = apt.AdapterStore(tmp_path)
    assert np.array_equal(draw(modular, apt_scale={"b": 1.0}), full)
    mixed = draw(modular, ["a sks glyph <apt:b>", "a sks glyph"])
    assert np.allclose(mixed, np.concatenate([full, stock]), atol=1e-4)
    assert modular.get_list_apt_adapters() == {}
