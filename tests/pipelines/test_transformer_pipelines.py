"""The named pipelines of diffusion transformers: whole tiny pipelines are opened, drawn with, saved and converted."""

import diffusers
import numpy as np
import pytest
import torch
from conftest import randomize
from support.pipeline_helpers import differ
from support.transformer_pipelines import INPUTS

import apt_diffusion as apt

NAMED = {
    "FluxAPTPipeline": "flux",
    "Flux2APTPipeline": "flux2",
    "Flux2KleinAPTPipeline": "flux2-klein",
    "QwenImageAPTPipeline": "qwen-image",
    "ZImageAPTPipeline": "z-image",
    "PixArtSigmaAPTPipeline": "pixart-sigma",
    "SanaAPTPipeline": "sana",
}
IMAGE_TO_IMAGE = {
    "flux": "FluxAPTImg2ImgPipeline",
    "flux2": "Flux2APTPipeline",
    "flux2-klein": "Flux2KleinAPTPipeline",
    "qwen-image": "QwenImageAPTImg2ImgPipeline",
    "z-image": "ZImageAPTImg2ImgPipeline",
}
SMALL = apt.APTConfig(num_prompts=6, rank=2)


@pytest.fixture(params=NAMED)
def named(request, tiny_transformer_path):
    """`(class, folder, call arguments)` of one family."""
    kind = NAMED[request.param]
    return getattr(apt, request.param), tiny_transformer_path(kind), INPUTS[kind]


def opened(cls, folder):
    """A pipeline without progress bars."""
    pipeline = cls.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, inputs, seeds=(0,), **kwargs):
    """Pictures from one prompt, each with its own noise."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings = inputs | {"num_inference_steps": 2, "output_type": "np"}
    return pipeline(prompt="a sks glyph", generator=generators, **settings, **kwargs).images


@pytest.mark.slow
def test_a_folder_is_opened_adapted_saved_and_opened_again(named, tmp_path):
    """Against the stock class on the same folder; what is saved is a stock folder with adapters beside it."""
    cls, folder, inputs = named
    stock_class = getattr(diffusers, cls.__name__.replace("APT", ""))
    stock = draw(opened(stock_class, folder), inputs)
    pipeline = opened(cls, folder)
    apt.add_apt(pipeline, SMALL, "a")
    assert np.array_equal(draw(pipeline, inputs), stock)
    randomize(pipeline)
    adapted = draw(pipeline, inputs)
    assert np.isfinite(adapted).all() and differ(adapted, stock)
    assert np.array_equal(draw(pipeline, inputs, apt_scale=0.0), stock)
    # Language models and T5 encoders are left as they are, also where APT knows places in their vision tower.
    clip = {"text_encoder"} if "Flux" in cls.__name__ and "Flux2" not in cls.__name__ else set()
    assert set(pipeline.get_list_apt_adapters()) == {"transformer", *clip}

    pipeline.save_apt_weights(tmp_path / "adapter", "a")
    pipeline.unload_apt_weights()
    assert np.array_equal(draw(pipeline, inputs), stock)
    pipeline.load_apt_weights(tmp_path / "adapter")
    assert np.array_equal(draw(pipeline, inputs), adapted)
    pipeline.save_pretrained(tmp_path / "whole")
    again = opened(diffusers.DiffusionPipeline, tmp_path / "whole")
    assert type(again) is stock_class and np.array_equal(draw(again, inputs), stock)
    assert np.array_equal(draw(opened(cls, tmp_path / "whole"), inputs), adapted)


@pytest.mark.slow
def test_each_prompts_pictures_stand_together_in_a_mixed_batch(named):
    """Two adapters of unlike sizes and the base model, two pictures of each, against three calls."""
    cls, folder, inputs = named
    pipeline = opened(cls, folder)
    for seed, (name, prompts) in enumerate({"a": 6, "b": 4}.items(), 1):
        apt.add_apt(pipeline.transformer, apt.APTConfig(num_prompts=prompts, rank=2), name)
        randomize(pipeline.transformer, seed)
    names = ["a", {"a": 0.5, "b": 0.7}, None]
    apart = [draw(pipeline, inputs, (0, 1), num_images_per_prompt=2, apt_adapter_names=[name]) for name in names]
    assert all(differ(apart[0], other) for other in apart[1:]) and differ(apart[1], apart[2])
    mixed = draw(pipeline, inputs, (0, 1) * 3, num_images_per_prompt=2, apt_adapter_names=names)
    assert np.allclose(mixed, np.concatenate(apart), atol=1e-4)


@pytest.mark.slow
def test_auto_pipelines_hand_the_adapters_on(named):
    cls, folder, inputs = named
    auto = opened(diffusers.AutoPipelineForText2Image, folder)
    assert type(auto) is getattr(diffusers, cls.__name__.replace("APT", ""))
    pipeline = cls.from_pipe(auto)
    apt.add_apt(pipeline.transformer, SMALL, "a")
    randomize(pipeline.transformer)
    kind = NAMED[cls.__name__]
    if kind in IMAGE_TO_IMAGE:
        other = diffusers.AutoPipelineForImage2Image.from_pipe(pipeline)
        assert type(other).__name__ == IMAGE_TO_IMAGE[kind] and other.get_active_apt_adapters() == ["a"]
    back = diffusers.AutoPipelineForText2Image.from_pipe(pipeline)
    for each in (auto, back):
        each.set_progress_bar_config(disable=True)
    assert type(back) is cls
    assert np.array_equal(draw(back, inputs), draw(auto, inputs))  # the modules are the same, and so their adapters
    assert differ(draw(back, inputs), draw(back, inputs, apt_scale=0.0))


def load_ip_adapter(transformer, width=8):
    """Gives Flux an IP-Adapter of random weights, for picture embeddings of this width."""
    generator = torch.Generator().manual_seed(3)
    text, inner = transformer.config.joint_attention_dim, transformer.inner_dim

    def noise(*shape):
        return torch.randn(shape, generator=generator) * 0.2

    projection = {"proj.weight": (4 * text, width), "proj.bias": (4 * text,)}
    projection |= {"norm.weight": (text,), "norm.bias": (text,)}
    attention = {
        f"{index}.{name}.{kind}": shape
        for index in range(len(transformer.transformer_blocks))
        for name in ("to_k_ip", "to_v_ip")
        for kind, shape in {"weight": (inner, text), "bias": (inner,)}.items()
    }
    state = {
        "image_proj": {name: noise(*shape) for name, shape in projection.items()},
        "ip_adapter": {name: noise(*shape) for name, shape in attention.items()},
    }
    transformer._load_ip_adapter_weights([state])
    embeds = {f"{kind}ip_adapter_image_embeds": noise(1, 1, width) for kind in ("", "negative_")}
    return {name: [value] for name, value in embeds.items()}


@pytest.mark.parametrize("ip_adapter_first", [True, False])
def test_an_ip_adapter_of_flux_stands_beside_the_adapters(tiny_transformer_path, ip_adapter_first):
    """Its attention has a third output, which is no stream of APT's."""
    pipeline = opened(apt.FluxAPTPipeline, tiny_transformer_path("flux"))
    inputs = dict(INPUTS["flux"])
    picture = load_ip_adapter(pipeline.transformer) if ip_adapter_first else {}
    apt.add_apt(pipeline.transformer, apt.APTConfig(num_prompts=6, rank=2, streams=("query", "text")), "a")
    if not ip_adapter_first:
        plain = draw(pipeline, inputs)
        picture = load_ip_adapter(pipeline.transformer)
        assert differ(draw(pipeline, inputs | picture), plain)
    inputs |= picture
    stock = draw(pipeline, inputs)
    randomize(pipeline.transformer)
    adapted = draw(pipeline, inputs)
    assert differ(adapted, stock) and np.array_equal(draw(pipeline, inputs, apt_scale=0.0), stock)
    pictures = {name: [value.expand(2, -1, -1)] for name, (value,) in picture.items()}
    mixed = draw(pipeline, inputs | pictures, (0, 0), apt_adapter_names=["a", None])
    assert np.allclose(mixed, np.concatenate([adapted, stock]), atol=1e-4)
    pipeline.unload_ip_adapter()
    apt.remove_apt(pipeline)
    assert differ(draw(pipeline, INPUTS["flux"]), stock)


def test_tags_in_prompts_name_adapters_of_transformers(tiny_transformer_path):
    """Each text of each prompt may hold some; the text encoders read none of them."""
    pipeline = opened(apt.FluxAPTPipeline, tiny_transformer_path("flux"))
    for seed, name in enumerate("ab", 1):
        apt.add_apt(pipeline.transformer, SMALL, name)
        randomize(pipeline.transformer, seed)
    inputs = INPUTS["flux"] | {"num_inference_steps": 2, "output_type": "np"}

    def pictures(prompt, **kwargs):
        generators = [torch.Generator().manual_seed(0) for _ in prompt]
        return pipeline(prompt, generator=generators, **inputs, **kwargs).images

    names = [{"a": 0.5, "b": 0.7}, {"b": 1.0}]
    expected = pictures(["a dog", "a cat"], prompt_2=["oil", "ink"], apt_adapter_names=names)
    pipeline.apt_prompt_tags = True
    tagged = pictures(["a dog <apt:a:0.5>", "a cat <apt:b>"], prompt_2=["oil <apt:b:0.7>", "ink"])
    assert np.array_equal(tagged, expected)


def test_an_adapter_of_another_family_with_the_same_names_and_widths_is_refused(tiny_transformer_path, tmp_path):
    """The tiny Flux.2 has its attentions where Flux.1 has them, with the same widths."""
    donor = opened(apt.Flux2APTPipeline, tiny_transformer_path("flux2"))
    apt.add_apt(donor, SMALL)
    donor.save_apt_weights(tmp_path)
    pipeline = opened(apt.FluxAPTPipeline, tiny_transformer_path("flux"))
    for model in (pipeline, pipeline.transformer, {"transformer": pipeline.transformer}):
        alone = tmp_path / "alone"
        apt.save_apt_weights(donor.transformer, alone)
        with pytest.raises(ValueError, match="does not fit FluxTransformer2DModel: it holds an adapter of Flux2T"):
            apt.load_apt_weights(model, alone if model is pipeline.transformer else tmp_path)
    assert pipeline.get_list_apt_adapters() == {}

    class Finetuned(diffusers.Flux2Transformer2DModel):
        """A user's subclass is of the family."""

    donor.transformer.__class__ = Finetuned
    donor.unload_apt_weights()
    assert donor.load_apt_weights(tmp_path).get_list_apt_adapters() == {"transformer": ["default"]}


ENCODERS = {
    "FluxAPTPipeline": ("text_encoder_2", ["SelfAttention"]),
    "QwenImageAPTPipeline": ("text_encoder", r".*language_model\.layers\.\d+\.self_attn"),
    "SanaAPTPipeline": ("text_encoder", ["self_attn"]),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_language_model_is_adapted_where_it_is_named(name, tiny_transformer_path):
    """With an adapter for each prompt: its batch has one entry per prompt, also beside a vision tower."""
    part, target_modules = ENCODERS[name]
    kind = NAMED[name]
    pipeline = opened(getattr(apt, name), tiny_transformer_path(kind))
    stock = draw(pipeline, INPUTS[kind])
    config = apt.APTConfig(num_prompts=6, rank=2, target_modules=target_modules, init="identity")
    apt.add_apt(pipeline, {part: config}, "a")
    assert np.array_equal(draw(pipeline, INPUTS[kind]), stock)
    randomize(pipeline)
    adapted = draw(pipeline, INPUTS[kind])
    assert differ(adapted, stock) and pipeline.get_list_apt_adapters() == {part: ["a"]}
    mixed = draw(pipeline, INPUTS[kind], (0, 0), apt_adapter_names=["a", None])
    assert np.allclose(mixed, np.concatenate([adapted, stock]), atol=1e-4)
