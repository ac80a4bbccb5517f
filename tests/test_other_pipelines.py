"""Adapters on the other pipelines: Stable Diffusion XL, ControlNet, image to image, inpainting."""

import numpy as np
import pytest
import torch
from conftest import draw, make_text_encoder, make_tokenizer, make_vae, randomize

import apt_diffusion as apt

SMALL = apt.APTConfig(num_prompts=6, rank=2, query_source="attn_output", streams=["query", "context"])


@pytest.fixture(scope="module")
def tiny_sdxl_path(tmp_path_factory):
    """Two text encoders, time ids: 16 x 16 pictures."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    folder = tmp_path_factory.mktemp("tiny-sdxl")
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder / "words")
    second = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3,
        projection_dim=20, bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=20 + 6 * 4,
        cross_attention_dim=32 + 24,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(len(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def sdxl(tiny_sdxl_path):
    pipeline = apt.StableDiffusionXLAPTPipeline.from_pretrained(tiny_sdxl_path, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_sdxl_has_three_adapted_parts(sdxl, tmp_path):
    base = draw(sdxl)
    names = apt.add_apt(sdxl, SMALL)
    assert {name.split(".")[0] for name in names} == {"unet", "text_encoder", "text_encoder_2"}
    assert np.array_equal(draw(sdxl), base)
    randomize(sdxl)
    adapted = draw(sdxl)
    assert np.abs(adapted - base).max() > 1e-3
    for part in ("unet", "text_encoder", "text_encoder_2"):
        sdxl.set_apt_adapters("default", {part: 0.0})
        assert np.abs(draw(sdxl) - adapted).max() > 1e-6, part
    sdxl.set_apt_adapters("default")
    sdxl.save_apt_weights(tmp_path)
    sdxl.unload_apt_weights()
    assert np.array_equal(draw(sdxl), base)
    sdxl.load_apt_weights(tmp_path)
    assert np.array_equal(draw(sdxl), adapted)
    assert np.array_equal(draw(sdxl, apt_scale=0.0), base)


def test_sdxl_draws_several_adapters_in_one_batch(sdxl):
    for name in ("a", "b"):
        apt.add_apt(sdxl, SMALL, name)
    randomize(sdxl)
    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    mixed = draw(sdxl, apt_adapter_names=["a", None, "b"], latents=noise)
    for index, name in enumerate(["a", None, "b"]):
        sdxl.set_apt_adapters(name or "a", 1.0 if name else 0.0)
        assert np.allclose(draw(sdxl, latents=noise[index : index + 1])[0], mixed[index], atol=1e-4)


def test_an_adapter_for_sd_says_that_it_does_not_fit_sdxl(sdxl, pipe, tmp_path):
    apt.add_apt(pipe, SMALL)
    pipe.save_apt_weights(tmp_path, metadata={"base_model": "tiny-sd"})
    before = draw(sdxl)
    with pytest.raises(ValueError, match="tiny-sd"):
        sdxl.load_apt_weights(tmp_path)
    assert np.array_equal(draw(sdxl), before) and sdxl.get_list_apt_adapters() == {}


def test_controlnet_takes_the_adapters_along(pipe):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 96))
    for parameter in controlnet.controlnet_mid_block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    apt.add_apt(pipe, SMALL)
    randomize(pipe)
    other = StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
    other.set_progress_bar_config(disable=True)
    control = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    guided = draw(other, image=control)
    with apt.disable_apt(other):
        plain = draw(other, image=control)
    assert np.abs(guided - plain).max() > 1e-3
    assert np.allclose(draw(other, image=control, controlnet_conditioning_scale=0.0), draw(pipe), atol=1e-4)


def test_an_adapter_trained_on_one_pipeline_loads_in_the_others(pipe, tiny_sd_path, tmp_path):
    apt.add_apt(pipe, SMALL)
    randomize(pipe)
    pipe.save_apt_weights(tmp_path)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for cls, extra in (
        (apt.StableDiffusionAPTImg2ImgPipeline, {}),
        (apt.StableDiffusionAPTInpaintPipeline, {"mask_image": torch.ones(1, 1, 16, 16)}),
    ):
        other = cls.from_pretrained(tiny_sd_path)
        other.set_progress_bar_config(disable=True)
        other.load_apt_weights(tmp_path)
        converted = cls.from_pipe(pipe)
        converted.set_progress_bar_config(disable=True)

        def run(pipeline, extra=extra, **kwargs):
            generator = torch.Generator().manual_seed(0)
            return pipeline(
                "a sks glyph", image=picture, num_inference_steps=4, strength=0.8, generator=generator,
                output_type="np", **extra, **kwargs,
            ).images  # fmt: skip

        assert np.array_equal(run(other), run(converted))
        assert np.abs(run(other) - run(other, apt_scale=0.0)).max() > 1e-3
