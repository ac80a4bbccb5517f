"""Optimizers by name and by class: what they do, exact resume of each, and what is refused."""

import json

import pytest
import torch
from support.training_helpers import assert_same_adapter, command, losses, tensors, train
from torch import nn

from apt_diffusion.training.optimizer_choice import NAMED, make_optimizer, parse_settings, takes
from apt_diffusion.training.text_to_image.arguments import parse_args

OPTIMIZERS = {
    "adamw": {},
    "adafactor": {},
    "sgd": {"optimizer_args": ["nesterov=True"]},
    "lion": {"learning_rate": 1e-3},
    "prodigy": {"learning_rate": 1.0, "optimizer_args": ["d_coef=100.0", "use_bias_correction=True"]},
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
        ({"optimizer_args": ["colour=red"]}, ValueError, "cannot be made with .*colour"),
        ({"optimizer": "sgd", "use_8bit_adam": True}, ValueError, "--use_8bit_adam and --optimizer sgd contradict"),
    ],
)
def test_what_cannot_work_is_refused_when_flags_are_read(flags, error, message, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(error, match=message):
        parse_args(command("m", "d", "o", **flags))


def test_optimizers_with_two_sets_of_weights_are_refused(monkeypatch):
    class ScheduleFree(torch.optim.SGD):
        def eval(self):
            """Weights for use."""

    monkeypatch.setattr(torch.optim, "ScheduleFree", ScheduleFree, raising=False)
    with pytest.raises(ValueError, match="schedule-free optimizers are not supported"):
        parse_args(command("m", "d", "o", optimizer="torch.optim.ScheduleFree"))


def test_a_setting_that_the_optimizer_does_not_have_is_said(go, caplog):
    go("out", optimizer="sgd", adam_beta1=0.5)
    assert "--adam_beta1 is no setting of --optimizer sgd" in caplog.text
