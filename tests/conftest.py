"""Tiny real models, built once per session: random weights, the classes that users run."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


def make_tokenizer(folder: Path):
    """A byte-level CLIP tokenizer with no merges: every text encodes, nothing is downloaded."""
    from transformers import CLIPTokenizer

    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_unet(cross_attention_dim: int = 32):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def make_text_encoder(vocab_size: int = 514):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    return CLIPTextModel(config)


def make_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 32),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
    )


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
METER_TEXT = {
    "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32,
    "max_position_embeddings": 40, **NO_DROPOUT,
}  # fmt: skip
METER_VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
    "patch_size": 8, "hidden_act": "quick_gelu",
}  # fmt: skip


def meter_config(**changes):
    from apt_diffusion.models.meter import MeterConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return MeterConfig(text_config=METER_TEXT, vision_config=METER_VISION, **(NO_DROPOUT | sizes | changes))


def make_meter(**changes):
    from apt_diffusion.models.meter import MeterModel

    torch.manual_seed(0)
    return MeterModel(meter_config(**changes)).eval()


def meter_inputs(batch: int = 2, images: int | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (batch, 3, 16, 16) if images is None else (batch, images, 3, 16, 16)
    return {
        "input_ids": torch.tensor([[0, 5, 6, 7, 2], [0, 9, 2, 1, 1]])[:batch],
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])[:batch],
        "pixel_values": torch.randn(size, generator=generator),
    }


@pytest.fixture(scope="session")
def tiny_sd_path(tmp_path_factory) -> Path:
    """A folder with a tiny random Stable Diffusion: 32 x 32 pictures, 8 x 8 latents."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("tiny-sd")
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder / "tokenizer")
    pipeline = StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        unet=make_unet(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl_path(tmp_path_factory) -> Path:
    """A tiny random SDXL: two text encoders, pooled text and time ids as further conditions."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    folder = tmp_path_factory.mktemp("tiny-sdxl")
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder / "tokenizer")
    text_encoder = make_text_encoder(len(tokenizer))
    second_tokenizer = make_tokenizer(folder / "tokenizer_2")
    second_tokenizer.pad_token = "!"  # as SDXL's; the first pads with the end of the text
    second = CLIPTextConfig(**text_encoder.config.to_dict() | {"projection_dim": 32, "hidden_act": "gelu"})
    unet = UNet2DConditionModel(
        **dict(make_unet(cross_attention_dim=64).config)
        | {
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        }
    )
    pipeline = StableDiffusionXLPipeline(
        vae=make_vae(),
        text_encoder=text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer,
        tokenizer_2=second_tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_transformer_path(tmp_path_factory):
    """The folder of a tiny pipeline with a diffusion transformer, made at its first use."""
    from support.transformer_pipelines import save

    @functools.cache
    def folder(kind: str) -> Path:
        return save(kind, tmp_path_factory.mktemp(kind))

    return folder


@pytest.fixture
def no_models(monkeypatch):
    """Loading any weights fails the test."""
    from apt_diffusion.training.text_to_image.flow_transformer import FlowTransformerBase
    from apt_diffusion.training.text_to_image.stable_diffusion import StableDiffusionBase
    from apt_diffusion.training.text_to_image.stable_diffusion_3 import StableDiffusion3Base

    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for base in (StableDiffusionBase, StableDiffusion3Base, FlowTransformerBase):
        for part in ("denoiser", "vae", "text_encoders", "text_encoder", "pipeline"):
            monkeypatch.setattr(base, part, fail)


@pytest.fixture
def altered(tiny_sd_path, tmp_path):
    """Copies the tiny Stable Diffusion and changes settings of one of its parts; `None` takes one away."""

    def copy(part: str, source=tiny_sd_path, replaced=False, **settings):
        folder = tmp_path / f"base-{part}"
        shutil.copytree(source, folder, dirs_exist_ok=True)
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        config = ({} if replaced else json.loads(file.read_text())) | settings
        file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
        return folder

    return copy


@pytest.fixture(scope="session")
def instance_dir(tmp_path_factory) -> Path:
    """Five small pictures."""
    folder = tmp_path_factory.mktemp("instance")
    rng = np.random.default_rng(0)
    for index in range(5):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"picture-{index}.png")
    return folder


@pytest.fixture
def pipe(tiny_sd_path):
    """A fresh tiny pipeline, deterministic and quiet."""
    from apt_diffusion import StableDiffusionAPTPipeline

    pipeline = StableDiffusionAPTPipeline.from_pretrained(tiny_sd_path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def randomize(model, seed: int = 1) -> None:
    """Gives every APT parameter a value that acts: trained adapters are neither zero nor identity."""
    from apt_diffusion.api import cores_of

    generator = torch.Generator().manual_seed(seed)
    for core in cores_of(model):
        for adapter in core.adapters.values():
            for name, parameter in adapter.named_parameters():
                size = {"prompts": 0.3, "low_rank_down": 0.5, "low_rank_up": 0.3, "log_scale": 0.1, "gate": 0.7}[name]
                values = torch.randn(parameter.shape, generator=generator) * size
                parameter.data.copy_(values + (0.7 if name == "gate" else 0))


def draw(pipeline, prompt="a sks glyph", seed: int = 0, steps: int = 2, **kwargs) -> np.ndarray:
    """Pictures as an array; same seed, same noise."""
    generator = torch.Generator().manual_seed(seed)
    size = {"height": 16, "width": 16}
    return pipeline(prompt, num_inference_steps=steps, generator=generator, output_type="np", **size, **kwargs).images


@pytest.fixture(scope="session")
def tiny_vl(tmp_path_factory) -> dict[str, Path]:
    """Folders with tiny random ViLT and METER models and their processors."""
    from support.vl_helpers import MODELS

    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in MODELS.items()}


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> dict[str, Path]:
    """The folder of a tiny random CLIP and its processor."""
    from support.vl_helpers import make_clip_folder

    return {"clip": make_clip_folder(tmp_path_factory.mktemp("clip"))}


@pytest.fixture(scope="session")
def retrieval_dir(tmp_path_factory) -> Path:
    """Flickr30K in Karpathy's layout: 8 and 4 pictures, two captions each."""
    from support.vl_helpers import make_retrieval_folder

    return make_retrieval_folder(tmp_path_factory.mktemp("retrieval") / "flickr30k")


@pytest.fixture(scope="session")
def classes_dir(tmp_path_factory) -> Path:
    """Six classes in CoOp's layout: 3, 1 and 2 pictures of each."""
    from support.vl_helpers import make_classes_folder

    return make_classes_folder(tmp_path_factory.mktemp("data") / "classes")


@pytest.fixture(scope="session")
def vqa_dir(tmp_path_factory) -> Path:
    """VQAv2 in the official layout: 12, 6 and 3 questions."""
    from support.vl_helpers import make_vqa_folder

    return make_vqa_folder(tmp_path_factory.mktemp("vqa"))


@pytest.fixture(scope="session")
def nlvr2_dir(tmp_path_factory) -> Path:
    """NLVR2 in the official layout: 12, 6 and 6 statements."""
    from support.vl_helpers import make_nlvr2_folder

    return make_nlvr2_folder(tmp_path_factory.mktemp("nlvr2"))


@pytest.fixture
def go(tiny_sd_path, instance_dir, tmp_path):
    """Trains the tiny Stable Diffusion into a new folder, or that named by `out=`."""
    from support.training_helpers import train

    count = iter(range(100))

    def run(out=None, **flags):
        pictures = flags.pop("instance_data_dir", instance_dir)
        return train(tiny_sd_path, pictures, tmp_path / (out or f"out-{next(count)}"), **flags)

    return run


@pytest.fixture(scope="module")
def chromium():
    from support.studio_browser import chromium_running

    with chromium_running() as browser:
        yield browser


@pytest.fixture
def visit(chromium, address):
    """Opens the studio at the test module's `address`: every call is another visitor."""
    from support.studio_browser import visitors

    with visitors(chromium, address) as visit:
        yield visit


def pytest_collection_modifyitems(items):
    """Whatever opens a page in Chromium is marked `browser`, and skipped where there is none."""
    from support.studio_browser import needs_chromium

    for item in items:
        if "chromium" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
            item.add_marker(needs_chromium)
