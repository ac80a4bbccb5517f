"""Checkpointing of some blocks (`--gradient_checkpointing_blocks`); weights in main memory (`--group_offload`)."""

import collections
import copy
import weakref

import pytest
import torch
from support.launching import in_two_processes
from support.training_helpers import SCRIPT, assert_same_adapter, command, losses, train
from torch import nn

from apt_diffusion import APTConfig, add_apt, freeze_base
from apt_diffusion.training.activations import blocks_of, checkpoint_blocks
from apt_diffusion.training.frozen_blocks import offload_blocks, offloads_blocks
from apt_diffusion.training.text_to_image.bases import open_base

CPU = torch.device("cpu")


@pytest.fixture(params=["unet", "transformer"])
def model(request, tiny_sd_path):
    """A denoiser with an adapter, and its inputs."""
    base = open_base(str(tiny_sd_path) if request.param == "unet" else "miniature-sd3")
    denoiser = base.denoiser(torch.float32)
    add_apt(denoiser, APTConfig(num_prompts=4))
    freeze_base(denoiser)
    draws, config = torch.Generator().manual_seed(0), denoiser.config
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draws)
    noisy, times = torch.randn(2, config.in_channels, 8, 8, generator=draws), torch.tensor([10.0, 700.0])
    if request.param == "unet":
        inputs = {"sample": noisy, "timestep": times}
        width = config.cross_attention_dim
    else:
        pooled = torch.randn(2, config.pooled_projection_dim, generator=draws)
        inputs = {"hidden_states": noisy, "timestep": times, "pooled_projections": pooled}
        width = config.joint_attention_dim
    texts = torch.randn(2, 7, width, generator=draws)
    return denoiser.train(), inputs | {"encoder_hidden_states": texts}


def gradients(denoiser, inputs):
    output = denoiser(**inputs, return_dict=False)[0]
    output.mul(torch.arange(output.numel()).view_as(output) / output.numel()).sum().backward()
    return {name: parameter.grad for name, parameter in denoiser.named_parameters() if parameter.requires_grad}


def assert_same(found, expected):
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(gradient.abs().max() > 0 for gradient in expected.values())


# Some blocks


def test_blocks_are_computed_twice_where_they_are_named_and_gradients_are_the_same(model):
    denoiser, inputs = model
    prefix = "up_blocks" if "sample" in inputs else "transformer_blocks.1"
    some = copy.deepcopy(denoiser)
    checkpoint_blocks(some, [prefix])
    runs = collections.Counter()
    for name, block in blocks_of(some).items():
        block.register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
    assert_same(gradients(some, inputs), gradients(denoiser, inputs))
    chosen = set(blocks_of(some, [prefix]))
    assert {name for name, count in runs.items() if count == 2} == chosen
    assert chosen and set(runs) > chosen and set(runs) == set(blocks_of(some))


def test_names_are_whole_parts_and_blocks_hold_no_others(tiny_sd_path):
    unet = open_base(str(tiny_sd_path)).skeletons()["unet"]
    names = blocks_of(unet)
    assert not any(other.startswith(f"{name}.") for name in names for other in names)
    assert {type(block).__name__ for block in names.values()} == {"BasicTransformerBlock", "ResnetBlock2D"}
    assert set(blocks_of(unet, ["up_blocks.0", "mid_block"])) == {
        name for name in names if name.startswith(("up_blocks.0.", "mid_block."))
    }
    for prefix in ("up_block", "up", "conv_in", "up_blocks.7"):
        with pytest.raises(ValueError, match=rf"--gradient_checkpointing_blocks {prefix}: .* with down_blocks, "):
            blocks_of(unet, [prefix])


def test_a_run_with_some_blocks_checkpointed_is_the_plain_run(go, no_models, monkeypatch):
    with pytest.raises(ValueError, match="no block of this UNet2DConditionModel has a name that begins so"):
        go(gradient_checkpointing_blocks=["transformer_blocks"])
    monkeypatch.undo()
    plain = go("plain", lora_dropout=0.2)
    assert_same_adapter(plain, go("some", lora_dropout=0.2, gradient_checkpointing_blocks=["up_blocks", "mid_block"]))


# Weights in main memory


def test_gradients_with_weights_in_main_memory_are_the_same(model):
    denoiser, inputs = model
    expected = gradients(copy.deepcopy(denoiser), inputs)
    for checkpointing in (False, True):
        moved = copy.deepcopy(denoiser)
        frozen = {name: value for name, value in moved.named_parameters() if not value.requires_grad}
        trained = {name: value for name, value in moved.named_parameters() if value.requires_grad}
        assert not offloads_blocks(moved)
        kept = offload_blocks(moved, CPU)
        assert offloads_blocks(moved)
        if checkpointing:
            moved.enable_gradient_checkpointing()
        assert_same(gradients(moved, inputs), expected)
        after = dict(moved.named_parameters())
        assert all(after[name] is value for name, value in trained.items())
        assert all(after[name].data_ptr() == value.data_ptr() for name, value in frozen.items())
        of_blocks = [f"{name}." for name in blocks_of(moved)]
        assert kept == sum(v.nbytes for name, v in frozen.items() if name.startswith(tuple(of_blocks)))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_one_block_at_a_time_is_on_the_device(model, checkpointing):
    """Counts copies that are alive whenever a block begins, forwards and again in the backward pass."""
    denoiser, inputs = model
    offload_blocks(denoiser, CPU)
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    copies: list[tuple[str, weakref.ref]] = []
    alive = []

    def note(block, args, *, name):
        # Not the parameters, which the graph lets go of: what they hold.
        copies.extend(
            (name, weakref.ref(parameter.untyped_storage()))
            for parameter in block.parameters()
            if not parameter.requires_grad
        )
        alive.append(len({owner for owner, copy_of in copies if copy_of() is not None}))

    for name, block in blocks_of(denoiser).items():
        block.register_forward_pre_hook(lambda block, args, name=name: note(block, args, name=name))
    gradients(denoiser, inputs)
    count = len(blocks_of(denoiser))
    if checkpointing:
        assert len(alive) > count and max(alive) <= 3
    else:  # the graph has those of all blocks from the first adapter on
        assert len(alive) == count and max(alive) >= count - 2


def test_a_run_is_the_plain_run_and_resumes(go):
    flags = {"gradient_checkpointing": True, "max_train_steps": 4, "checkpointing_steps": 2, "lora_dropout": 0.2}
    flags |= {"train_text_encoder": True, "num_validation_images": 1, "num_inference_steps": 1}
    plain = go("plain", **flags)
    out = go("out", group_offload=True, **flags)
    assert_same_adapter(plain, out)
    assert losses(plain) == losses(out)
    assert (plain / "samples" / "step-000004.png").read_bytes() == (out / "samples" / "step-000004.png").read_bytes()
    go("parts", group_offload=True, **(flags | {"max_train_steps": 2}))
    assert_same_adapter(plain, go("parts", group_offload=True, resume_from_checkpoint="latest", **flags))


def test_a_transformer_in_half_precision(instance_dir, tmp_path):
    flags = {"resolution": 32, "max_sequence_length": 24, "mixed_precision": "bf16", "gradient_checkpointing": True}
    plain = train("miniature-sd3", instance_dir, tmp_path / "plain", **flags)
    assert_same_adapter(plain, train("miniature-sd3", instance_dir, tmp_path / "out", group_offload=True, **flags))


@pytest.mark.slow
def test_two_processes_are_one(tiny_sd_path, instance_dir, tmp_path):
    flags = {"group_offload": True, "gradient_checkpointing": True, "max_train_steps": 3}
    words = command(tiny_sd_path, instance_dir, tmp_path / "two", **(flags | {"train_batch_size": 1}))
    in_two_processes(SCRIPT, *words)
    one = train(tiny_sd_path, instance_dir, tmp_path / "one", **(flags | {"train_batch_size": 2}))
    assert_same_adapter(one, tmp_path / "two", tolerance=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "--group_offload needs --gradient_checkpointing of all blocks"),
        ({"gradient_checkpointing_blocks": ["up_blocks"]}, "--group_offload needs --gradient_checkpointing of all"),
        ({"base_precision": "int8"}, "--group_offload and --base_precision exclude each other"),
    ],
)
def test_what_it_cannot_be_used_with_is_refused(go, no_models, flags, message):
    checkpointing = {"gradient_checkpointing": "base_precision" in flags}
    with pytest.raises(ValueError, match=message):
        go(group_offload=True, **flags, **checkpointing)


def test_shards_are_refused(go, no_models, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"--group_offload and the launcher's shards \(.* 3\) exclude each other"):
        go(group_offload=True, gradient_checkpointing=True)


def test_models_of_other_makers_have_no_blocks():
    class Other(nn.Module):
        _repeated_blocks = None
        _no_split_modules = None

    assert blocks_of(Other()) == {}
