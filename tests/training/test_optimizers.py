"""Optimizers by name and by class: what they do, exact resume of each, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.training_helpers import assert_same_adapter, command, losses, tensors, train
from torch import nn

from apt_diffusion.training.checkpoints import OPTIMIZER_NAME, TRAINED_NAME
from apt_diffusion.training.optimizer_choice import NAMED, make_optimizer, parse_settings, takes
from apt_diffusion.training.text_to_image.arguments import parse_args

OPTIMIZERS = {
    "adamw": {},
    "adamw8bit": {"num_prompts": 200},  # fewer numbers are kept in float32
    "adafactor": {},
    "sgd": {"optimizer_args": ["nesterov=True"]},
    "lion": {"learning_rate": 1e-3},
    "prodigy": {"learning_rate": 1.0, "optimizer_args": ["d_coef=100.0", "use_bias_correction=True"]},
    "muon": {},
    "schedulefree": {"optimizer_args": ["weight_lr_power=1.0"]},
    "torch.optim.NAdam": {},
    "torch.optim.RAdam": {},
    "torch.optim.RMSprop": {"optimizer_args": ["momentum=0.5", "centered=True"]},
    "torch.optim.Adagrad": {},
    "torch.optim.Rprop": {},
}  # fmt: skip


def skip_without(name):
    if name in NAMED:
        pytest.importorskip(NAMED[name][0].partition(".")[0])


@pytest.fixture
def go(tiny_sd_path, instance_dir, tmp_path):
    def run(out, **flags):
        return train(tiny_sd_path, instance_dir, tmp_path / out, **flags)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_steps_and_three_resumed_are_six_straight(go, name):
    skip_without(name)
    flags = {"optimizer": name, "train_batch_size": 1, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2}
    flags |= OPTIMIZERS[name]
    straight = go("straight", max_train_steps=6, **flags)
    go("parts", max_train_steps=3, **flags)
    parts = go("parts", max_train_steps=6, resume_from_checkpoint="latest", **flags)
    assert losses(straight) == losses(parts)
    assert_same_adapter(straight, parts)
    middle = tensors(straight)
    assert any(not torch.equal(value, middle[key]) for key, value in tensors(parts / "checkpoint-3").items())
    states = load_file(parts / "checkpoint-3" / OPTIMIZER_NAME).values()
    assert any(state.dtype == torch.uint8 for state in states) == (name == "adamw8bit")


def test_state_that_stands_with_the_settings_is_kept(go):
    """Prodigy estimates its rate over all parameters and keeps it next to its settings."""
    pytest.importorskip("prodigyopt")
    out = go("out", optimizer="prodigy", learning_rate=1.0, max_train_steps=3)
    (group,) = json.loads((out / "checkpoint-3" / "training_state.json").read_text())["groups"]
    assert group["k"] == 3 and "d_numerator" in group and "weight_decay" not in group and "lr" not in group


def test_a_resumed_run_may_have_other_settings(go):
    """What somebody sets is no state."""
    go("out", optimizer="sgd", max_train_steps=2)
    other = go(
        "out", optimizer="sgd", max_train_steps=4, resume_from_checkpoint="latest", optimizer_args=["momentum=0"]
    )
    assert len(losses(other)) == 4


def test_another_optimizer_is_refused_by_its_name(go, request):
    go("out", optimizer="sgd", max_train_steps=2)
    go("out", optimizer="torch.optim.SGD", max_train_steps=2, resume_from_checkpoint="latest")  # the same class
    request.getfixturevalue("no_models")
    with pytest.raises(ValueError, match="was trained with --optimizer sgd, whose state adamw cannot go on with"):
        go("out", max_train_steps=4, resume_from_checkpoint="latest")


def test_names_stand_for_their_classes_with_the_usual_flags():
    weights = {"a": nn.Parameter(torch.ones(2, 2)), "b": nn.Parameter(torch.ones(2))}
    usual = {"betas": (0.8, 0.9), "eps": 1e-5, "weight_decay": 0.25}
    groups = [({"a": weights["a"]}, 0.1), ({"b": weights["b"]}, 0.2)]
    adamw = make_optimizer("adamw", groups, usual, {})
    assert type(adamw) is torch.optim.AdamW and [group["lr"] for group in adamw.param_groups] == [0.1, 0.2]
    assert all((g["betas"], g["eps"], g["weight_decay"]) == ((0.8, 0.9), 1e-5, 0.25) for g in adamw.param_groups)
    sgd = make_optimizer("sgd", groups, usual, {"momentum": 0.5})
    assert sgd.defaults["momentum"] == 0.5 and sgd.defaults["weight_decay"] == 0.25
    assert takes("adamw") == {"betas", "eps", "weight_decay"}
    assert takes("sgd") == takes("adafactor") == {"weight_decay"}  # Adafactor's eps are two numbers


def test_arguments_are_python_values_or_words():
    words = ["momentum=0.9", "nesterov=True", "betas=(0.9, 0.99)", "mode=fast", "empty="]
    expected = {"momentum": 0.9, "nesterov": True, "betas": (0.9, 0.99), "mode": "fast", "empty": ""}
    assert parse_settings(words) == expected


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"optimizer": "adamv"}, ValueError, "--optimizer adamv: expected adamw, adamw8bit"),
        ({"optimizer": "torch.optim.Adamm"}, ValueError, "torch.optim has no optimizer of the name 'Adamm'"),
        ({"optimizer": "torch.nn.Linear"}, ValueError, "torch.nn has no optimizer of the name 'Linear'"),
        ({"optimizer": "nowhere.Best"}, ImportError, "--optimizer nowhere.Best needs nowhere: `pip install nowhere`"),
        ({"optimizer_args": ["momentum"]}, ValueError, "expected NAME=VALUE"),
        ({"optimizer_args": ["lr=5"]}, ValueError, "--optimizer_args lr=5: --learning_rate"),
        ({"optimizer": "muon", "optimizer_args": ["momentum=abc"]}, ValueError, "--optimizer muon cannot"),
        ({"optimizer": "muon", "optimizer_args": ["ns_steps=500"]}, ValueError, "--optimizer muon cannot"),
        ({"optimizer_args": ["colour=red"]}, ValueError, "cannot be made with .*colour"),
        ({"optimizer": "sgd", "use_8bit_adam": True}, ValueError, "--use_8bit_adam and --optimizer sgd contradict"),
    ],
)
def test_what_cannot_work_is_refused_when_flags_are_read(flags, error, message, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(error, match=message):
        parse_args(command("m", "d", "o", **flags))


def test_muon_takes_matrices_and_adamw_the_rest():
    torch.manual_seed(0)
    values, gradients = (
        [torch.randn(4, 3), torch.randn(3), torch.randn(())],
        [torch.randn(4, 3), torch.randn(3), torch.randn(())],
    )
    joined, apart = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    groups = [({"a": joined[0], "b": joined[1]}, 0.1), ({"c": joined[2]}, 0.01)]
    usual = {"betas": (0.8, 0.9), "weight_decay": 0.1}
    ours = make_optimizer("muon", groups, usual, {"momentum": 0.5})
    muon = torch.optim.Muon([apart[0]], 0.1, weight_decay=0.1, momentum=0.5, adjust_lr_fn="match_rms_adamw")
    rest = [{"params": [apart[1]], "lr": 0.1}, {"params": [apart[2]], "lr": 0.01}]
    adamw = torch.optim.AdamW(rest, betas=(0.8, 0.9), weight_decay=0.1)
    for step in range(4):
        for parameters in (joined, apart):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient * (step + 1)
        ours.step()
        muon.step()
        adamw.step()
        if step == 1:  # what a checkpoint does
            again = make_optimizer("muon", groups, usual, {"momentum": 0.5})
            again.load_state_dict(ours.state_dict())
            ours = again
    assert all(torch.equal(a, b) for a, b in zip(joined, apart, strict=True))
    assert not torch.equal(joined[0], values[0]) and ours.state[joined[2]]["step"] == 4


def test_a_schedule_free_adapter_is_the_average_and_samples_do_not_disturb_it(go):
    """At y the gradient is taken, x is for use, z is stepped: y = (1 - β1) z + β1 x (arXiv 2405.15682)."""
    pytest.importorskip("schedulefree")
    flags = {"optimizer": "schedulefree", "max_train_steps": 4, "adam_beta1": 0.8, "checkpointing_steps": 4}
    looked = {"validation_split": 0.2, "validation_steps": 1, "validation_prompt": "a glyph", "num_inference_steps": 1}
    out = go("out", **flags, **looked, num_validation_images=1)
    plain = go("plain", **flags, validation_split=0.2, validation_steps=100)
    assert_same_adapter(out, plain)
    assert losses(out) == losses(plain)
    kept = load_file(out / "checkpoint-4" / "optimizer.safetensors")
    trained = load_file(out / "checkpoint-4" / TRAINED_NAME)
    adapter = {key.replace(".apt.", ".apt.adapters.default."): value for key, value in tensors(out).items()}
    assert adapter.keys() == trained.keys()
    for name, y in trained.items():
        x = (y - 0.2 * kept[f"{name}.z"]) / 0.8
        assert torch.allclose(adapter[name], x, atol=1e-6), name
    assert any(not torch.equal(adapter[name], y) for name, y in trained.items())


def test_rates_that_the_optimizer_cannot_have_are_refused_when_flags_are_read():
    pytest.importorskip("prodigyopt")
    flags = {"optimizer": "prodigy", "learning_rate": 1.0}
    parse_args(command("m", "d", "o", **flags, train_text_encoder=True))
    for more in ({"keys_lr_ratio": 0.3}, {"train_text_encoder": True, "text_encoder_lr": 0.5}):
        with pytest.raises(ValueError, match=r"prodigy cannot take a step .* different lr values"):
            parse_args(command("m", "d", "o", **flags, **more))


def test_two_averages_are_refused():
    pytest.importorskip("schedulefree")
    with pytest.raises(ValueError, match="keeps an average of its own: leave out --use_ema"):
        parse_args(command("m", "d", "o", optimizer="schedulefree", use_ema=True))


def test_a_setting_that_the_optimizer_does_not_have_is_said(go, caplog):
    go("out", optimizer="sgd", adam_beta1=0.5)
    assert "--adam_beta1 is no setting of --optimizer sgd" in caplog.text
