"""The moving average of the adapter (`--use_ema`): its closed form, where it is used, exact resume."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.training_helpers import assert_same_adapter, losses, tensors

from apt_diffusion import APTConfig, add_apt, freeze_base
from apt_diffusion.training.average import MovingAverage
from apt_diffusion.training.checkpoints import TRAINED_NAME

FLAGS = {"max_train_steps": 4, "checkpointing_steps": 1, "use_ema": True}


def trained(checkpoint):
    """The weights of the last step, under the names that the adapter's file has."""
    found = load_file(checkpoint / TRAINED_NAME)
    return {name.replace(".adapters.default", ""): value for name, value in found.items()}


@pytest.mark.parametrize("decay", [0.9999, 0.15])
def test_checkpoints_and_result_have_the_average_by_its_closed_form(go, decay):
    out = go("out", ema_decay=decay, **FLAGS)
    average = None
    for step in range(1, 5):
        now = {name: value.double() for name, value in trained(out / f"checkpoint-{step}").items()}
        kept = min(step / (9 + step), decay) if step > 1 else 0  # (1 + n) / (10 + n) with n = step - 1
        average = now if average is None else {k: kept * average[k] + (1 - kept) * now[k] for k in now}
        saved = tensors(out / f"checkpoint-{step}")
        assert saved.keys() == average.keys()
        for name, value in saved.items():
            assert torch.allclose(value.double(), average[name], rtol=1e-6, atol=1e-7), (step, name)
    assert_same_adapter(out, out / "checkpoint-4")
    assert any((average[name] - value).abs().max() > 1e-4 for name, value in now.items())


def test_it_does_not_disturb_the_training(go):
    averaged, plain = go("averaged", **FLAGS), go("plain", **FLAGS | {"use_ema": False})
    assert losses(averaged) == losses(plain)
    weights = tensors(plain)
    assert all(torch.equal(value, weights[name]) for name, value in trained(averaged / "checkpoint-4").items())


def test_losses_and_samples_are_those_of_the_average(go, monkeypatch):
    import train_apt_sd

    seen = {"validation_loss": [], "draw_samples": []}

    def watch(name):
        original = getattr(train_apt_sd, name)

        def watching(session, learner, *others):
            values = {key: value.detach().clone() for key, value in learner.parameters.items()}
            seen[name].append({key.replace(".adapters.default", ""): value for key, value in values.items()})
            return original(session, learner, *others)

        monkeypatch.setattr(train_apt_sd, name, watching)

    for name in seen:
        watch(name)
    drawn = {"validation_prompt": "x", "num_validation_images": 1, "num_inference_steps": 1}
    out = go("out", validation_split=0.2, validation_steps=1, **drawn, **FLAGS)
    for name, values in seen.items():
        assert len(values) == 4, name
        for step, found in enumerate(values, 1):
            saved = tensors(out / f"checkpoint-{step}")
            assert all(torch.equal(found[key], saved[key]) for key in saved), (name, step)


def test_two_steps_and_two_resumed_are_four_straight(go):
    flags = FLAGS | {"lora_dropout": 0.2}
    straight = go("straight", **flags)
    go("parts", **flags | {"max_train_steps": 2})
    parts = go("parts", resume_from_checkpoint="latest", **flags)
    assert losses(straight) == losses(parts)
    assert_same_adapter(straight, parts)
    ends = [trained(out / "checkpoint-4") for out in (straight, parts)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_run_may_be_resumed_with_or_without_it(go):
    flags = FLAGS | {"use_ema": False}
    straight = go("straight", **flags)
    go("parts", **FLAGS | {"max_train_steps": 2})
    without = go("parts", resume_from_checkpoint="latest", **flags)
    assert_same_adapter(straight, without)
    assert not (without / "checkpoint-4" / TRAINED_NAME).exists()
    begun = go("parts", resume_from_checkpoint="checkpoint-3", **FLAGS)
    weights, saved = trained(begun / "checkpoint-4"), tensors(begun)
    assert all(np.allclose(value, saved[name], atol=1e-6) for name, value in weights.items())  # its first step


def test_keys_that_were_kept_from_other_weights_are_not_used():
    """Inference keeps the prompts' keys until prompts change: the exchange must be seen."""
    from conftest import make_unet, randomize

    torch.manual_seed(0)
    unet = make_unet().eval()
    add_apt(unet, APTConfig(num_prompts=4))
    randomize(unet, seed=1)
    freeze_base(unet)
    parameters = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    average = MovingAverage(parameters, 0.5)
    inputs = torch.randn(1, 4, 8, 8), 5, torch.randn(1, 3, 32)
    with torch.no_grad():
        before = unet(*inputs).sample
        for parameter in parameters.values():
            parameter.add_(0.3)
        average.step()  # the first copies
        for parameter in parameters.values():
            parameter.add_(0.3)
        average.step()  # (1 + 1) / (10 + 1)
        after = unet(*inputs).sample
        reference = copy.deepcopy(unet)
        for parameter in (p for p in reference.parameters() if p.requires_grad):
            parameter.sub_(0.3 * 2 / 11)
        with average.applied():
            inside = unet(*inputs).sample
            with average.applied():  # once is enough
                assert torch.equal(unet(*inputs).sample, inside)
        assert torch.allclose(inside, reference(*inputs).sample, atol=1e-5)
        assert torch.equal(unet(*inputs).sample, after)
    assert (inside - after).abs().max() > 1e-3 and (before - after).abs().max() > 1e-3
