"""What the trainers of vision-language models share: exact resume, methods, evaluation, caches, rates, refusals."""

import os
import signal

import numpy as np
import pytest
import torch
from support.launching import in_two_processes
from support.method_helpers import METHODS
from support.vl_helpers import TRAIN, assert_same_weights, card_code, picture, results, rows, train, weights, words

from apt_diffusion.training import checkpoints

SMALL = {"min_answer_count": 3}


@pytest.fixture
def go(tiny_vl, vqa_dir, nlvr2_dir, tmp_path):
    """Runs a script into a folder named `out`."""
    data = {"vqa": vqa_dir, "nlvr2": nlvr2_dir}

    def run(script, kind, out, **flags):
        flags = (SMALL if script == "vqa" else {}) | flags
        return train(script, tiny_vl[kind], data[script], tmp_path / out, **flags)

    return run


@pytest.fixture
def logits(monkeypatch):
    """Collects the logits of all evaluations of question answering."""
    import train_apt_vqa

    found, original = [], train_apt_vqa.predict

    def predict(session, model, examples, collate, read):
        values = original(session, model, examples, collate, lambda output: output.logits)
        found.append(values)
        return values.argmax(-1)

    monkeypatch.setattr(train_apt_vqa, "predict", predict)
    return found


# Stopping and going on

SCENES = {
    "APT, augmented, across an epoch's end": ("vqa", "vilt", {"train_batch_size": 3, "steps": (3, 6)}),
    "APT on METER, accumulated": ("nlvr2", "meter", {"gradient_accumulation_steps": 2}),
    "LoRA": ("vqa", "vilt", {"method": "lora"}),
    "full tuning, bfloat16": ("nlvr2", "vilt", {"method": "full", "mixed_precision": "bf16", "learning_rate": 1e-3}),
}


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
def test_two_steps_and_two_resumed_are_four_straight(go, scene):
    script, kind, flags = SCENES[scene]
    half, whole = flags.get("steps", (2, 4))
    flags = {name: value for name, value in flags.items() if name != "steps"} | {"lr_warmup_steps": 1}
    flags["lr_scheduler"] = "constant_with_warmup"  # one that does not depend on where the end is
    straight = go(script, kind, "straight", max_train_steps=whole, evaluation_steps=2, **flags)
    parts = go(script, kind, "parts", max_train_steps=half, evaluation_steps=2, **flags)
    go(script, kind, "parts", max_train_steps=whole, evaluation_steps=2, resume_from_checkpoint="latest", **flags)
    assert_same_weights(straight, parts)
    assert rows(straight) == rows(parts) and len(rows(parts)) == whole
    assert rows(straight, "metrics.jsonl")[-1] == rows(parts, "metrics.jsonl")[-1]
    assert sorted(checkpoints.list_checkpoints(parts)) == [half, whole]


def test_a_run_that_goes_on_as_it_was_reports_no_changes(go, caplog):
    go("nlvr2", "vilt", "out", max_train_steps=1)
    go("nlvr2", "vilt", "out", max_train_steps=1, resume_from_checkpoint="latest")
    assert "Resuming from" in caplog.text and "Settings that differ" not in caplog.text


@pytest.mark.slow
def test_a_schedule_goes_on_and_a_finished_run_may_be_finished_again(go, tmp_path):
    straight = go("vqa", "vilt", "out", max_train_steps=4, checkpointing_steps=2, evaluation_steps=1)
    before, metrics = weights(straight), rows(straight, "metrics.jsonl")
    (straight / "pytorch_apt_weights.safetensors").unlink()
    go("vqa", "vilt", "out", max_train_steps=4, evaluation_steps=1, resume_from_checkpoint="latest")
    assert all(torch.equal(before[key], value) for key, value in weights(straight).items())
    assert rows(straight, "metrics.jsonl") == metrics and [row["step"] for row in metrics] == [1, 2, 3, 4]
    elsewhere = go(
        "vqa", "vilt", "elsewhere", max_train_steps=4, resume_from_checkpoint=straight / "checkpoint-2"
    )  # a linear schedule and its warmup
    assert_same_weights(straight, elsewhere)
    assert rows(elsewhere) == rows(straight)
    rates = [row["lr"] for row in rows(straight)]
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])


def test_a_signal_saves_a_checkpoint_and_leaves(go, monkeypatch):
    import train_apt_vqa

    straight = go("vqa", "vilt", "straight", max_train_steps=4)
    original, calls = train_apt_vqa.loss, []

    def loss(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_apt_vqa, "loss", loss)
        with pytest.raises(SystemExit) as leave:
            go("vqa", "vilt", "parts", max_train_steps=4)
    parts = straight.parent / "parts"
    assert leave.value.code == 143 and list(checkpoints.list_checkpoints(parts)) == [2]
    assert not (parts / "results.json").exists()
    go("vqa", "vilt", "parts", max_train_steps=4, resume_from_checkpoint="latest")
    assert_same_weights(straight, parts)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(go, monkeypatch):
    straight = go("vqa", "vilt", "straight", max_train_steps=4)
    original = checkpoints.save_training_state

    def full_disk(folder, *args):
        if list(checkpoints.list_checkpoints(folder.parent)):
            raise OSError("No space left on device")
        original(folder, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_training_state", full_disk)
        with pytest.raises(OSError, match="No space left"):
            go("vqa", "vilt", "parts", max_train_steps=4, checkpointing_steps=1)
    parts = straight.parent / "parts"
    assert {path.name for path in parts.iterdir() if path.is_dir()} == {"checkpoint-1"}
    go("vqa", "vilt", "parts", max_train_steps=4, resume_from_checkpoint="latest")
    assert_same_weights(straight, parts)


def test_old_checkpoints_are_removed(go):
    out = go("vqa", "vilt", "out", max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2)
    assert list(checkpoints.list_checkpoints(out)) == [3, 4]


def test_evaluations_do_not_disturb_training(go):
    often = go("vqa", "vilt", "often", max_train_steps=3, evaluation_steps=1)
    never = go("vqa", "vilt", "never", max_train_steps=3, evaluation_steps=100)
    assert_same_weights(often, never)
    assert len(rows(often, "metrics.jsonl")) == 3 and (often / "metrics.png").is_file()
    assert rows(never, "metrics.jsonl") == [{"step": 3, **results(never)["metrics"]}]


# Methods


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vilt", "meter"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_evaluates_to_the_same_answers_later(go, logits, kind, method):
    out = go("vqa", kind, "out", method=method)
    found = results(out)
    assert found["method"] == method and found["base_model"].endswith(found["base_model"].rpartition("/")[2])
    assert found["trained_parameters"] == sum(tensor.numel() for tensor in weights(out).values())
    for adapter in (out, out / "checkpoint-2"):
        again = go("vqa", kind, "again", eval_only=True, adapter=adapter, method=method)
        assert results(again)["metrics"] == found["metrics"] and results(again)["method"] == method
    straight, *later = logits
    assert all(torch.equal(straight, values) for values in later)
    assert "load_apt_weights" in (out / "README.md").read_text() or method != "apt"


@pytest.mark.slow
def test_all_methods_train_what_they_should(go):
    sizes = {method: results(go("nlvr2", "vilt", method, method=method))["trained_parameters"] for method in METHODS}
    heads = sizes.pop("classifier_only")
    # classifier, pooler, and two tables: of the modalities, and of BERT's segments, as in the released code
    assert heads == 64 * 64 + 64 + 2 * 64 + 64 * 2 + 2 + 32 * 32 + 32 + 3 * 32 + 2 * 32
    added = {method: size - heads for method, size in sizes.items() if method != "full"}
    assert added == {
        "apt": 2 * (4 * 32 + 2 * 2 * 32 + 1),
        "shallow_prompt": 4 * 32,
        "deep_prompt": 2 * 4 * 32,
        "adapter": 4 * (2 * 32 * 3 + 3 + 32),
        "scaled_pa": 2 * (2 * 32 * 3 + 3 + 32 + 2 * 32),
        "lora": 2 * 2 * 2 * 32 * 2,
    }


def test_training_goes_on_from_a_trained_adapter(go):
    first = go("vqa", "vilt", "first")
    second = go("vqa", "vilt", "second", adapter=first, learning_rate=1e-12, weight_decay=0.0)
    for key, value in weights(first).items():
        assert torch.allclose(weights(second)[key], value, atol=1e-8)
    with pytest.raises(ValueError, match="trained with other settings: num_prompts 4 there, 5 here"):
        go("vqa", "vilt", "third", adapter=first, num_prompts=5)
    with pytest.raises(ValueError, match="method apt there, lora here"):
        go("vqa", "vilt", "third", adapter=first, method="lora")


@pytest.mark.slow
def test_the_scale_can_be_frozen_as_released(go):
    for freeze in (True, False):
        out = go("nlvr2", "meter", f"frozen-{freeze}", freeze_scale=freeze)
        scales = [value for key, value in weights(out).items() if key.endswith("log_scale")]
        assert len(scales) == 8 and all(bool(scale == 0) == freeze for scale in scales)
    go("nlvr2", "meter", "frozen-True", freeze_scale=True, max_train_steps=3, resume_from_checkpoint="latest")


@pytest.mark.parametrize("kind", ["vilt", "meter"])
def test_a_classifier_token_starts_from_the_first_word_and_is_kept(go, logits, tiny_vl, kind):
    from transformers import AutoTokenizer, ViltModel

    from apt_diffusion.models.meter import MeterModel

    out = go("vqa", kind, "out", use_classifier_token=True, learning_rate=1e-12)
    if kind == "vilt":
        embeddings = ViltModel.from_pretrained(tiny_vl[kind]).eval().embeddings.text_embeddings
        first = AutoTokenizer.from_pretrained(tiny_vl[kind]).cls_token_id
    else:
        embeddings = MeterModel.from_pretrained(tiny_vl[kind]).text_model.eval().embeddings
        first = 0
    (token,) = (value for key, value in weights(out).items() if key.endswith("classifier_token"))
    assert torch.allclose(token, embeddings(torch.tensor([[first]])), atol=1e-6)
    again = go("vqa", kind, "again", use_classifier_token=True, eval_only=True, adapter=out)
    assert results(again)["metrics"] == results(out)["metrics"] and torch.equal(*logits)


# Encoder outputs


@pytest.mark.slow
@pytest.mark.parametrize("script", ["vqa", "nlvr2"])
def test_cached_encoder_outputs_give_the_same_losses(go, script, tmp_path, monkeypatch):
    from apt_diffusion.models.meter import MeterModel

    flags = {"max_train_steps": 3, "dataloader_num_workers": 1, "evaluation_steps": 1}
    straight = go(script, "meter", "straight", augment=False, **{"no-augment": True}, **flags)
    cached = go(script, "meter", "cached", cache_encoder_outputs=tmp_path / "cache", **flags)
    a, b = ([row["loss"] for row in rows(out)] for out in (straight, cached))
    assert np.allclose(a, b, rtol=1e-5) and rows(straight, "metrics.jsonl") == rows(cached, "metrics.jsonl")
    # As a whole: where a gradient is nearly zero, AdamW makes a step of its rounding.
    a, b = (torch.cat([tensor.flatten() for tensor in weights(out).values()]) for out in (straight, cached))
    assert (a - b).norm() < 1e-3 * a.norm()

    def fail(*args):
        pytest.fail("an encoder was asked although its outputs are kept")

    monkeypatch.setattr(MeterModel, "get_image_features", fail)
    monkeypatch.setattr(MeterModel, "get_text_features", fail)
    again = go(script, "meter", "again", method="lora", cache_encoder_outputs=tmp_path / "cache", **flags)
    assert results(again)["method"] == "lora"


@pytest.mark.parametrize(("script", "kind"), [("vqa", "vilt"), ("nlvr2", "meter")])
def test_gradient_checkpointing_changes_nothing(go, script, kind):
    plain = go(script, kind, "plain")
    less_memory = go(script, kind, "less memory", gradient_checkpointing=True)
    assert rows(plain) == rows(less_memory)
    assert_same_weights(plain, less_memory)


def test_results_go_to_the_hub(go, monkeypatch):
    import huggingface_hub

    calls = {}
    repository = type("Repository", (), {"repo_id": "me/vqa"})
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *args, **options: repository)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: calls.update(options))
    out = go("vqa", "vilt", "out", push_to_hub=True, hub_model_id="vqa", hub_token="secret")
    assert calls["repo_id"] == "me/vqa" and calls["token"] == "secret" and calls["folder_path"] == str(out)
    assert {"results.json", "answers.json", "metrics.png"} <= set(calls["allow_patterns"])
    assert "secret" not in (out / "README.md").read_text() + (out / "results.json").read_text()
    assert "load_apt_weights(model, 'me/vqa')" in (out / "README.md").read_text()


# Rates and recipes


def settled(script, model, data, out, **flags):
    """The flags as a run has them, with the base model that they name."""
    import importlib

    from apt_diffusion.training.vision_language.models import find_base

    module = importlib.import_module(f"train_apt_{script}")
    args = module.parse_args(words(model, data, out, **flags))
    return args, find_base(args, module.RECIPES, num_processes=1)


@pytest.mark.parametrize(
    ("script", "kind", "method", "expected"),
    [
        ("vqa", "vilt", "apt", (5e-4, 10, 1, 8, 40, 384)),
        ("vqa", "vilt", "full", (1e-4, 10, 1, 8, 40, 384)),
        ("vqa", "meter", "apt", (2.5e-5, 50, 5, 16, 38, 384)),  # this model has 38 positions
        ("nlvr2", "vilt", "lora", (5e-4, 1, 1, 4, 40, 384)),
        ("nlvr2", "meter", "apt", (1e-5, 10, 5, 8, 38, 288)),
        ("retrieval", "vilt", "apt", (5e-4, 1, 1, 64, 40, 384)),
        ("retrieval", "meter", "apt", (5e-5, 1, 5, 128, 38, 384)),
    ],
)
def test_defaults_are_those_of_the_published_recipes(script, kind, method, expected, tiny_vl, vqa_dir, tmp_path):
    nothing = dict.fromkeys(("learning_rate", "gradient_accumulation_steps", "train_batch_size", "image_size"))
    args, _ = settled(script, tiny_vl[kind], vqa_dir, tmp_path, method=method, **nothing)
    names = ("learning_rate", "head_lr_multiplier", "cross_modal_lr_multiplier", "gradient_accumulation_steps")
    assert tuple(getattr(args, name) for name in (*names, "max_text_length", "image_size")) == expected
    assert (args.num_train_epochs, args.adam_beta2, args.weight_decay, args.lr_warmup_steps) == (10, 0.98, 0.01, 0.1)


def test_rates_and_weight_decay_by_name(tiny_vl, vqa_dir, tmp_path):
    from train_apt_vqa import MODELS

    from apt_diffusion.training.methods import trained_parameters
    from apt_diffusion.training.session import Session
    from apt_diffusion.training.vision_language.method import attach
    from apt_diffusion.training.vision_language.models import load_model
    from apt_diffusion.training.vision_language.optimizer import make_optimizer

    args, base = settled("vqa", tiny_vl["meter"], vqa_dir, tmp_path, learning_rate=1.0)
    model = load_model(args, base, 0, MODELS["meter"], num_labels=3)
    with Session.start(args, "train_apt_vqa") as session:
        attach(session, model)
    parameters = trained_parameters(model)
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = make_optimizer(args, parameters)[0].param_groups
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    layer = "meter.cross_modal_text_layers.0.attention.apt.adapters.default"
    expected = {
        "classifier.0.weight": (50, 0.01),
        "classifier.0.bias": (50, 0.0),
        "classifier.1.weight": (50, 0.01),  # the head's norm decays in the released code
        "meter.token_type_embeddings.weight": (1, 0.01),
        "meter.cross_modal_image_pooler.dense.weight": (5, 0.01),
        f"{layer}.prompts": (5, 0.01),
        f"{layer}.log_scale": (5, 0.01),
    }
    assert {name: found[name] for name in expected} == expected and set(found) == set(parameters)


def test_frozen_encoders_have_no_dropout_and_everything_else_does(tiny_vl):
    from apt_diffusion.baselines import MethodConfig, add_method, freeze_for_method
    from apt_diffusion.models.meter import MeterForQuestionAnswering
    from apt_diffusion.training.vision_language.method import set_training_mode

    model = MeterForQuestionAnswering.from_pretrained(tiny_vl["meter"], num_labels=2)
    for method, trained in (("classifier_only", False), ("full", True)):
        model.method_config = None
        add_method(model, MethodConfig(method))
        freeze_for_method(model)
        set_training_mode(model)
        assert model.meter.text_model.training == model.meter.vision_model.training == trained
        assert model.training and model.meter.cross_modal_text_layers.training


# Refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seed": -1}, "--seed must be from 0"),
        ({"hidden_dropout_prob": 1.0}, r"--hidden_dropout_prob must be in \[0, 1\)"),
        ({"lr_warmup_steps": -0.5}, "--lr_warmup_steps must not be negative"),
        ({"eval_only": True, "resume_from_checkpoint": "latest"}, "which may be a checkpoint"),
        ({"adapter": "x", "resume_from_checkpoint": "latest"}, "leave --adapter out"),
        ({"method": "lora", "init": "paper"}, "--init and --freeze_scale are APT's"),
        ({"cache_encoder_outputs": "cache", "augment": True}, "leave --augment out"),
        ({"cache_encoder_outputs": "cache", "method": "full"}, "--method full trains them"),
        ({"cache_encoder_outputs": "cache"}, "ViLT has no encoders"),
        ({"resume_from_checkpoint": "checkpoint-9"}, "no checkpoint 'checkpoint-9'"),
        # The hub is tried several times before it is given up.
        pytest.param({"adapter": "nowhere", "eval_only": True}, "nowhere", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_work_is_refused_before_data_are_read(flags, message, go, monkeypatch, tmp_path):
    import train_apt_vqa

    if "adapter" not in flags:
        monkeypatch.setattr(train_apt_vqa, "load", lambda *args: pytest.fail("too late"))
    monkeypatch.setattr(train_apt_vqa, "load_model", lambda *args, **kwargs: pytest.fail("too late"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        go("vqa", "vilt", "out", **flags)


def test_other_models_are_refused(tiny_sd_path, vqa_dir, tmp_path):
    with pytest.raises(ValueError, match="is a 'clip_text_model' model: this script trains VILT or METER"):
        train("vqa", tiny_sd_path / "text_encoder", vqa_dir, tmp_path / "out")


def test_data_come_from_one_place(capsys, tiny_vl, vqa_dir, tmp_path):
    for data, name in ((None, None), (vqa_dir, "x")):
        with pytest.raises(SystemExit):
            train("vqa", tiny_vl["vilt"], data, tmp_path, dataset_name=name)
        assert "give --data_dir or --dataset_name" in capsys.readouterr().err


def test_resuming_with_another_method_is_refused(go):
    go("vqa", "vilt", "out")
    with pytest.raises(ValueError, match="other settings: rank 2 there, 3 here"):
        go("vqa", "vilt", "out", max_train_steps=4, rank=3, resume_from_checkpoint="latest")


# Cards, processes


@pytest.mark.parametrize(("script", "kind", "method"), [("vqa", "vilt", "apt"), ("nlvr2", "meter", "adapter")])
def test_the_code_in_the_card_runs(go, tiny_vl, script, kind, method, monkeypatch, capsys):
    out = go(script, kind, "out", method=method)
    card = (out / "README.md").read_text()
    code = card_code(out, tiny_vl[kind])
    monkeypatch.chdir(out)
    names = {"picture": picture("red", 0), "left": picture("red", 1), "right": picture("blue", 2)}
    exec(code, names)
    assert capsys.readouterr().out.strip() in (["true", "false"] if script == "nlvr2" else names["answers"])
    metric = next(iter(results(out)["metrics"]))
    assert f"| {metric} | " in card and "![loss](loss.png)" in card and f"| method | `{method}` |" in card


@pytest.mark.slow
def test_accelerate_launch_with_two_processes_is_one_with_twice_the_batch(tiny_vl, nlvr2_dir, tmp_path):
    flags = {"max_train_steps": 2, "hidden_dropout_prob": 0.0, "evaluation_steps": 1, "no-augment": True}
    flags["adam_epsilon"] = 1e-3  # so that AdamW does not blow up the rounding of vanishing gradients
    line = words(tiny_vl["meter"], nlvr2_dir, tmp_path / "two", train_batch_size=1, **flags)
    in_two_processes(TRAIN / "train_apt_nlvr2.py", *line)
    one = train("nlvr2", tiny_vl["meter"], nlvr2_dir, tmp_path / "one", train_batch_size=2, **flags)
    for key, value in weights(one).items():
        assert torch.allclose(weights(tmp_path / "two")[key], value, atol=1e-5), key
    assert results(tmp_path / "two")["metrics"] == results(one)["metrics"]
    a, b = ([row["loss"] for row in rows(out)] for out in (one, tmp_path / "two"))
    assert np.allclose(a, b, atol=1e-5) and len(rows(tmp_path / "two", "metrics.jsonl")) == 2
