"""A base in one file: recognised, converted once, and trained, drawn with and served as its folder is."""

import json
import shutil
import struct
import zipfile

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from support.single_file import clip_state, open_clip_state, unet_state, vae_state, write_single_file
from support.training_helpers import assert_same_adapter, header, losses, train
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from apt_diffusion import (
    StableDiffusion3APTPipeline,
    StableDiffusionAPTPipeline,
    StableDiffusionXLAPTPipeline,
    add_apt,
    save_apt_weights,
)
from apt_diffusion.cli.generate import main as generate
from apt_diffusion.convert.single_file import base_folder
from apt_diffusion.io.single_file import read_checkpoint
from apt_diffusion.training.text_to_image.bases import open_base

RUN = {"train_text_encoder": True, "max_train_steps": 3}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where converted files go."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "apt_diffusion" / "bases"


@pytest.fixture
def configuration(tiny_sd_path, tmp_path):
    """The tiny model's settings and tokenizer, without weights."""
    return shutil.copytree(tiny_sd_path, tmp_path / "configuration", ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.fixture
def single(pipe, tmp_path):
    return write_single_file(pipe, tmp_path / "tiny.safetensors")


@pytest.fixture
def xl_path(tiny_sdxl_path, tmp_path):
    """A tiny SDXL whose text encoders have different widths, by which the layout tells them apart."""
    pipeline = StableDiffusionXLAPTPipeline.from_pretrained(tiny_sdxl_path)
    torch.manual_seed(0)
    wide = CLIPTextConfig.from_dict(
        pipeline.text_encoder_2.config.to_dict() | {"hidden_size": 48, "num_attention_heads": 4, "projection_dim": 48}
    )
    pipeline.text_encoder_2 = CLIPTextModelWithProjection(wide)
    settings = {"cross_attention_dim": 80, "projection_class_embeddings_input_dim": 6 * 8 + 48}
    pipeline.unet = UNet2DConditionModel.from_config(dict(pipeline.unet.config) | settings)
    pipeline.save_pretrained(tmp_path / "xl")
    return tmp_path / "xl"


def assert_same_weights(first, second, parts):
    for part in parts:
        a, b = getattr(first, part).state_dict(), getattr(second, part).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), part


# The same model


@pytest.mark.slow
def test_a_run_on_the_file_is_that_on_the_folder(go, pipe, configuration, instance_dir, tmp_path, cache, caplog):
    file = write_single_file(pipe, tmp_path / "tiny.safetensors")
    straight = go(**RUN)
    flags = RUN | {"base_config": configuration, "checkpointing_steps": 2}
    out = train(file, instance_dir, tmp_path / "single", **flags)
    assert_same_adapter(straight, out)
    assert losses(straight) == losses(out) and header(out)["base_model"] == "tiny.safetensors"
    assert ".from_single_file('path/to/" in (out / "README.md").read_text()
    [folder] = cache.iterdir()
    assert caplog.text.count("converting it once") == 1 and "predicts 'epsilon'" in caplog.text
    shutil.rmtree(out / "checkpoint-3")
    train(file, instance_dir, tmp_path / "single", resume_from_checkpoint="latest", **flags)
    assert_same_adapter(straight, out)
    assert list(cache.iterdir()) == [folder] and caplog.text.count("converting it once") == 1


def test_a_ckpt_is_read_without_running_anything(pipe, configuration, tmp_path):
    folder = base_folder(str(write_single_file(pipe, tmp_path / "tiny.ckpt")), str(configuration))
    found = StableDiffusionAPTPipeline.from_pretrained(folder)
    assert_same_weights(pipe, found, ("unet", "vae", "text_encoder"))


def test_a_folder_may_have_the_name_of_a_file(tiny_sd_path, tmp_path):
    shutil.copytree(tiny_sd_path, tmp_path / "v1.5.ckpt")
    assert base_folder(str(tmp_path / "v1.5.ckpt")) == str(tmp_path / "v1.5.ckpt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "is no configuration of a base"),
        ("{", "is no JSON"),
        ('{"_class_name": "StableDiffusionPipeline"}', "a scheduler"),
    ],
)
def test_a_damaged_configuration_is_told_before_anything_is_converted(single, tmp_path, cache, content, message):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "model_index.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        base_folder(str(single), str(tmp_path / "c"))
    assert not cache.exists()


@pytest.mark.slow
def test_sdxl_in_one_file(xl_path, instance_dir, tmp_path):
    pipeline = StableDiffusionXLAPTPipeline.from_pretrained(xl_path)
    file = write_single_file(pipeline, tmp_path / "xl.safetensors")
    loaded = StableDiffusionXLAPTPipeline.from_single_file(file, config=xl_path)
    assert_same_weights(pipeline, loaded, ("unet", "vae", "text_encoder", "text_encoder_2"))
    straight = train(xl_path, instance_dir, tmp_path / "straight", **RUN)
    assert_same_adapter(straight, train(file, instance_dir, tmp_path / "single", base_config=xl_path, **RUN))


def test_stable_diffusion_3_in_one_file(tiny_transformer_path, tmp_path):
    pipeline = StableDiffusion3APTPipeline.from_pretrained(tiny_transformer_path("sd3-tiny"))
    wide = {"hidden_size": 48, "num_attention_heads": 4}  # the layout tells the encoders apart by their widths
    torch.manual_seed(0)
    config = CLIPTextConfig.from_dict(pipeline.text_encoder_2.config.to_dict() | wide)
    pipeline.text_encoder_2 = CLIPTextModelWithProjection(config)
    with torch.no_grad():  # this layout has no projection of the first encoder: it is the identity
        pipeline.text_encoder.text_projection.weight.copy_(torch.eye(32))
    pipeline.save_pretrained(tmp_path / "folder")
    file = write_single_file(pipeline, tmp_path / "three.safetensors")
    folder = base_folder(str(file), str(tmp_path / "folder"))
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    assert_same_weights(pipeline, StableDiffusion3APTPipeline.from_pretrained(folder), parts)
    shutil.rmtree(tmp_path / "folder" / "text_encoder_3")
    pruned = {name: value for name, value in load_file(file).items() if "t5xxl" not in name}
    save_file(pruned, tmp_path / "pruned.safetensors")
    folder = base_folder(str(tmp_path / "pruned.safetensors"), str(tmp_path / "folder"))
    base = open_base(folder)
    assert base.text_parts == ("text_encoder", "text_encoder_2")  # the trainer does without T5
    loaded = base.pipeline(torch.float32)
    assert loaded.text_encoder_3 is None and loaded.tokenizer_3 is None
    assert_same_weights(pipeline, loaded, parts[:4])


def test_half_precision_stays_half_precision(tiny_sd_path, configuration, tmp_path):
    half = StableDiffusionAPTPipeline.from_pretrained(tiny_sd_path, dtype=torch.float16)
    folder = base_folder(str(write_single_file(half, tmp_path / "half.safetensors")), str(configuration))
    stored = load_file(f"{folder}/unet/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert_same_weights(half, StableDiffusionAPTPipeline.from_pretrained(folder, dtype=torch.float16), ("unet", "vae"))


@pytest.mark.slow
def test_a_pipeline_from_a_file_draws_with_adapters(pipe, single, configuration, go, tmp_path):
    out = go(**RUN, learning_rate=0.1)
    loaded = StableDiffusionAPTPipeline.from_single_file(single, config=configuration)
    loaded.set_progress_bar_config(disable=True)
    pictures = []
    for pipeline in (pipe, loaded):
        pipeline.load_apt_weights(out)
        drawn = [
            pipeline(
                "a sks glyph", height=32, width=32, num_inference_steps=2, apt_scale=scale, output_type="np",
                generator=torch.Generator().manual_seed(0),
            ).images
            for scale in (1.0, 0.0)
        ]  # fmt: skip
        pictures.append(drawn)
    assert np.array_equal(pictures[0][0], pictures[1][0]) and np.array_equal(pictures[0][1], pictures[1][1])
    assert not np.allclose(pictures[0][0], pictures[0][1])


def test_the_command_draws_from_a_file(single, tiny_sd_path, configuration, tmp_path):
    settings = ["a glyph", "--steps", "2", "--height", "32", "--width", "32", "--output"]
    files = [tmp_path / "folder.png", tmp_path / "single.png"]
    assert generate([*settings, str(files[0]), "--model", str(tiny_sd_path)], "generate") == 0
    options = ["--model", str(single), "--base_config", str(configuration)]
    assert generate([*settings, str(files[1]), *options], "generate") == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_server_opens_a_file(single, configuration, tmp_path):
    from apt_diffusion.server.engines import open_engine
    from apt_diffusion.server.settings import ServerSettings

    settings = {"model": str(single), "base_config": str(configuration), "adapters": str(tmp_path / "adapters")}
    engine = open_engine(ServerSettings(**settings))
    engine.close()


# What the file says of itself


def test_a_file_that_says_that_it_predicts_velocity_is_trained_so(pipe, configuration, tmp_path):
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    file = write_single_file(pipe, tmp_path / "v.safetensors", **marks)
    folder = base_folder(str(file), str(configuration))
    with open(f"{folder}/scheduler/scheduler_config.json") as settings:
        scheduler = json.load(settings)
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["rescale_betas_zero_snr"] is True
    before = json.loads((configuration / "scheduler" / "scheduler_config.json").read_text())
    assert before["prediction_type"] == "epsilon"  # the folder that was named is as it was
    loaded = StableDiffusionAPTPipeline.from_single_file(file, config=configuration)
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    stated = write_single_file(pipe, tmp_path / "s.safetensors", {"modelspec.prediction_type": "v"})
    loaded = StableDiffusionAPTPipeline.from_single_file(stated, config=configuration)
    assert loaded.scheduler.config.prediction_type == "v_prediction"


def test_another_file_of_the_same_name_is_converted_anew(pipe, single, configuration):
    first = base_folder(str(single), str(configuration))
    with torch.no_grad():
        pipe.unet.conv_in.bias += 1
    write_single_file(pipe, single)
    second = base_folder(str(single), str(configuration))
    assert first != second
    found = UNet2DConditionModel.from_pretrained(second, subfolder="unet")
    assert torch.equal(found.conv_in.bias, pipe.unet.conv_in.bias)


# Refusals


def no_base(kind, pipe, folder, go):
    file = folder / f"{kind}.safetensors"
    if kind == "adapter":
        return go() / "pytorch_apt_weights.safetensors"
    if kind == "lora":
        save_file({"unet.a.lora.down.weight": torch.zeros(2, 2)}, file)
    elif kind == "vae":
        save_file({name: value.contiguous() for name, value in vae_state(pipe.vae).items()}, file)
    elif kind == "unet":
        save_file({name: value.contiguous() for name, value in unet_state(pipe.unet).items()}, file)
    elif kind == "part":
        pipe.unet.save_pretrained(folder / "unet")
        return folder / "unet" / "diffusion_pytorch_model.safetensors"
    elif kind == "embedding":
        save_file({"emb_params": torch.zeros(1, 32)}, file)
    elif kind == "controlnet":
        save_file({"control_model.time_embed.0.weight": torch.zeros(1)}, file)
    elif kind == "text":
        file.write_text("not a model, but long enough to look at")
    elif kind == "truncated":
        write_single_file(pipe, file)
        file.write_bytes(file.read_bytes()[:-1000])
    elif kind == "huge header":
        with file.open("wb") as content:
            content.write(struct.pack("<Q", 2**25))
            content.truncate(2**26)
    elif kind == "inpainting":
        wide = dict(pipe.unet.config) | {"in_channels": 9}
        pipe.unet = UNet2DConditionModel.from_config(wide)
        write_single_file(pipe, file)
    elif kind == "refiner":
        state = unet_state(pipe.unet) | {"conditioner.embedders.0.model.ln_final.weight": torch.zeros(1)}
        save_file({name: value.contiguous() for name, value in state.items()}, file)
    elif kind == "ckpt":
        file = folder / "x.ckpt"
        torch.save({"state_dict": {"a": torch.zeros(1)}, "callback": pytest.raises}, file)
    elif kind == "damaged ckpt":
        torch.save({"a": torch.zeros(1)}, whole := folder / "whole.ckpt")
        file = folder / "x.ckpt"
        with zipfile.ZipFile(whole) as before, zipfile.ZipFile(file, "w") as after:
            for entry in before.infolist():
                content = before.read(entry)
                # A memo that was never filled: pickle's own KeyError.
                after.writestr(entry, b"\x80\x02h\x07." if entry.filename.endswith(".pkl") else content)
    elif kind == "old ckpt":
        file = folder / "x.ckpt"
        torch.save({"a": torch.zeros(1)}, file, _use_new_zipfile_serialization=False)
    elif kind == "picture":
        file = folder / "x.png"
        file.write_bytes(b"x")
    elif kind == "nowhere":
        pass
    return file


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("adapter", "is an APT adapter, no base model"),
        ("lora", "is a LoRA, no base model"),
        ("vae", "is no base model but a VAE"),
        ("unet", "has a UNet but no text encoder"),
        ("part", "but a part of a model in diffusers' layout"),
        ("embedding", "none of its 1 tensors belongs to a denoiser"),
        ("controlnet", "is a ControlNet"),
        ("text", "cannot be read as safetensors"),
        ("truncated", "cannot be read as safetensors"),
        ("huge header", "has a header of 32 MiB"),
        ("inpainting", "its UNet has 9 input and 4 output channels"),
        ("refiner", "is SDXL's refiner"),
        ("ckpt", "holds more than weights"),
        ("damaged ckpt", "or is damaged: it is not loaded"),
        ("old ckpt", "older than torch 1.6"),
        ("picture", "which ends in .safetensors or .ckpt"),
        ("nowhere", "There is no file"),
    ],
)
def test_a_file_that_is_no_base_is_told_by_what_it_is(
    pipe, configuration, go, instance_dir, tmp_path, cache, request, kind, message
):
    file = no_base(kind, pipe, tmp_path, go)
    request.getfixturevalue("no_models")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train(file, instance_dir, tmp_path / "out", base_config=configuration)
    assert message in str(error.value) and str(file) in str(error.value)
    assert not (tmp_path / "out").exists() and not cache.exists()


def test_what_a_file_needs_beside_it_is_told(
    pipe, single, configuration, tiny_sd_path, tiny_sdxl_path, instance_dir, tmp_path, cache
):
    def refused(message, **flags):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(flags.pop("model", single), instance_dir, tmp_path / "out", **flags)
        assert not cache.exists() or not any(cache.iterdir())

    refused(
        "is a Stable Diffusion 1 without configuration and tokenizer; those of stable-diffusion-v1-5/.* give --base"
    )
    refused("is no configuration of a base", base_config=instance_dir)
    refused("but .* is the configuration of a StableDiffusionXLPipeline", base_config=tiny_sdxl_path)
    refused("--base_config is for a base in one file", model=tiny_sd_path, base_config=configuration)
    refused("--variant is for folders", base_config=configuration, variant="fp16")
    (configuration / "unet" / "config.json").write_text(
        (configuration / "unet" / "config.json").read_text().replace("64", "96")
    )
    refused("does not fit the configuration", base_config=configuration)
    shutil.copyfile(tiny_sd_path / "unet" / "config.json", configuration / "unet" / "config.json")
    incomplete = {name: value for name, value in load_file(single).items() if "middle_block.1" not in name}
    save_file(incomplete, tmp_path / "incomplete.safetensors")
    model = tmp_path / "incomplete.safetensors"
    refused("weights of its models are not in the file", model=model, base_config=configuration)
    state = unet_state(pipe.unet) | clip_state(pipe.text_encoder, "cond_stage_model.transformer.")
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "no-vae.safetensors")
    refused(
        "has no vae, and .* has no weights for it", model=tmp_path / "no-vae.safetensors", base_config=configuration
    )


def test_a_part_that_the_file_lacks_comes_from_the_whole_model_named(pipe, tiny_sd_path, tmp_path):
    state = unet_state(pipe.unet) | clip_state(pipe.text_encoder, "cond_stage_model.transformer.")
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "no-vae.safetensors")
    folder = base_folder(str(tmp_path / "no-vae.safetensors"), str(tiny_sd_path))
    found = StableDiffusionAPTPipeline.from_pretrained(folder)
    assert_same_weights(pipe, found, ("unet", "vae", "text_encoder"))


def test_stable_diffusion_2_in_one_file(pipe, configuration, tmp_path):
    state = unet_state(pipe.unet) | vae_state(pipe.vae)
    state |= open_clip_state(pipe.text_encoder, "cond_stage_model.model.")
    save_file({name: value.detach().contiguous() for name, value in state.items()}, tmp_path / "two.safetensors")
    loaded = StableDiffusionAPTPipeline.from_single_file(tmp_path / "two.safetensors", config=configuration)
    assert_same_weights(pipe, loaded, ("unet", "vae", "text_encoder"))


def test_stable_diffusion_2_does_not_say_what_it_predicts(pipe, tmp_path):
    state = unet_state(pipe.unet) | vae_state(pipe.vae) | {"cond_stage_model.model.ln_final.weight": torch.zeros(1)}
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="does not say whether it predicts noise or velocity: give --base_config"):
        base_folder(str(tmp_path / "two.safetensors"))


def test_pipelines_say_what_a_file_is(pipe, single, tmp_path):
    with pytest.raises(ValueError, match="is a Stable Diffusion 1: load it with StableDiffusionAPTPipeline"):
        StableDiffusionXLAPTPipeline.from_single_file(single)
    with pytest.raises(FileNotFoundError, match="without configuration and tokenizer"):
        StableDiffusionAPTPipeline.from_single_file(single)
    add_apt(pipe)
    save_apt_weights(pipe, tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an APT adapter, no base model"):
        StableDiffusionAPTPipeline.from_single_file(tmp_path / "adapter" / "pytorch_apt_weights.safetensors")


def test_looking_at_a_file_reads_no_weights(single, monkeypatch):
    monkeypatch.setattr(torch, "empty", None)
    checkpoint = read_checkpoint(single)
    assert checkpoint.parts == {"unet", "vae", "text_encoder"} and checkpoint.dtype == "float32"
