"""Learning rates of each kind of parameter: what the optimizer has in every step, what moves, what is logged."""

import json

import pytest
import torch
from support.training_helpers import tensors

SGD = {"optimizer": "sgd", "optimizer_args": ["momentum=0.0"], "adam_weight_decay": 0.0, "max_grad_norm": 1e9}
RATIOS = {"prompts_lr_ratio": 2.0, "keys_lr_ratio": 0.5, "log_scale_lr_ratio": 0.0, "gate_lr_ratio": 10.0}
KINDS = {"prompts": 2.0, "low_rank_down": 0.5, "low_rank_up": 0.5, "log_scale": 0.0, "gate": 10.0}


@pytest.fixture
def watched(go, monkeypatch):
    """Runs and records `{name of a parameter: its rate}` of the optimizer in every step."""
    import train_apt_sd

    def run(**flags):
        steps, original = [], train_apt_sd.make_optimizer

        def watching(session, parameters):
            optimizer, rates = original(session, parameters)
            names = {id(parameter): name for name, parameter in parameters.items()}

            def note(found, *_):
                steps.append({names[id(p)]: group["lr"] for group in found.param_groups for p in group["params"]})

            optimizer.register_step_pre_hook(note)
            return optimizer, rates

        monkeypatch.setattr(train_apt_sd, "make_optimizer", watching)
        out = go(**flags)
        return steps, [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]

    return run


def test_every_parameter_has_the_rate_that_was_asked_for_in_every_step(watched):
    flags = {"train_text_encoder": True, "text_encoder_lr": 1e-3, "learning_rate": 1e-2} | RATIOS
    steps, rows = watched(lr_scheduler="linear", lr_warmup_steps=1, max_train_steps=4, **flags)
    for step, (rates, row) in enumerate(zip(steps, rows, strict=True)):
        factor = 0 if step == 0 else (4 - step) / 3  # a warm-up of one step, then down to 0
        for name, rate in rates.items():
            base = 1e-3 if name.startswith("text_encoder") else 1e-2
            assert rate == pytest.approx(base * factor * KINDS[name.rpartition(".")[2]]), name
        logged = {name: value for name, value in row.items() if name.endswith("lr")}
        wanted = {"lr": 1e-2, "prompts_lr": 2e-2, "keys_lr": 5e-3, "log_scale_lr": 0.0, "gate_lr": 1e-1}
        wanted |= {f"text_encoder_{name}": value / 10 for name, value in wanted.items() if name != "lr"}
        assert logged == pytest.approx({name: value * factor for name, value in wanted.items()})


def test_the_others_keep_the_rate_of_their_component(watched, caplog):
    (rates,), (row,) = watched(keys_lr_ratio=0.1, scale_lr=True, max_train_steps=1, learning_rate=1e-2)
    assert {name: row[name] for name in row if name.endswith("lr")} == pytest.approx({"lr": 2e-2, "keys_lr": 2e-3})
    for name, rate in rates.items():
        assert rate == pytest.approx(2e-3 if ".low_rank_" in name else 2e-2), name
    (message,) = [text for text in caplog.messages if "Learning rates" in text]
    assert "lr 0.02 of" in message and "keys_lr 0.002 of" in message


def test_a_step_of_sgd_is_as_much_larger_as_the_ratio(go):
    flags = {"init": "paper", "max_train_steps": 1} | SGD
    start = tensors(go("start", learning_rate=0.0, **flags))
    plain = tensors(go("plain", **flags))
    others = {name: ratio for name, ratio in RATIOS.items() if name != "gate_lr_ratio"}
    changed = tensors(go("changed", **flags, **others))
    moved = set()
    for name, value in start.items():
        kind = name.rpartition(".")[2]
        once, now = plain[name] - value, changed[name] - value
        assert torch.allclose(now, KINDS[kind] * once, rtol=1e-4, atol=1e-7), name
        moved |= {kind} if once.abs().max() > 1e-6 else set()
    assert {"prompts", "low_rank_up", "log_scale"} <= moved


def test_a_ratio_without_a_gate_is_named(go, caplog):
    go("out", init="paper", gate_lr_ratio=2.0)
    assert any("--gate_lr_ratio needs --init identity" in message for message in caplog.messages)
