"""What every diffusers pipeline promises, with adapters attached, after the list of diffusers' own tests."""

import numpy as np
import pytest
import torch
from conftest import draw, randomize

import apt_diffusion as apt

SMALL = apt.APTConfig(num_prompts=6, rank=2, query_source="attn_output", streams=["query", "context"])


@pytest.fixture
def adapted(pipe):
    apt.add_apt(pipe, SMALL)
    randomize(pipe)
    return pipe


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def test_a_picture_does_not_depend_on_its_batch(adapted):
    prompts = ["a sks glyph", "a dog", "a longer prompt about a glyph"]
    together = draw(adapted, prompts, latents=noise(3))
    for index, prompt in enumerate(prompts):
        assert np.allclose(draw(adapted, prompt, latents=noise(3)[index : index + 1])[0], together[index], atol=1e-4)


def test_several_images_per_prompt(adapted):
    images = draw(adapted, ["one", "two"], num_images_per_prompt=2, latents=noise(4))
    repeated = draw(adapted, ["one", "one", "two", "two"], latents=noise(4))
    assert images.shape == (4, 16, 16, 3) and np.allclose(images, repeated, atol=1e-4)


def test_embeddings_stand_for_their_prompt(adapted):
    expected = draw(adapted, negative_prompt="blurred")
    embeddings = adapted.encode_prompt("a sks glyph", "cpu", 1, True, negative_prompt="blurred")
    images = draw(adapted, None, prompt_embeds=embeddings[0], negative_prompt_embeds=embeddings[1])
    assert np.allclose(images, expected, atol=1e-5)
    with adapted.disable_apt():
        plain = adapted.encode_prompt("a sks glyph", "cpu", 1, False)[0]
    assert (plain - embeddings[0]).abs().max() > 1e-3


def test_guidance_off_tuple_output_and_callback(adapted):
    seen = []

    def note(pipeline, step, timestep, values):
        seen.append((step, values["latents"].shape))
        return values

    plain = draw(adapted, guidance_scale=1.0, callback_on_step_end=note)
    assert seen == [(0, (1, 4, 4, 4)), (1, (1, 4, 4, 4))]
    assert np.abs(plain - draw(adapted)).max() > 1e-3
    generator = torch.Generator().manual_seed(0)
    images, unsafe = adapted(
        "a sks glyph", num_inference_steps=2, generator=generator, height=16, width=16, guidance_scale=1.0,
        output_type="np", return_dict=False,
    )  # fmt: skip
    assert np.array_equal(images, plain) and unsafe is None


def test_an_interrupted_or_failed_call_leaves_weights_as_they_were(adapted):
    expected = draw(adapted)

    def stop(pipeline, step, timestep, values):
        pipeline._interrupt = True
        return values

    assert np.abs(draw(adapted, steps=4, apt_scale=0.3, callback_on_step_end=stop) - expected).max() > 1e-3

    def fail(*args):
        raise RuntimeError("stopped in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        draw(adapted, apt_scale=0.3, callback_on_step_end=fail)
    assert np.array_equal(draw(adapted), expected)


def test_lower_precision_is_saved_and_loaded(adapted, tmp_path, tiny_sd_path):
    adapted.to(torch.bfloat16)
    adapted.save_apt_weights(tmp_path)
    expected = draw(adapted)
    again = apt.StableDiffusionAPTPipeline.from_pretrained(tiny_sd_path, dtype=torch.bfloat16)
    again.set_progress_bar_config(disable=True)
    again.load_apt_weights(tmp_path)
    dtypes = {(".apt" in name, parameter.dtype) for name, parameter in again.unet.named_parameters()}
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}
    assert np.isfinite(expected).all() and np.array_equal(draw(again), expected)


def test_layerwise_casting_leaves_the_adapter_alone(adapted):
    expected = draw(adapted)
    adapted.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {p.dtype for n, p in adapted.unet.named_parameters() if ".apt" not in n}
    assert torch.float8_e4m3fn in stored
    assert {p.dtype for n, p in adapted.unet.named_parameters() if ".apt" in n} == {torch.float32}
    coarse = draw(adapted)
    assert np.isfinite(coarse).all() and np.abs(coarse - expected).mean() < 0.2
    assert np.abs(coarse - draw(adapted, apt_scale=0.0)).max() > 1e-3


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offloading_survives_load_and_unload(pipe, adapted, level, tmp_path):
    adapted.save_apt_weights(tmp_path)
    expected = draw(adapted)
    adapted.unload_apt_weights()
    base = draw(adapted)
    device = torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    adapted.unet.enable_group_offload(device, device, offload_type=level, **blocks)
    assert np.array_equal(draw(adapted), base)
    adapted.load_apt_weights(tmp_path)
    assert np.allclose(draw(adapted), expected, atol=1e-5)
    adapted.unload_apt_weights()
    assert np.array_equal(draw(adapted), base)


def test_part_of_an_adapter_loads_without_the_other(adapted, tmp_path):
    """An adapter of the UNet alone, and one of the text encoder alone, both into a whole pipeline."""
    for part in ("unet", "text_encoder"):
        apt.save_apt_weights({part: getattr(adapted, part)}, tmp_path / part)
    adapted.unload_apt_weights()
    base = draw(adapted)
    for part in ("unet", "text_encoder"):
        adapted.load_apt_weights(tmp_path / part, adapter_name=part)
        assert adapted.get_list_apt_adapters()[part] == [part]
        assert np.abs(draw(adapted) - base).max() > 1e-3
    adapted.set_apt_adapters(["unet", "text_encoder"])
    both = draw(adapted)
    adapted.delete_apt_adapters("unet")
    assert np.abs(draw(adapted) - both).max() > 1e-3
    adapted.delete_apt_adapters(["text_encoder"])
    assert np.array_equal(draw(adapted), base)
