"""DeepSpeed's config: what of it is followed, what is refused, and runs in two processes against one."""

import importlib.util
import json
import os
import re
from argparse import Namespace

import pytest
from support.launching import in_two_processes
from support.training_helpers import SCRIPT, assert_same_adapter, command, losses, train

from apt_diffusion.training.deepspeed_config import follow

COUNTER = SCRIPT.parents[1] / "tests" / "support" / "count_shards.py"
FSDP = ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_AUTO_WRAP_POLICY", "FSDP_OFFLOAD_PARAMS")


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """`asked(config)` sets what `accelerate launch --use_deepspeed` would set; a dict or text is written to a file."""
    for name in [*FSDP, *(name for name in os.environ if name.startswith("ACCELERATE_"))]:
        monkeypatch.delenv(name, raising=False)

    def ask(config=None, **launcher):
        for name in FSDP:  # restored afterwards, as `follow` sets them
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        for name, value in launcher.items():
            monkeypatch.setenv(f"ACCELERATE_{name}", value)
        if config is not None:
            file = tmp_path / "ds.json"
            file.write_text(config if isinstance(config, str) else json.dumps(config))
            monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))

    return ask


def flags(**changes):
    values = {"train_batch_size": 4, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "mixed_precision": None}
    return Namespace(**values | changes)


def test_without_deepspeed_nothing_changes(asked):
    args = flags()
    assert follow(args) is None and args == flags()


def test_flags_without_a_value_and_the_precision_become_the_configs(asked):
    asked({
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16": {"enabled": True},
        "fp16": {"enabled": "auto"}, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5,
        "train_micro_batch_size_per_gpu": "auto", "train_batch_size": 8, "wall_clock_breakdown": False,
    })  # fmt: skip
    args = flags(gradient_accumulation_steps=None, max_grad_norm=None)
    assert follow(args) == (
        "DeepSpeed's config is followed without its engine: stage 2 has next to nothing to share out of an adapter, "
        "so every process has all of it. Not followed: wall_clock_breakdown."
    )
    assert args == flags(gradient_accumulation_steps=2, max_grad_norm=0.5, mixed_precision="bf16")
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "false" and "ACCELERATE_USE_FSDP" not in os.environ


@pytest.mark.parametrize("clipping", [0, "auto"])
def test_no_clipping_is_none(asked, clipping):
    asked({"gradient_clipping": clipping})
    args = flags(max_grad_norm=None)
    follow(args)
    assert args.max_grad_norm is None


def test_stage_3_cuts_the_frozen_base_into_shards(asked):
    asked({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}})
    assert "FSDP2 cuts the frozen base into shards, as stage 3 does, and keeps them in main memory" in follow(flags())
    assert [os.environ[name] for name in FSDP] == ["true", "2", "TRANSFORMER_BASED_WRAP", "true"]


def test_the_launchers_own_flags_are_a_config_too(asked):
    asked(DEEPSPEED_ZERO_STAGE="3", GRADIENT_ACCUMULATION_STEPS="3", GRADIENT_CLIPPING="0.1")
    args = flags(gradient_accumulation_steps=None, max_grad_norm=None)
    assert "FSDP2" in follow(args)
    assert args == flags(gradient_accumulation_steps=3, max_grad_norm=0.1)
    assert os.environ["FSDP_OFFLOAD_PARAMS"] == "false"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"train_micro_batch_size_per_gpu": 3, "gradient_clipping": 0.5, "train_batch_size": 16},
            r"flags differ: train_micro_batch_size_per_gpu is 3 and --train_batch_size 2; gradient_clipping is 0.5 "
            r"and --max_grad_norm 1.0; train_batch_size is 16 and that of all processes 2\. Change one, or write",
        ),
        ({"gradient_accumulation_steps": 1.5}, r"gradient_accumulation_steps is 1.5: a number above 0, whole, or"),
        ({"gradient_clipping": -1}, "gradient_clipping is -1: a number above 0, or"),
        ({"gradient_clipping": True}, "gradient_clipping is True: a number above 0, or"),
        ({"optimizer": {"type": "AdamW"}}, "has 'optimizer': take it out, and give --optimizer and --learning_rate"),
        ({"scheduler": {}}, "has 'scheduler': take it out, and give --lr_scheduler"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "enables fp16 and bf16: a run has one precision"),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled is 'yes': true, false or"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4: it can be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param is 'nvme'"),
        ({"zero_optimization": 3}, "is no config of DeepSpeed: an object whose sections are objects"),
        ([], "is no config of DeepSpeed"),
        ("{stage: 2}", r"ds\.json is no JSON: "),
        ("[" * 100_000, r"ds\.json is no JSON: "),
        ('{"train_batch_size": ' + "9" * 5000 + "}", r"ds\.json is no JSON: "),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_loaded(go, no_models, asked, config, message):
    asked(config)
    with pytest.raises(ValueError, match=message):
        go()


def test_shards_and_a_quantised_base_are_refused_as_with_fsdp(go, no_models, asked):
    asked({"zero_optimization": {"stage": 3}})
    with pytest.raises(ValueError, match=r"--base_precision and the launcher's shards \(.* 3\) exclude each other"):
        go(base_precision="nf4")


def test_a_precision_that_the_flag_denies_is_refused(asked):
    asked({"bf16": {"enabled": True}})
    with pytest.raises(ValueError, match="enables bf16, --mixed_precision says fp16: a run has one precision"):
        follow(flags(mixed_precision="fp16"))


def test_a_file_that_is_not_there_is_one_sentence(asked, tmp_path):
    asked(DEEPSPEED_CONFIG_FILE=str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"--deepspeed_config_file: there is no file .*none\.json"):
        follow(flags())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_train_the_adapter_of_one(tiny_sd_path, instance_dir, tmp_path, asked, stage):
    config = {
        "zero_optimization": {"stage": stage}, "gradient_clipping": 0.5, "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": "auto",
    }  # fmt: skip
    asked(config)
    shared = {"max_train_steps": 3, "gradient_accumulation_steps": 2, "train_text_encoder": True, "max_grad_norm": 0.5}
    words = command(tiny_sd_path, instance_dir, tmp_path / "two", train_batch_size=1, **shared)
    # Its launcher only sets these variables, and refuses to where DeepSpeed is not installed.
    installed = importlib.util.find_spec("deepspeed") is not None
    how = ("--use_deepspeed", "--deepspeed_config_file", tmp_path / "ds.json") if installed else ("--multi_gpu",)
    output = in_two_processes(COUNTER, SCRIPT, *words, how=how)
    shares = [float(share) for share in re.findall(r"<share: ([.\d]+), adapter whole: True>", output)]
    assert "DeepSpeed's config is followed without its engine" in output
    assert re.search(r"On the CPU: 1 of \d+ cores for each of 2 processes\.", output)
    assert len(shares) == (2 if stage == 3 else 0) and sum(shares) == pytest.approx(len(shares) / 2, abs=0.02)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    one = train(tiny_sd_path, instance_dir, tmp_path / "one", train_batch_size=2, **shared)
    assert_same_adapter(one, tmp_path / "two", tolerance=1e-5)
    assert losses(one) == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
