"""The frozen denoiser in 4 or 8 bits (`--base_precision`): its weights, the training on it, what is refused."""

import re
import struct

import numpy as np
import pytest
import torch
from support.launching import in_two_processes
from support.quantised import need, write_gguf, write_gguf_state
from support.single_file import sd3_state, unet_state
from support.training_helpers import SCRIPT, assert_same_adapter, command, losses, tensors, train

from apt_diffusion import StableDiffusionAPTPipeline
from apt_diffusion.training.text_to_image.base_precision import bytes_of, check_gguf, load_quantised, quantised_maps
from apt_diffusion.training.text_to_image.bases import open_base

PRECISIONS = ["nf4", "int8", "fp8", "gguf"]


@pytest.fixture(params=PRECISIONS)
def precision(request, tiny_sd_path, tmp_path):
    need(request.param)
    if request.param != "gguf":
        return request.param
    return str(write_gguf(tmp_path / "unet.gguf", open_base(tiny_sd_path).denoiser(torch.float32)))


def weight_of(linear):
    """As the forward pass has it: the images of the unit vectors."""
    plain = linear(torch.zeros(1, linear.in_features))
    return (linear(torch.eye(linear.in_features)) - plain).T


def half_steps(weight, precision):
    """The largest rounding error of each weight, from the format's definition."""
    rows, columns = weight.shape
    if precision == "int8":  # a scale for each row
        return weight.abs().amax(1, keepdim=True).expand_as(weight) / 127 / 2
    if precision == "fp8":  # e4m3: 3 bits of mantissa
        return weight.abs() * 2**-4 + weight.abs().amax(1, keepdim=True) * 2**-9 / 448
    # NF4's widest gap; Q8_0 with scales and their products in float16, each off by up to 2^-11.
    size, half = (64, (1 - 0.6961928009986877) / 2) if precision == "nf4" else (32, 1 / 127 / 2 + 2**-10)
    blocks = weight.reshape(-1, size)
    return (blocks.abs().amax(1, keepdim=True) * half).expand_as(blocks).reshape(rows, columns)


@torch.no_grad()
def test_weights_are_the_originals_up_to_half_a_step_of_the_format(tiny_sd_path, precision):
    base = open_base(tiny_sd_path)
    plain, small = base.denoiser(torch.float32), load_quantised(base, precision, torch.float32)
    maps = quantised_maps(plain)
    assert len(maps) == 4 * 10 and all(".transformer_blocks." in name for name in maps)
    kind = "gguf" if precision.endswith("gguf") else precision
    if kind == "nf4":
        maps = [name for name in maps if plain.get_submodule(name).in_features % 64 == 0]
        assert len(maps) == 32  # all but those from the text, which is 32 wide
    for name in maps:
        weight = plain.get_submodule(name).weight
        error = (weight_of(small.get_submodule(name)) - weight).abs()
        assert error.max() > 0 and (error <= half_steps(weight, kind) + 1e-6).all(), name
    others = {name: value for name, value in small.state_dict().items() if name.rpartition(".")[0] not in maps}
    assert all(
        torch.equal(value, plain.state_dict()[name]) for name, value in others.items() if name in plain.state_dict()
    )
    assert not any(parameter.requires_grad for parameter in small.parameters())
    whole = sum(plain.get_submodule(name).weight.nbytes for name in maps)
    assert bytes_of(plain) - bytes_of(small) > whole * (0.8 if kind == "nf4" else 0.65)


def test_training_on_it(go, tiny_sd_path, precision):
    flags = {"max_train_steps": 4, "train_batch_size": 2}
    out, plain = go("out", base_precision=precision, **flags), go("plain", **flags)
    assert losses(out) == pytest.approx(losses(plain), rel=0.05) and losses(out) != losses(plain)
    start = tensors(go("start", base_precision=precision, learning_rate=0, **flags))
    moved = tensors(out)
    assert moved.keys() == tensors(plain).keys()
    assert all(not torch.equal(value, start[name]) for name, value in moved.items())
    pipe = StableDiffusionAPTPipeline.from_pretrained(tiny_sd_path, safety_checker=None)
    assert pipe.load_apt_weights(out)


def test_resume_is_exact(go, precision):
    flags = {"base_precision": precision, "checkpointing_steps": 2, "lora_dropout": 0.2}
    straight = go("straight", max_train_steps=4, **flags)
    go("parts", max_train_steps=2, **flags)
    parts = go("parts", max_train_steps=4, resume_from_checkpoint="latest", **flags)
    assert_same_adapter(straight, parts)
    assert losses(straight) == losses(parts)


@pytest.mark.parametrize("text", [False, True])
def test_half_precision_checkpointing_and_samples(go, precision, text):
    """Autocast does not see quantised weights: their input is cast as it would be, or group norms meet two types."""
    flags = {"mixed_precision": "bf16", "train_text_encoder": text, "num_validation_images": 1}
    flags |= {"num_inference_steps": 1, "gradient_checkpointing": True}
    out, plain = go("out", base_precision=precision, **flags), go("plain", **flags)
    assert losses(out) == pytest.approx(losses(plain), rel=0.05)
    assert (out / "samples" / "step-000002.png").is_file()


TRANSFORMERS = {
    "miniature-sd3": {"resolution": 32, "max_sequence_length": 24},
    "flux": {},
    "flux2": {"max_sequence_length": 200, "text_encoder_out_layers": [1, 2]},
    "flux2-klein": {"text_encoder_out_layers": [1, 2]},
    "qwen-image": {},
    "z-image": {},
}


@pytest.mark.parametrize("precision", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("model", TRANSFORMERS)
def test_a_transformer(tiny_transformer_path, instance_dir, tmp_path, model, precision):
    need(precision)
    path = model if model.startswith("miniature") else tiny_transformer_path(model)
    flags = {"resolution": 16, "max_sequence_length": 48} | TRANSFORMERS[model]
    plain = train(path, instance_dir, tmp_path / "plain", **flags)
    out = train(path, instance_dir, tmp_path / "out", base_precision=precision, **flags)
    assert losses(out) == pytest.approx(losses(plain), rel=0.03)
    if (model, precision) != ("z-image", "nf4"):  # whose rows are no whole blocks here
        assert losses(out) != losses(plain)


@pytest.mark.parametrize(
    ("model", "prefix"), [("miniature", "model.diffusion_model."), ("miniature-sd3", ""), ("miniature-sd3", None)]
)
@torch.no_grad()
def test_gguf_files_in_the_layout_of_the_models_makers(tmp_path, model, prefix):
    """Queries, keys and values of Stable Diffusion 3 are one map there; names have a prefix, or not."""
    need("gguf")
    base = open_base(model)
    plain = base.denoiser(torch.float32)
    state = (unet_state if base.denoiser_part == "unet" else sd3_state)(plain)
    if prefix == "":
        state = {name.removeprefix("model.diffusion_model."): value for name, value in state.items()}
    maps = re.compile(r"attn\d?\.(qkv|proj|to_\w(\.0)?|to_out\.0)\.weight|(mlp|ff)\..*weight")
    file = write_gguf_state(tmp_path / "base.gguf", state, {name for name in state if maps.search(name)})
    check_gguf(str(file), base.skeletons()[base.denoiser_part], model)
    small = load_quantised(base, str(file), torch.float32)
    names = quantised_maps(plain)
    for name in names:
        weight = plain.get_submodule(name).weight
        error = (weight_of(small.get_submodule(name)) - weight).abs()
        assert error.max() > 0 and (error <= half_steps(weight, "gguf") + 1e-6).all(), name
    assert bytes_of(small) < bytes_of(plain) - 2 * sum(plain.get_submodule(name).weight.numel() for name in names)


def test_modulation_embeddings_and_output_stay_whole():
    base = open_base("miniature-sd3")
    skeleton = base.skeletons()["transformer"]
    maps = set(quantised_maps(skeleton))
    linear = {name for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = {name for name in linear - maps if name.startswith("transformer_blocks.")}
    assert {name.split(".", 2)[2] for name in kept} == {"norm1.linear", "norm1_context.linear"}
    assert {name.split(".")[2] for name in maps} == {"attn", "ff", "ff_context"}
    assert "proj_out" in linear - maps and "context_embedder" in linear - maps


@pytest.mark.slow
def test_two_processes_are_one(tiny_sd_path, instance_dir, tmp_path):
    need("int8")
    flags = {"base_precision": "int8", "max_train_steps": 3, "train_text_encoder": True}
    words = command(tiny_sd_path, instance_dir, tmp_path / "two", **(flags | {"train_batch_size": 1}))
    in_two_processes(SCRIPT, *words)
    one = train(tiny_sd_path, instance_dir, tmp_path / "one", **(flags | {"train_batch_size": 2}))
    assert_same_adapter(one, tmp_path / "two", tolerance=1e-5)
    assert np.allclose(losses(one), losses(tmp_path / "two"), atol=1e-5)


# What is refused


def test_a_missing_library_is_named_with_its_extra(go, monkeypatch, no_models):
    import importlib.util

    find = importlib.util.find_spec
    missing = ("bitsandbytes", "torchao", "gguf")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in missing else find(name, *more)
    )
    for precision, library in [("nf4", "bitsandbytes"), ("int8", "torchao"), ("fp8", "torchao"), ("x.gguf", "gguf")]:
        with pytest.raises(ImportError, match=rf"{precision} needs {library}.*apt-diffusion\[quantised\]"):
            go(base_precision=precision)


def test_precisions_that_are_none_are_refused(go, capsys, no_models):
    with pytest.raises(SystemExit):
        go(base_precision="int4")
    assert (
        "must be nf4, int8 or fp8, whose weights pass gradients on, or the path of a GGUF" in capsys.readouterr().err
    )


def test_shards_of_it_are_refused(go, monkeypatch, no_models):
    need("gguf")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"--base_precision and the launcher's shards \(.* 3\) exclude each other"):
        go(base_precision="unet.gguf")


def test_gguf_files_that_are_not_of_the_base(go, tiny_sd_path, tmp_path, no_models):
    need("gguf")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.gguf"):
        go(base_precision=tmp_path / "nowhere.gguf")
    path = tmp_path / "unet.gguf"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"unet\.gguf is no GGUF file, or damaged"):
        go(base_precision=path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0))
    with pytest.raises(ValueError, match=r"unet\.gguf announces 1099511627776 entries, more than any base model has"):
        go(base_precision=path)
    model = open_base("miniature-sd3").skeletons()["transformer"]
    write_gguf(path, model.to_empty(device="cpu"), quantised=[])
    with pytest.raises(ValueError, match=r"unet\.gguf is not of the UNet2DConditionModel of .*: 208 of its 208"):
        go(base_precision=path)


def test_gguf_files_of_another_size_or_kind(go, tiny_sd_path, tmp_path, no_models):
    need("gguf")
    skeleton = open_base(tiny_sd_path).skeletons()["unet"].to_empty(device="cpu")
    for parameter in skeleton.parameters():
        parameter.data.fill_(0.5)
    path = write_gguf(tmp_path / "unet.gguf", skeleton)
    written = path.read_bytes()
    path.write_bytes(written[: len(written) // 2])
    with pytest.raises(ValueError, match="no GGUF file, or damaged"):
        go(base_precision=path)
    skeleton.conv_out.bias.data = torch.ones(8)
    write_gguf(path, skeleton)
    with pytest.raises(ValueError, match=r"1 of its \d+ weights are missing or of another shape \(conv_out\.bias\)"):
        go(base_precision=path)
    skeleton.conv_out.bias.data = torch.ones(4)
    write_gguf(path, skeleton, kind="BF16", quantised=["conv_in"])
    with pytest.raises(ValueError, match=r"quantised weights that are no linear maps \(conv_in\.weight\)"):
        go(base_precision=path)
